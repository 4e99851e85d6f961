"""What the `sloth` command does to its arguments before the flags are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def config_path(arguments: Sequence[str]) -> Path | None:
    """The value of --config, read before the flags so that the file can be their default."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
        if argument == "--config" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
    return None


def spell_out_resume(arguments: Sequence[str]) -> list[str]:
    """A bare --resume means True."""
    spelled = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        spelled.append(argument)
        if argument == "--resume" and following.startswith("-"):
            spelled.append("True")
    return spelled
