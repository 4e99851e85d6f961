"""The loss curve as a picture: loss.svg written by hand, loss.png where matplotlib is installed;
and as a line of text.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 30, 45
_TRAIN, _EVAL, _GRID, _INK = "#3465a4", "#cc4400", "#dddddd", "#333333"

# One-eighth block to full block; and what a terminal without them can show.
BLOCKS, ASCII_BLOCKS = "".join(map(chr, range(0x2581, 0x2589))), "_.-=+*#@"

Curve = Sequence[tuple[float, float]]


def plot_losses(
    folder: Path,
    losses: Sequence[float],
    eval_losses: Mapping[int, float],
    notice: Callable[[str], None] = warnings.warn,
) -> dict[str, Path]:
    """Write the pictures and return their paths by the report's names, loss_svg and loss_png.

    losses[i] belongs to step i + 1. Steps whose loss is not finite leave a gap. A picture that
    fails is left out and a notice, whatever the reason: it is none to fail.
    """
    train, held_out = list(enumerate(losses, start=1)), sorted(eval_losses.items())
    drawn = {"loss_svg": _write_svg}
    if importlib.util.find_spec("matplotlib") is not None:
        drawn["loss_png"] = _write_png
    paths = {}
    for name, draw in drawn.items():
        path = folder / name.replace("_", ".")
        try:
            draw(path, train, held_out)
            paths[name] = path
        except Exception as error:
            notice(f"WARNING: {path} could not be drawn: {type(error).__name__}: {error}")
    return paths


def sparkline(
    values: Sequence[float],
    width: int,
    blocks: str = BLOCKS,
    bounds: tuple[float, float] | None = None,
) -> str:
    """At most `width` characters, each the mean of its share of the values, lowest to highest as
    the first to the last of `blocks`. A share without a finite value is a space.

    bounds: lowest and highest, for curves to be compared; else those of the means.
    """
    width = min(width, len(values))
    edges = [len(values) * place // width for place in range(width + 1)] if width else []
    shares = [
        [value for value in values[start:end] if math.isfinite(value)]
        for start, end in pairwise(edges)
    ]
    means = [math.fsum(share) / len(share) if share else None for share in shares]
    known = [mean for mean in means if mean is not None]
    low, high = bounds or ((min(known), max(known)) if known else (0.0, 0.0))
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else blocks[round((mean - low) * scale)] for mean in means)


def loss_svg(train: Curve, held_out: Curve) -> str:
    """An SVG document of both curves with axes, ticks and a legend."""
    points = [(x, y) for x, y in (*train, *held_out) if math.isfinite(y)]
    x_low, x_high = _span([x for x, _ in points])
    y_low, y_high = _span([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 2),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 2),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in _ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(
            f'<line x1="{_LEFT}" y1="{y}" x2="{WIDTH - _RIGHT}" y2="{y}" stroke="{_GRID}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'
        )
    for value in _ticks(x_low, x_high):
        x, _ = place(value, y_low)
        base = HEIGHT - _BOTTOM
        parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle">{value:.4g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    for curve, color, name, offset in ((train, _TRAIN, "train", 0), (held_out, _EVAL, "eval", 70)):
        if not curve:
            continue
        parts += _polylines(curve, color, place)
        parts.append(
            f'<text x="{_LEFT + offset}" y="{_TOP - 10}" fill="{color}">{name} loss</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _polylines(curve: Curve, color: str, place: object) -> list[str]:
    """One polyline per run of finite values, and a dot for a run of one."""
    assert callable(place)
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in curve:
        if math.isfinite(y):
            runs[-1].append(place(x, y))
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in filter(None, runs):
        points = " ".join(f"{x},{y}" for x, y in run)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>'
            if len(run) > 1
            else f'<circle cx="{run[0][0]}" cy="{run[0][1]}" r="3" fill="{color}"/>'
        )
    return parts


def _span(values: list[float]) -> tuple[float, float]:
    """Lowest and highest, apart even when there is one value or none."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _write_svg(path: Path, train: Curve, held_out: Curve) -> None:
    path.write_text(loss_svg(train, held_out), encoding="utf-8")


def _write_png(path: Path, train: Curve, held_out: Curve) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0))
    axes = figure.add_subplot()
    for curve, color, name in ((train, _TRAIN, "train"), (held_out, _EVAL, "eval")):
        if curve:
            marker = "o" if len(curve) == 1 else None
            axes.plot(*zip(*curve, strict=True), color=color, label=f"{name} loss", marker=marker)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
