"""The interface between a run and whoever watches it: five moments, each a method to override.

    start -> (step | evaluation | saved)* -> finish

`Trainer(model, data, callbacks=[...])` takes any; the trackers of `trackers.py` are four of them. A
callback only watches: it is given records, not the trainer, so no run depends on who looks on.
Exceptions of one's own callbacks end the run as any error would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sloth.train.records import EvalRecord, StepRecord


class Callback:
    """Does nothing at any of the five moments."""

    def start(self, output: Path, settings: dict[str, Any]) -> None:
        """Before the first step: the run's folder and its settings, without secrets."""

    def step(self, record: StepRecord) -> None:
        """After an optimizer step."""

    def evaluation(self, record: EvalRecord) -> None:
        """After an evaluation."""

    def saved(self, step: int, folder: Path) -> None:
        """After a checkpoint is whole on the disk."""

    def finish(self, error: BaseException | None) -> None:
        """At the end, with what ended the run early, if anything did."""
