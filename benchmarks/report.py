"""From rows to results: do the programs agree, rounds into one row, files into one, Markdown.

Rows are plain dictionaries, as they come from the measured processes. A train row has `who` and
`model` beside what `benchmarks.common.measure` prints, a kernel row what `benchmarks.cases` prints;
a row with `failed` says why there is no figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Results = dict[str, Any]

# Mean losses of one batch under one model: correct programs differ by their 16-bit rounding alone,
# at most 5e-4 so far; a batch shifted or masked by one token moves the mean by 1e-2.
LOSS_TOLERANCE = 3e-3
# Of products in 8 bits, an approximation by design: this share of the loss, more or less.
APPROXIMATE, APPROXIMATE_SHARE = "sloth-fp8", 0.005
# Norms of the first gradient: every program draws its own A, and the gradient of B scales with it.
GRADIENT_RATIO = 1.5
CASE_KEYS = ("model", "dtype", "rank", "batch", "length", "packed")
KERNEL_KEYS = ("model", "op", "num_tokens", "case")
STARTUP_KEYS = ("model", "source", "kernels", "batch", "length")
# Kinds of rows: what tells two of one kind apart, and the figure whose median counts.
KINDS = {
    "train": (CASE_KEYS, "ms"),
    "startup": (STARTUP_KEYS, "load_s"),
    "kernels": (KERNEL_KEYS, "us"),
}


class DifferentGPUs(ValueError):
    """Results of different kinds of GPU were to be joined."""


def case_of(row: Row) -> tuple[Any, ...]:
    """What two rows must share to stand in one table."""
    return tuple(row[key] for key in CASE_KEYS)


def disagreement(rows: Iterable[Row]) -> str | None:
    """Why the rows of one case do not describe the same training, or None."""
    ran = [row for row in rows if "failed" not in row]
    if not ran:
        return None
    losses = {row["who"]: row["first_loss"] for row in ran}
    norms = {row["who"]: row["gradient_norm"] for row in ran}
    if not all(norm > 0 for norm in norms.values()):
        return f"a gradient norm is not above zero: {norms}"
    if not all(math.isfinite(number) for number in (*losses.values(), *norms.values())):
        return f"a loss or gradient norm is not finite: {losses}, {norms}"
    exact = {who: loss for who, loss in losses.items() if not who.startswith(APPROXIMATE)}
    for who, loss in losses.items():
        far = [other for other in exact.values() if abs(loss / other - 1) > APPROXIMATE_SHARE]
        if who not in exact and far:
            return f"the first loss of {who} is further than {APPROXIMATE_SHARE:.1%} off: {losses}"
    spread = max(exact.values(), default=0.0) - min(exact.values(), default=0.0)
    if spread > LOSS_TOLERANCE:
        return f"first losses differ by {spread:.2g}, more than {LOSS_TOLERANCE}: {losses}"
    if max(norms.values()) > GRADIENT_RATIO * min(norms.values()):
        return f"first gradient norms differ by more than {GRADIENT_RATIO} times: {norms}"
    return None


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, both in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def median_rows(rows: Iterable[Row], keys: Sequence[str], figure: str) -> list[Row]:
    """One row per key: the one with the median `figure` of those that ran, else the last failure.

    A row that stands for several keeps all their figures under `rounds`.
    """
    chosen = []
    for group in grouped(rows, lambda row: tuple(row.get(key) for key in (*keys, "who"))).values():
        ran = sorted((row for row in group if "failed" not in row), key=lambda row: row[figure])
        if not ran:
            chosen.append(group[-1])
            continue
        figures = [value for row in ran for value in row.get("rounds", [row[figure]])]
        middle = ran[(len(ran) - 1) // 2]
        chosen.append(middle | ({"rounds": sorted(figures)} if len(figures) > 1 else {}))
    return chosen


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Training rows by case, the small ones of a model first: sloth's by the memory they may take,
    then its other settings, then the peers'."""
    models = list(dict.fromkeys(row["model"] for row in rows))

    def place(row: Row) -> tuple[Any, ...]:
        kind, _, cap = row["who"].partition("@")
        contender = not kind.startswith("sloth"), kind, -float(cap or "inf")
        shape = row["packed"], row["batch"] * row["length"], row["length"], row["rank"]
        return models.index(row["model"]), row["dtype"] == "bf16", *shape, *contender

    return sorted(rows, key=place)


def merge(parts: Sequence[Results]) -> Results:
    """Several runs on one kind of GPU as one; raises DifferentGPUs otherwise."""
    names = {part["gpu"] for part in parts}
    if len(names) != 1:
        raise DifferentGPUs(f"results of different GPUs cannot be joined: {sorted(names)}")
    merged: Results = {
        "gpu": parts[0]["gpu"],
        "runs": [run for part in parts for run in part["runs"]],
    }
    for kind, (keys, figure) in KINDS.items():
        rows = [row for part in parts for row in part.get(kind, [])]
        merged[kind] = median_rows(rows, keys, figure)
    merged["train"] = in_order(merged["train"])
    return merged


def slug(gpu: str) -> str:
    """A file name for a GPU: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.findall(r"[a-z0-9]+", gpu.lower().replace("nvidia", ""))
    return next((word for word in words if re.search(r"\d", word)), "-".join(words) or "gpu")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, columns after the first aligned right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render(results: Results) -> str:
    """The whole result file as Markdown."""
    parts = [f"# {results['gpu']}\n", _render_runs(results["runs"])]
    if results["train"]:
        parts.append("## Training steps\n")
        parts.append(
            "Same tokens and optimizer (fused AdamW), LoRA on all seven projections, dropout 0. In "
            f"every table first losses agree within {LOSS_TOLERANCE} ({APPROXIMATE}: "
            f"{APPROXIMATE_SHARE:.1%}) and gradient norms within {GRADIENT_RATIO} times. MFU: (4 N "
            "+ 3.5 attention) operations over the measured product rate, in bf16; the head counts "
            "for trained tokens. Peak: what was handed out at once; where launches are recorded, "
            "tensors lie in memory that is only reserved, and that column is the one to compare. "
            "Of several runs of one program the median stands here, of two the quicker.\n"
        )
        parts += [_render_case(rows) for rows in grouped(results["train"], case_of).values()]
    if results.get("startup"):
        parts.append("## Start-up\n")
        parts.append(
            "From `sloth.load` to the model on the device, in NF4, and the first step after it. "
            "Kernels: compiled before (warm), or all by this process (cold).\n"
        )
        parts.append(_render_startup(results["startup"]))
    if results["kernels"]:
        parts.append("## Kernels\n")
        parts.append(
            "Cold L2, median. Rate: bytes or operations that the mathematics needs over the time; "
            "share: of the measured copy or product. Error: against fp32, relative.\n"
        )
        by_op = grouped(results["kernels"], lambda row: (row["op"], row["model"]))
        parts += [_render_op(op, model, rows) for (op, model), rows in by_op.items()]
    return "\n".join(parts)


def _render_runs(runs: Sequence[dict[str, Any]]) -> str:
    names = sorted({name for run in runs for name in run["ceilings"]})
    rows = [
        (str(number), *(f"{run['ceilings'].get(name, float('nan')):,.2f}" for name in names))
        for number, run in enumerate(runs, 1)
    ]
    versions = grouped(runs, lambda run: str(run["versions"]))
    text = table(("run", *names), rows) + "\n"
    text += "".join(f"    {run['command']}\n" for run in runs) + "\n"
    for same in versions.values():
        text += ", ".join(f"{name} {v}" for name, v in same[0]["versions"].items()) + "\n"
    return text


def _render_case(rows: list[Row]) -> str:
    first = rows[0]
    shape = f"{first['batch']}x{first['length']}" + (" packed" if first["packed"] else "")
    text = f"### {first['model']}, {first['dtype']}, r={first['rank']}, {shape}\n\n"
    reason = disagreement(rows)
    if reason is not None:
        return text + f"No speeds: {reason}\n"
    header = ["", "tok/s", "trained tok/s", "ms p50", "ms p95", "MFU", "peak GiB", "reserved GiB"]
    header += ["host ms", "load s", "first step s", "first loss"]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["who"], f"failed: {_cell(row['failed'])}", *[""] * (len(header) - 2)])
            continue
        lines.append(
            [
                row["who"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['trained_tokens_per_s']:,.0f}",
                f"{row['ms']:,.1f}",
                f"{row['ms_p95']:,.1f}",
                f"{row['mfu']:.1%}",
                f"{row['peak_gib']:.2f}",
                f"{row['reserved_gib']:.2f}",
                f"{row['host_ms']:,.0f}" if "host_ms" in row else "-",
                f"{row['load_s']:.0f}",
                f"{row['first_step_s']:.1f}",
                f"{row['first_loss']:.4f}",
            ]
        )
    settings = [f"- {row['who']}: {row['setting']}\n" for row in rows if row.get("setting")]
    return text + table(header, lines) + "\n" + "".join(settings)


def _render_startup(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        what = [row["model"], f"{row['batch']}x{row['length']}", row["source"], row["kernels"]]
        if "failed" in row:
            lines.append([*what, f"failed: {_cell(row['failed'])}", "", ""])
            continue
        figures = (row[f"{name}_s"] for name in ("load", "first_step", "second_step"))
        lines.append([*what, *(f"{seconds:.1f}" for seconds in figures)])
    header = ("", "shape", "files", "kernels", "load s", "first step s", "second step s")
    return table(header, lines)


def _render_op(op: str, model: str, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["case"], row["who"], f"failed: {_cell(row['failed'])}", "", "", ""])
            continue
        rate = f"{row['tb_s']:.2f} TB/s" if "tb_s" in row else f"{row['tflops']:,.0f} TFLOP/s"
        error = f"{row['error_vs_fp32']:.1e}"
        share = f"{row['of_ceiling']:.0%}"
        lines.append([row["case"], row["who"], f"{row['us']:,.1f}", rate, share, error])
    return f"### {op}, {model}\n\n" + table(("case", "", "us", "rate", "share", "error"), lines)


def _cell(text: str) -> str:
    """Text that cannot end its table cell."""
    return text.replace("|", "/").replace("\n", " ")
