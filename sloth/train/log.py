"""What a run says: a live line on a terminal, plain lines elsewhere, and metrics.jsonl always.

Each line of metrics.jsonl is one JSON object: {"event": "step", "step": 1, "loss": ..., ...} or
{"event": "eval", "step": 10, "eval_loss": ..., "perplexity": ..., "samples": [...]}. NaN and
infinity, which JSON lacks, are written as null. Secrets are redacted in both. The disk holds the
lines of a step before it holds its checkpoint. A full disk or a reader that has left ends what is
said, and not the run. Callbacks hear of everything from here, so the loop reports each moment once.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from sloth.constants import GIB
from sloth.data.show import named_rows, without_secrets
from sloth.quiet import QuietStream
from sloth.redact import Redactor
from sloth.train.callbacks import Callback
from sloth.train.plot import ASCII_BLOCKS, BLOCKS, sparkline
from sloth.train.records import EvalRecord, StepRecord
from sloth.train.records import Progress as Done

MAX_PLAIN_LINES = 100
SPARKLINE_WIDTH = 60
MIN_EPOCH_STEPS = 8  # a curve of fewer says nothing that their lines do not
SMOOTHING = 0.9  # weight of the past in the loss that is shown beside a step's own
SHOWN_CHARACTERS = 300


class RunLog:
    """Writes a run's progress. Use as a context manager around the loop.

    On resume, lines of metrics.jsonl after `first_step` (of a run that died later) are taken out,
    and the evaluation of that step where it is to be done again. Those of before that a torn log
    lacks come back with no more than their losses, which the checkpoint has. before: what it says.
    metrics: None for a process that is to be silent.
    """

    def __init__(
        self,
        metrics: Path | None,
        first_step: int,
        num_steps: int,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
        before: Done | None = None,
    ) -> None:
        stdout: Any = QuietStream(sys.stdout)
        self.console = console or Console(file=stdout, soft_wrap=True, quiet=metrics is None)
        self.callbacks = list(callbacks)
        self._redactor = Redactor()
        self.first_step, self.num_steps = first_step, num_steps
        self._every = max(1, num_steps // MAX_PLAIN_LINES)
        self._metrics, self._before = metrics, before or Done()
        self._file: FileIO | None = None
        self._pending, self._is_behind = b"", False  # lines that the disk did not take yet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._smoothed, self._smoothed_weight = 0.0, 0.0
        self._epoch_losses: list[float] = []

    def __enter__(self) -> RunLog:
        # Cut rather than written anew: a disk that is full must not cost the lines of before.
        if self._metrics is not None:
            kept = _lines_until(self._metrics, self.first_step, not self._before.is_eval_due)
            lost = _lines_after(kept, self._before) if self._metrics.is_file() else []
            self._file = self._metrics.open("ab", buffering=0)
            self._file.truncate(len(kept))
            self._pending = b"\n" if kept and not kept.endswith(b"\n") else b""
            if lost:
                name, first = self._metrics.name, lost[0]["step"]
                self.notice(f"WARNING: {name} is torn; from step {first} on, losses are put back")
            for values in lost:
                self._write(values)
        self._began = time.monotonic()
        if self.console.is_terminal:
            bar = BarColumn(bar_width=self._bar_width())
            columns = (bar, TextColumn("{task.description}", markup=False))
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
        self.console.print(without_secrets(text), highlight=False)

    def step(self, record: StepRecord) -> None:
        """Report an optimizer step."""
        values = {**asdict(record), "tokens_per_second": record.tokens_per_second}
        values |= values.pop("metrics")
        if record.rows is None:
            del values["rows"], values["begins"]
        self._write({"event": "step", **values})
        self._smooth(record.loss)
        line = "  ".join(text for _, text in self._pieces(record))
        if record.skipped:
            rows = named_rows(record.rows or [], record.begins or [])
            self.notice(f"{line}  SKIPPED: gradient or loss is not finite; {rows}")
        elif self._progress is None:
            if record.step % self._every == 0 or record.step in (
                self.first_step + 1,
                self.num_steps,
            ):
                self.notice(line)
        if self._progress is not None and self._task is not None:
            room = self.console.width - self._bar_width() - 1
            live = fitted(self._pieces(record), room)
            self._progress.update(self._task, completed=record.step, description=live)
        self._end_epoch(record)
        for callback in self.callbacks:
            callback.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Report a loss on held-out rows and answers to the prompts, without secrets."""
        safe = self._redactor.text
        record = replace(record, samples=[(safe(p), safe(a)) for p, a in record.samples])
        values: dict[str, Any] = {"event": "eval", "step": record.step}
        if record.loss is not None:
            measured = {f"eval_{name}": value for name, value in record.metrics.items()}
            if record.perplexity is not None:
                measured["perplexity"] = record.perplexity
            values |= {"eval_loss": record.loss, **measured}
            best = "  (best so far)" if record.is_best else ""
            self.notice(
                f"step {record.step}/{self.num_steps}  eval loss {record.loss:.4f}"
                f"{_shown(measured)}{best}"
            )
        if record.samples:
            values["samples"] = [{"prompt": p, "answer": a} for p, a in record.samples]
        for prompt, answer in record.samples:
            self.notice(f"  {_one_line(prompt)} -> {_one_line(answer)}")
        self._write(values)
        for callback in self.callbacks:
            callback.evaluation(record)

    def curve(self, losses: Sequence[float], said: str = "loss") -> None:
        """The losses as one line of blocks, between the means of the first and the last tenth."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return
        tenth = max(1, len(finite) // 10)
        first, last = (math.fsum(part) / tenth for part in (finite[:tenth], finite[-tenth:]))
        has_blocks = "utf" in self.console.encoding.lower()
        line = sparkline(losses, SPARKLINE_WIDTH, BLOCKS if has_blocks else ASCII_BLOCKS)
        self.notice(f"{said} {first:.4f} {line} {last:.4f}")

    def _end_epoch(self, record: StepRecord) -> None:
        """The curve of an epoch of some length, once its last row was read."""
        self._epoch_losses.append(record.loss)
        share = record.epoch / record.step  # of an epoch, in a step
        ended = math.floor(record.epoch + share / 1e6)
        if ended > math.floor(record.epoch - share + share / 1e6):
            if len(self._epoch_losses) >= MIN_EPOCH_STEPS and record.step < self.num_steps:
                self.curve(self._epoch_losses, f"epoch {ended}  loss")
            self._epoch_losses = []

    def _smooth(self, loss: float) -> None:
        """Exponential mean, free of its start's zero; a loss that is not finite is left out."""
        if math.isfinite(loss):
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
            self._smoothed_weight = SMOOTHING * self._smoothed_weight + 1 - SMOOTHING

    def saved(self, step: int, folder: Path) -> None:
        """Tell the callbacks of a checkpoint."""
        for callback in self.callbacks:
            callback.saved(step, folder)

    def _bar_width(self) -> int:
        return 20 if self.console.width >= 100 else 10

    def _pieces(self, record: StepRecord) -> list[tuple[int, str]]:
        """(rank, text) of all there is to say of a step, in the order to say it; where room is
        short, what has the highest ranks is left out.
        """
        done = record.step - self.first_step
        elapsed = time.monotonic() - self._began
        eta = elapsed / max(done, 1) * (self.num_steps - record.step)
        smoothed = self._smoothed / self._smoothed_weight if self._smoothed_weight else math.nan
        return [
            (0, f"step {record.step}/{self.num_steps}"),
            (7, f"epoch {record.epoch:.2f}"),
            (1, f"loss {record.loss:.4f}"),
            (6, f"(smoothed {smoothed:.4f})"),
            *((9, f"{_named(name)} {value:.4g}") for name, value in record.metrics.items()),
            (3, f"lr {record.lr:.2e}"),
            (8, f"grad {record.grad_norm:.3f}"),
            (2, f"{record.tokens_per_second:.0f} tok/s"),
            (10, f"{record.trained_tokens}/{record.tokens} trained"),
            (4, f"{record.memory_bytes / GIB:.2f} GiB"),
            (5, f"ETA {_clock(eta)}"),
        ]

    def _write(self, values: dict[str, Any]) -> None:
        if self._metrics is None:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._pending += json.dumps(self._redactor.value(finite)).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """Have the disk hold every line, before it holds a checkpoint: what is resumed from there
        does not do these steps again, so a power cut would take their lines for good.
        """
        if self._file is not None:
            self._flush(is_synced=True)

    def _flush(self, is_synced: bool = False) -> None:
        """Write what is pending, as far as the disk takes it."""
        assert self._file is not None and self._metrics is not None, "used outside its context"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            if is_synced:
                os.fsync(self._file.fileno())
        except OSError as error:
            if not self._is_behind:
                self.notice(f"WARNING: {self._metrics.name} falls behind: {error.strerror}")
            self._is_behind = True
        else:
            self._is_behind = False


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


def _lines_until(metrics: Path, last_step: int, with_eval: bool) -> bytes:
    """The lines up to a step, with its evaluation or without; a killed process may have cut the
    last one.
    """
    if last_step == 0 or not metrics.is_file():
        return b""
    lines = []
    for line in metrics.read_bytes().splitlines(keepends=True):
        try:
            told = json.loads(line)
            is_last_eval = told["step"] == last_step and told.get("event") == "eval"
            if told["step"] > last_step or (is_last_eval and not with_eval):
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(line)
    return b"".join(lines)


def _lines_after(kept: bytes, before: Done) -> list[dict[str, Any]]:
    """What a checkpoint knows of the steps and evaluations after the last line that is kept."""
    told = json.loads(kept.splitlines()[-1]) if kept else {"step": 0}
    last = told["step"], told.get("event") == "eval"
    lines, eval_losses = list[dict[str, Any]](), before.eval_losses_by_step
    for step, loss in enumerate(before.losses, start=1):
        if (step, False) > last:
            lines.append({"event": "step", "step": step, "loss": loss})
        if step in eval_losses and (step, True) > last:
            lines.append({"event": "eval", "step": step, "eval_loss": eval_losses[step]})
    return lines


def _one_line(text: str) -> str:
    """On one line, control characters escaped, cut to a screenful."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"{shown[:SHOWN_CHARACTERS]}..." if len(shown) > SHOWN_CHARACTERS else shown


def fitted(pieces: Sequence[tuple[int, str]], width: int, most_lines: int = 2) -> str:
    """As many pieces as fit into some lines, those of the lowest ranks, in their order."""
    lines: list[str] = []
    for most in sorted({rank for rank, _ in pieces}, reverse=True):
        lines = []
        for text in (text for rank, text in pieces if rank <= most):
            if lines and len(lines[-1]) + 2 + len(text) <= width:
                lines[-1] += f"  {text}"
            else:
                lines.append(text)
        if len(lines) <= most_lines:
            break
    return "\n".join(lines[:most_lines])


def _named(metric: str) -> str:
    return metric.replace("_", " ")


def _shown(metrics: dict[str, float]) -> str:
    return "".join(f"  {_named(name)} {value:.4g}" for name, value in metrics.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
