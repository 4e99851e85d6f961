"""The README's tables of speeds, made from the results that the benchmarks wrote.

    python -m tools.speed_table            # print them
    python -m tools.speed_table --write    # put them into README.md, between their markers

The first has the rows of Llama-3.1-8B with LoRA r=16 in `benchmarks/results/h100.json`: every
setting of sloth, with Unsloth's and Hugging Face's on the same tokens beside it. The second has the
other models.
"""

from __future__ import annotations

import json
from typing import Any

from tools.readme import README, between, command

RESULTS = README.parent / "benchmarks" / "results" / "h100.json"
BEGIN = "<!-- speeds: python -m tools.speed_table --write -->"
END = "<!-- end of speeds -->"
BEGIN_OTHERS = "<!-- other models: python -m tools.speed_table --write -->"
END_OTHERS = "<!-- end of other models -->"
COMMAND = "python -m tools.speed_table --write"
MODEL, RANK = "llama-3.1-8b", 16
PEERS = ("unsloth", "unsloth-best", "hf-checkpoint")

Row = dict[str, Any]


def _case(row: Row) -> tuple[Any, ...]:
    return row["dtype"], row["batch"], row["length"], row["packed"]


def _figures(row: Row | None) -> list[str]:
    """Tokens a second and GiB, as the table shows them."""
    if row is None:
        return ["", ""]
    is_recorded = "launches recorded" in row["setting"]
    gib = row["reserved_gib"] if is_recorded else row["peak_gib"]
    return [f"{row['tokens_per_s']:,.0f}", f"{gib:.1f}"]


def _setting(who: str, dtype: str) -> str:
    base = "bf16 base" if dtype == "bf16" else "NF4"
    variant = {"sloth-fp8": '`base_compute="fp8"`', "sloth-dora": "DoRA"}.get(who)
    if variant:
        return f"{base}, {variant}"
    _, _, cap = who.partition("@")
    return f"{base}, within {cap} GiB" if cap else base


def table() -> str:
    """Markdown: tokens a second of sloth and of its peers, and GiB handed out at most; reserved
    ones where launches are recorded, whose tensors lie in memory that is never handed out."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [r for r in results["train"] if (r["model"], r["rank"]) == (MODEL, RANK)]
    rows = [row for row in rows if "failed" not in row]
    lines = [
        "| tokens | | sloth | GiB | Unsloth's default | GiB | without checkpointing | GiB "
        "| Hugging Face | GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in dict.fromkeys(map(_case, rows)):
        same = [row for row in rows if _case(row) == case]
        peers = {row["who"]: row for row in same if row["who"] in PEERS}
        dtype, batch, length, packed = case
        shape = f"{batch}x{length}" + " packed" * packed
        for row in same:
            if row["who"].startswith("sloth"):
                beside = [figure for name in PEERS for figure in _figures(peers.get(name))]
                cells = [shape, _setting(row["who"], dtype), *_figures(row), *beside]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def others() -> str:
    """Markdown: the other models in NF4, with memory to spare and within what Unsloth takes."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = {(r["model"], r["batch"], r["length"], r["who"]): r for r in results["train"]}
    lines = [
        "| model | tokens | | sloth | GiB | Unsloth's default | GiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for (model, batch, length, who), row in found.items():
        if not who.startswith("sloth") or model == MODEL or row["dtype"] != "nf4":
            continue
        peer = found.get((model, batch, length, PEERS[0]))
        beside = ["fails to compile", ""] if peer and "failed" in peer else _figures(peer)
        cells = [model, f"{batch}x{length}", _setting(who, "nf4"), *_figures(row), *beside]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def both() -> str:
    """The two tables, one under the other."""
    return f"{table()}\n\n{others()}"


def rewritten(readme: str) -> str:
    """The README's text with the tables as they are now."""
    readme = between(readme, BEGIN, END, table())
    return between(readme, BEGIN_OTHERS, END_OTHERS, others())


if __name__ == "__main__":
    command(__doc__ or "", both, rewritten)
