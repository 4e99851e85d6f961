"""What a run says: a live line on a terminal, plain lines elsewhere, and metrics.jsonl always.

Each line of metrics.jsonl is one JSON object: {"event": "step", "step": 1, "loss": ..., ...} or
{"event": "eval", "step": 10, "eval_loss": ...}. NaN and infinity, which JSON lacks, are written as
null.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

GIB = 2**30
MAX_PLAIN_LINES = 100


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. tokens count what the model read, without padding; skipped: no update."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    memory_bytes: int
    skipped: bool
    rows: list[int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Throughput of this step."""
        return self.tokens / max(self.seconds, 1e-9)


class RunLog:
    """Writes a run's progress. Use as a context manager around the loop.

    On resume, lines of metrics.jsonl after `first_step` (of a run that died later) are taken out.
    """

    def __init__(
        self, metrics: Path, first_step: int, num_steps: int, console: Console | None = None
    ) -> None:
        self.console = console or Console(soft_wrap=True)
        self.first_step, self.num_steps = first_step, num_steps
        self._every = max(1, num_steps // MAX_PLAIN_LINES)
        self._metrics = metrics
        self._file: TextIO | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()

    def __enter__(self) -> RunLog:
        kept = _lines_until(self._metrics, self.first_step)
        self._file = self._metrics.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._began = time.monotonic()
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
            self._task = self._progress.add_task(
                "starting", total=self.num_steps, completed=self.first_step
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()

    def notice(self, text: str | Text) -> None:
        """One line or block; markup in it is not interpreted."""
        self.console.print(Text(text) if isinstance(text, str) else text, highlight=False)

    def step(self, record: StepRecord) -> None:
        """Report an optimizer step."""
        values = {**asdict(record), "tokens_per_second": record.tokens_per_second}
        if record.rows is None:
            del values["rows"]
        self._write({"event": "step", **values})
        line = self._line(record)
        if record.skipped:
            self.notice(f"{line}  SKIPPED: gradient or loss is not finite; rows {record.rows}")
        elif self._progress is None:
            if record.step % self._every == 0 or record.step in (
                self.first_step + 1,
                self.num_steps,
            ):
                self.notice(line)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record.step, description=line)

    def evaluation(self, step: int, loss: float) -> None:
        """Report a loss on held-out rows."""
        self._write({"event": "eval", "step": step, "eval_loss": loss})
        self.notice(f"step {step}/{self.num_steps}  eval loss {loss:.4f}")

    def _line(self, record: StepRecord) -> str:
        done = record.step - self.first_step
        elapsed = time.monotonic() - self._began
        eta = elapsed / max(done, 1) * (self.num_steps - record.step)
        return (
            f"step {record.step}/{self.num_steps}  loss {record.loss:.4f}  lr {record.lr:.2e}  "
            f"grad {record.grad_norm:.3f}  {record.tokens_per_second:.0f} tok/s  "
            f"{record.memory_bytes / GIB:.2f} GiB  ETA {_clock(eta)}"
        )

    def _write(self, values: dict[str, Any]) -> None:
        assert self._file is not None, "used outside its context"
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU (0 where the system does not
    tell).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _lines_until(metrics: Path, last_step: int) -> list[str]:
    if last_step == 0 or not metrics.is_file():
        return []
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # the last line of a killed process
            continue
        if step <= last_step:
            kept.append(line)
    return kept


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
