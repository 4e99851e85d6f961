"""What a run says: a live line on a terminal, plain lines elsewhere, and metrics.jsonl always.

Each line of metrics.jsonl is one JSON object: {"event": "step", "step": 1, "loss": ..., ...} or
{"event": "eval", "step": 10, "eval_loss": ..., "perplexity": ..., "samples": [...]}. NaN and
infinity, which JSON lacks, are written as null. Secrets are redacted in both. Callbacks hear of
everything from here, so the loop reports each moment once.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from sloth.train.callbacks import Callback
from sloth.train.records import EvalRecord, StepRecord
from sloth.train.redact import Redactor

GIB = 2**30
MAX_PLAIN_LINES = 100
SHOWN_CHARACTERS = 300


class RunLog:
    """Writes a run's progress. Use as a context manager around the loop.

    On resume, lines of metrics.jsonl after `first_step` (of a run that died later) are taken out.
    metrics: None for a process that is to be silent.
    """

    def __init__(
        self,
        metrics: Path | None,
        first_step: int,
        num_steps: int,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.console = console or Console(soft_wrap=True, quiet=metrics is None)
        self.callbacks = list(callbacks)
        self._redactor = Redactor()
        self.first_step, self.num_steps = first_step, num_steps
        self._every = max(1, num_steps // MAX_PLAIN_LINES)
        self._metrics = metrics
        self._file: FileIO | None = None
        self._pending, self._is_behind = b"", False  # lines that the disk did not take yet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()

    def __enter__(self) -> RunLog:
        # Cut rather than written anew: a disk that is full must not cost the lines of before.
        if self._metrics is not None:
            kept_bytes = _bytes_until(self._metrics, self.first_step)
            self._file = self._metrics.open("ab", buffering=0)
            self._file.truncate(kept_bytes)
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
        for callback in self.callbacks:
            callback.finish(error)

    def start(self, settings: dict[str, Any]) -> None:
        """Tell the callbacks where the run is and what it was asked for."""
        for callback in self.callbacks:
            assert self._metrics is not None
            callback.start(self._metrics.parent, self._redactor.value(settings))

    def notice(self, text: str | Text) -> None:
        """One line or block; markup in it is not interpreted."""
        plain = text if isinstance(text, str) else text.plain
        safe = self._redactor.text(plain)
        shown = text if isinstance(text, Text) and safe == plain else Text(safe)
        self.console.print(shown, highlight=False)

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

        for callback in self.callbacks:
            callback.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Report a loss on held-out rows and answers to the prompts."""
        values: dict[str, Any] = {"event": "eval", "step": record.step}
        if record.loss is not None and record.perplexity is not None:
            values |= {"eval_loss": record.loss, "perplexity": record.perplexity}
            best = "  (best so far)" if record.is_best else ""
            self.notice(
                f"step {record.step}/{self.num_steps}  eval loss {record.loss:.4f}  "
                f"perplexity {record.perplexity:.4g}{best}"
            )
        if record.samples:
            values["samples"] = [{"prompt": p, "answer": a} for p, a in record.samples]
        for prompt, answer in record.samples:
            self.notice(f"  {_one_line(prompt)} -> {_one_line(answer)}")
        self._write(values)
        for callback in self.callbacks:
            callback.evaluation(record)

    def saved(self, step: int, folder: Path) -> None:
        """Tell the callbacks of a checkpoint."""
        for callback in self.callbacks:
            callback.saved(step, folder)

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
        if self._metrics is None:
            return
        assert self._file is not None, "used outside its context"
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._pending += json.dumps(self._redactor.value(finite)).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._is_behind:
                self.notice(f"WARNING: {self._metrics.name} falls behind: {error.strerror}")
        self._is_behind = bool(self._pending)


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


def _bytes_until(metrics: Path, last_step: int) -> int:
    """Length of the lines up to a step; a killed process may have cut the last one."""
    if last_step == 0 or not metrics.is_file():
        return 0
    length = 0
    for line in metrics.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        length += len(line)
    return length


def _one_line(text: str) -> str:
    """On one line, control characters escaped, cut to a screenful."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"{shown[:SHOWN_CHARACTERS]}..." if len(shown) > SHOWN_CHARACTERS else shown


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
