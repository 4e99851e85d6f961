"""The names in a run's folder, for what writes them and for what reads them. Needs no torch.

config.yaml     the settings, in the form that `--config` reads
run.json        what the run is about
metrics.jsonl   a line for each step and each evaluation
step-000120/    a checkpoint
weights-000120/ weights alone, of a step whose checkpoint the disk did not take
adapter/        what was trained, there at the end; model/ after full training
published.json  which files of these the runs of this folder wrote
"""

from __future__ import annotations

import re
from pathlib import Path

SETTINGS, FACTS, METRICS = "config.yaml", "run.json", "metrics.jsonl"
ADAPTER, MODEL = "adapter", "model"
PUBLISHED, PUBLISHED_RECORD = (ADAPTER, MODEL), "published.json"

# Whole names: what is merely called alike is somebody's.
_CHECKPOINT, _WEIGHTS = re.compile(r"step-(\d{6,})"), re.compile(r"weights-\d{6,}")
_UNFINISHED = re.compile(r"(step|weights)-\d{6,}\.tmp-\d+")


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step-{step:06d}"


def weights_name(step: int) -> str:
    """The name of the folder for a step's weights alone."""
    return f"weights-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def is_checkpoint(path: Path) -> bool:
    """Whether it is called as checkpoints are."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def is_weights(path: Path) -> bool:
    """Whether it is called as weights alone are."""
    return _WEIGHTS.fullmatch(path.name) is not None


def is_unfinished(path: Path) -> bool:
    """Whether it is called as either is while it is written."""
    return _UNFINISHED.fullmatch(path.name) is not None


def published_in(run: Path) -> list[Path]:
    """The folders there are of what was trained."""
    return [run / name for name in PUBLISHED if (run / name).is_dir()]
