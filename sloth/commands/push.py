"""`sloth push FOLDER OWNER/NAME`: an adapter or a model that is saved, to the hub with its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sloth.commands.base import parse, show


@dataclass(frozen=True)
class Push:
    """Upload FOLDER (of an adapter, a saved model, or a finished run) to REPO on the hub."""

    folder: tyro.conf.Positional[Path]
    """What save_adapter, save_merged or save_base wrote, or the folder of a run."""
    repo: tyro.conf.Positional[str]
    """owner/name; made where there is none."""
    public: bool = False
    """Let everyone read it; private unless said."""
    message: str | None = None
    """Of the commit."""


def run(arguments: Sequence[str]) -> int:
    """Upload an adapter or a model to the hub, private by default."""
    parsed = parse(Push, "push", arguments)
    from sloth.pushing import push_folder

    pushed = push_folder(
        parsed.folder, parsed.repo, private=not parsed.public, message=parsed.message
    )
    show(f"{pushed.url}  {'public' if parsed.public else 'private'}, commit {pushed.commit[:12]}")
    return 0
