"""`sloth runs`: what was trained here, and how two curves compare."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from sloth.commands.base import parse, show
from sloth.train.history import RunHistory, find_runs, mean
from sloth.train.plot import ASCII_BLOCKS, BLOCKS, sparkline
from sloth.train.run_folder import METRICS

WIDTH = 60
COMPARED_ROWS = 10


@dataclass(frozen=True)
class Runs:
    """List the runs in FOLDER, or compare the curves of two."""

    folder: tyro.conf.Positional[Path] = field(default=Path("runs"))
    """Where runs are; one that is a run itself is listed alone."""
    compare: tuple[str, str] | None = None
    """Two runs, by name in FOLDER or by path."""


def run(arguments: Sequence[str]) -> int:
    """List training runs, or compare the curves of two."""
    parsed = parse(Runs, "runs", arguments)
    if parsed.compare is not None:
        first, second = (_find(parsed.folder, name) for name in parsed.compare)
        show("\n".join(compared(first, second)))
        return 0
    runs = find_runs(parsed.folder)
    if not runs:
        raise ValueError(f"no runs in {parsed.folder} (folders with a {METRICS})")
    now = time.time()
    rows = [("run", "model", "steps", "last loss", "best loss", "status")]
    for held in runs:
        star = "" if held.eval_losses else " *"
        best = "-" if held.best is None else f"{held.best[1]:.4f} at {held.best[0]}{star}"
        last = "-" if held.last_loss is None else f"{held.last_loss:.4f}"
        rows.append((held.name, held.model, str(held.steps), last, best, held.status(now)))
    show("\n".join(_table(rows)))
    show("\nbest loss: the lowest on held-out rows; * of a step, where there are none")
    return 0


def compared(first: RunHistory, second: RunHistory) -> list[str]:
    """Settings that differ, mean losses of both by stretches of steps, and both curves."""
    lines = [f"A  {first.name}  {first.model}", f"B  {second.name}  {second.model}", ""]
    lines += [f"{name}: {a!r} | {b!r}" for name, (a, b) in first.differences(second).items()]
    common = min(first.steps, second.steps)
    rows: list[Sequence[str]] = [("steps", "A", "B", "B - A")]
    count = min(COMPARED_ROWS, common)
    for index in range(count):
        start, end = common * index // count + 1, common * (index + 1) // count
        means = [mean(run.stretch(start, end)) for run in (first, second)]
        rows.append((f"{start}-{end}", *map(_shown, means), _difference(means)))
    shared = sorted(first.eval_losses.keys() & second.eval_losses.keys())
    for step in shared:
        both = [run.eval_losses[step] for run in (first, second)]
        rows.append((f"held out, {step}", *map(_shown, both), _difference(both)))
    lines += ["", *_table(rows), ""]
    values = [run.stretch(1, run.steps) for run in (first, second)]
    finite = [loss for losses in values for loss in losses if loss == loss]
    blocks = BLOCKS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BLOCKS
    for letter, held, losses in zip("AB", (first, second), values, strict=True):
        width = max(1, round(WIDTH * held.steps / max(first.steps, second.steps, 1)))
        bounds = (min(finite), max(finite)) if finite else None
        lines.append(f"{letter}  {sparkline(losses, width, blocks, bounds)}")
    if finite:
        lines.append(f"   {min(finite):.4f} lowest, {max(finite):.4f} highest of both")
    return lines


def _find(folder: Path, name: str) -> RunHistory:
    for place in (folder / name, Path(name)):
        if (place / METRICS).is_file():
            return RunHistory.read(place)
    known = ", ".join(run.name for run in find_runs(folder)) or "none"
    raise ValueError(f"{name!r} is no run in {folder}, and no folder of one; there: {known}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _difference(values: Sequence[float | None]) -> str:
    a, b = values
    return "-" if a is None or b is None else f"{b - a:+.4f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
