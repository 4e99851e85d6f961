"""The folder of a run: which may be one, and what is published in it at the end."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from sloth.errors import OutputExists
from sloth.train.checkpoint import (
    checkpoints,
    is_good,
    newest_good,
    remove_unfinished,
    step_of,
)
from sloth.train.config import TrainConfig
from sloth.train.ranks import Ranks

RUNS = Path("runs")


def claim_output(config: TrainConfig) -> tuple[Path, Path | None]:
    """Make the run's folder; return it and the checkpoint to resume from, or None.

    resume=True with no checkpoint yet starts from the beginning. Raises OutputExists for a folder
    that holds files, ValueError for a resume without a place, CheckpointMismatch for damaged
    checkpoints.
    """
    output, source = config.output, None
    if config.resume is True:
        if output is None:
            raise ValueError("resume=True needs output, the folder of the run to continue")
        source = newest_good(output)
    elif config.resume:
        place = Path(config.resume)
        source = newest_good(place)
        if source is None:
            raise ValueError(f"resume={str(place)!r}: no checkpoint there (a step-000123 folder)")
        output = output or source.parent
    output = output or _new_folder()
    _refuse_branching(source, output)
    continues = config.resume is True or (source is not None and source.parent == output)
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file; choose another output")
    if not continues and output.is_dir() and any(output.iterdir()):
        raise OutputExists(
            f"{output} exists and is not empty; choose another, or continue it with resume=True"
        )
    output.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output)
    return output, source


def claim_once(config: TrainConfig, ranks: Ranks) -> tuple[Path, Path | None]:
    """`claim_output` in the first rank, its answer in all."""
    claimed: list[Path | None] = []
    ranks.first(lambda: claimed.extend(claim_output(config)))
    output, source = json.loads(ranks.tell(json.dumps([str(path or "") for path in claimed])))
    return Path(output), Path(source) if source else None


def _refuse_branching(source: Path | None, output: Path) -> None:
    """Raise ValueError for a continuation that newer checkpoints of its own folder would overrule
    the next time.
    """
    if source is None or source.parent != output:
        return
    newer = [path.name for path in checkpoints(output) if step_of(path) > step_of(source)]
    newer = [name for name in newer if is_good(output / name)]
    if newer:
        raise ValueError(
            f"{output} holds newer checkpoints than {source.name} ({', '.join(newer)}), and the "
            "newest one is resumed from; give another output, or delete them"
        )


def publish_weights(model: Any, output: Path) -> dict[str, Path]:
    """Save output/adapter, or output/model after full training; a resumed run replaces its own."""
    name = "adapter" if model.has_adapter else "model"
    folder = output / name
    shutil.rmtree(folder, ignore_errors=True)
    if name == "adapter":
        model.save_adapter(folder)
    else:
        model.save_merged(folder)
    return {name: folder}


def _new_folder() -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = RUNS / f"{stem}{suffix}"
        if not folder.exists():
            return folder
    raise OutputExists(f"{RUNS} holds too many runs of this second; give output")
