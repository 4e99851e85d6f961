"""Files of results, read back to be joined: what a table needs is looked for before any is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import KINDS, Results, Row

# Kind -> numbers that its tables show, or compare, of a row that did not fail.
FIGURES = {
    "train": (
        *("ms", "ms_p95", "tokens_per_s", "trained_tokens_per_s", "mfu", "peak_gib"),
        *("reserved_gib", "load_s", "first_step_s", "first_loss", "gradient_norm"),
    ),
    "startup": ("load_s", "first_step_s", "second_step_s"),
    "kernels": ("us", "error_vs_fp32", "of_ceiling"),
}
# One of them as well.
RATES = {"kernels": ("tb_s", "tflops")}
RUN_KEYS = {"command": str, "ceilings": dict, "versions": dict}


class UnreadableResults(ValueError):
    """A file that is none of results, or lacks something."""


def read_results(path: Path) -> Results:
    """What `benchmarks.run` wrote. Raises UnreadableResults, in one line that names the file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableResults(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableResults(f"{path} is no JSON: {error}") from error
    why = _fault(results)
    if why is not None:
        raise UnreadableResults(f"{path} holds no results of benchmarks.run: {why}")
    return dict(results)


def _fault(results: Any) -> str | None:
    """What is wrong, if anything is."""
    if not isinstance(results, dict):
        return f"a {type(results).__name__} instead of an object"
    if not isinstance(results.get("gpu"), str):
        return "no name under 'gpu'"
    for kind in ("runs", *KINDS):
        # Files from before there were start-ups have no rows of them.
        rows = results.get(kind, None if kind == "runs" else [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return f"no list of objects under {kind!r}"
        for number, row in enumerate(rows, 1):
            why = _fault_of_run(row) if kind == "runs" else _fault_of_row(kind, row)
            if why is not None:
                return f"{kind}, {number}: {why}"
    return None


def _fault_of_run(run: Row) -> str | None:
    for key, type_ in RUN_KEYS.items():
        if not isinstance(run.get(key), type_):
            return f"no {key!r}"
    bad = [name for name, rate in run["ceilings"].items() if not _is_number(rate)]
    return f"{bad[0]!r} is no number" if bad else None


def _fault_of_row(kind: str, row: Row) -> str | None:
    keys, _ = KINDS[kind]
    # Keys tell rows apart, so a list cannot be one.
    lacking = [key for key in ("who", *keys) if isinstance(row.get(key, []), list | dict)]
    if not isinstance(row.get("who"), str):
        lacking.append("who")
    if "failed" not in row:
        lacking += [name for name in FIGURES[kind] if not _is_number(row.get(name))]
        rates = RATES.get(kind, ())
        if rates and not any(_is_number(row.get(name)) for name in rates):
            lacking.append(" or ".join(rates))
        rounds = row.get("rounds", [])
        if not isinstance(rounds, list) or not all(map(_is_number, rounds)):
            return "'rounds' is no list of numbers"
    elif not isinstance(row["failed"], str):
        return "'failed' is no text"
    return f"no {', '.join(dict.fromkeys(lacking))}" if lacking else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
