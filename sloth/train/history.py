"""A run as its folder tells it, without torch: run.json, metrics.jsonl, checkpoints.

For runs that are over, going on, or died: a line that was cut is the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sloth.train.lock import is_locked
from sloth.train.run_folder import FACTS, METRICS, is_checkpoint, published_in, step_of

# Where its lock does not tell: a run that wrote nothing for longer than this, and than three of its
# steps, is not going on.
_SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class RunHistory:
    """losses: by step; NaN where it was not finite. eval_losses: by step. seconds: of the longest
    step. written: when metrics.jsonl was, in seconds since the epoch.
    """

    folder: Path
    model: str
    settings: Mapping[str, Any]
    losses: Mapping[int, float]
    eval_losses: Mapping[int, float]
    seconds: float
    written: float

    @classmethod
    def read(cls, folder: Path) -> RunHistory:
        """The run in a folder that has a metrics.jsonl."""
        losses: dict[int, float] = {}
        eval_losses: dict[int, float] = {}
        seconds = 0.0
        metrics = folder / METRICS
        for line in _bytes_of(metrics).splitlines():
            try:
                row = json.loads(line)
                step, event = int(row["step"]), row["event"]
                if event == "step":
                    loss = math.nan if row.get("loss") is None else float(row["loss"])
                    seconds = max(seconds, float(row.get("seconds") or 0.0))
                    losses[step] = loss
                elif event == "eval" and row.get("eval_loss") is not None:
                    eval_losses[step] = float(row["eval_loss"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                break
        facts = _facts(folder)
        told_settings = facts.get("settings")
        settings = {
            name: told.get("value") if isinstance(told, dict) else told
            for name, told in (told_settings if isinstance(told_settings, dict) else {}).items()
        }
        model, written = str(facts.get("model", "?")), metrics.stat().st_mtime
        return cls(folder, model, settings, losses, eval_losses, seconds, written)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @property
    def steps(self) -> int:
        """How many are done."""
        return max(self.losses, default=0)

    @property
    def last_loss(self) -> float | None:
        """Of the last step that had a finite one."""
        return next((v for v in reversed(list(self.losses.values())) if math.isfinite(v)), None)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss): the lowest of the held-out rows, or of the steps where there are none."""
        finite = {s: v for s, v in (self.eval_losses or self.losses).items() if math.isfinite(v)}
        step = min(finite, key=lambda step: finite[step], default=None)
        return None if step is None else (step, finite[step])

    def stretch(self, start: int, end: int) -> list[float]:
        """Losses of the steps from `start` to `end`, both included; NaN for one without."""
        return [self.losses.get(step, math.nan) for step in range(start, end + 1)]

    def status(self, now: float) -> str:
        """finished, running, or stopped, with the checkpoint to resume from."""
        is_running = is_locked(self.folder)
        if is_running is None:
            is_running = now - self.written < max(_SILENT_SECONDS, 3 * self.seconds)
            is_running = is_running and not self._published()
        if is_running:
            return "running"
        if self._published():
            return "finished"
        newest = max(filter(is_checkpoint, self.folder.glob("step-*")), key=step_of, default=None)
        return f"stopped, resume from {newest.name}" if newest else "stopped, no checkpoint"

    def differences(self, other: RunHistory) -> dict[str, tuple[Any, Any]]:
        """Settings that differ, both values; where they write to is not of interest."""
        names = [name for name in {**self.settings, **other.settings} if name != "output"]
        pairs = {name: (self.settings.get(name), other.settings.get(name)) for name in names}
        return {name: both for name, both in pairs.items() if both[0] != both[1]}

    def _published(self) -> bool:
        """Whether what was trained is there, and newer than the last line of the metrics."""
        return any(path.stat().st_mtime >= self.written for path in published_in(self.folder))


def find_runs(folder: Path) -> list[RunHistory]:
    """The runs in a folder, or the one that it is; by name."""
    if (folder / METRICS).is_file():
        return [RunHistory.read(folder)]
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = [path for path in sorted(folder.glob(f"*/{METRICS}")) if path.is_file()]
    return [RunHistory.read(path.parent) for path in found]


def mean(values: Iterable[float]) -> float | None:
    """Of the finite ones; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _bytes_of(metrics: Path) -> bytes:
    """Nothing of a file that may not be read: the others are to be listed all the same."""
    try:
        return metrics.read_bytes()
    except OSError:
        return b""


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
