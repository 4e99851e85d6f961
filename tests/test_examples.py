"""The demo's data are what its tool generates, and its held-out rows are really held out."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDERS = ROOT / "examples" / "orders"


def module_at(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = module_at(ROOT / "tools" / "make_orders.py")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ORDERS / name).read_text().splitlines()]


def record_of(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["messages"][-1]["content"])


def order_of(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def pattern_of(row: dict[str, Any]) -> str:
    """The order with everything that varies inside a wording taken out."""
    text, record = f" {order_of(row)} ".lower(), record_of(row)
    number = record["quantity"]
    for value in (record["name"], record["city"], record["due"], record["colour"]):
        if value is not None:
            text = text.replace(value.lower(), "_")
    for word in (tool.ITEMS[record["item"]], record["item"]):
        text = text.replace(word, "_")
    for word in (tool.NUMBERS[number - 1], str(number)):
        text = text.replace(f" {word} ", " _ ").replace(f"\n{word} ", "_ ")
    for phrase in (*tool.TRAIN_DUES, *tool.HELD_OUT_DUES):
        text = text.replace(phrase.format("_"), "")
    return text.replace("_ _", "_").replace("_ _", "_").strip()


TRAIN, HELD_OUT = rows_of("train.jsonl"), rows_of("heldout.jsonl")


def test_files_equal_what_the_tool_generates() -> None:
    for name, text in tool.files().items():
        assert (ORDERS / name).read_text() == text, f"run `python tools/make_orders.py` for {name}"


def test_counts_and_no_order_twice() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (1000, 100)
    orders = [order_of(row) for row in (*TRAIN, *HELD_OUT)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "heldout"])
def test_every_answer_is_the_compact_json_of_its_order(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        answer, record, order = row["messages"][-1]["content"], record_of(row), order_of(row)
        assert tuple(record) == tool.KEYS
        assert json.dumps(record, separators=(",", ":")) == answer
        for key in ("name", "city"):
            assert record[key] in order
        number = record["quantity"]
        words = {str(number), tool.NUMBERS[number - 1]}
        assert words & set(order.lower().replace(".", " ").split())
        noun = record["item"] if number == 1 else tool.ITEMS[record["item"]]
        assert noun in order
        said = [word for word in tool.COLOURS if f" {word} " in order]
        assert said == ([record["colour"]] if record["colour"] else [])
        days = [day for day in tool.DAYS if day in order]
        assert days == ([record["due"]] if record["due"] else [])


@pytest.mark.parametrize("key", ["name", "city"])
def test_held_out_values_were_never_seen_in_training(key: str) -> None:
    seen = " ".join(order_of(row) for row in TRAIN)
    for value in {record_of(row)[key] for row in HELD_OUT}:
        assert value not in seen


def test_held_out_wordings_were_never_seen_in_training() -> None:
    train, held_out = ({pattern_of(row) for row in rows} for rows in (TRAIN, HELD_OUT))
    assert len(train) < 60, "pattern_of leaves varying words in, so it would miss a shared wording"
    assert len(held_out) <= 20
    assert not train & held_out


def test_goods_colours_and_days_of_held_out_rows_are_known() -> None:
    for key in ("item", "colour", "due", "quantity"):
        assert {record_of(row)[key] for row in HELD_OUT} <= {record_of(row)[key] for row in TRAIN}


def test_demo_finds_its_data_and_scores_exactly() -> None:
    demo = module_at(ROOT / "examples" / "orders.py")
    rows = demo.read_rows(demo.DATA / "heldout.jsonl")
    right = [row[-1]["content"] for row in rows]
    assert demo.exact_match(right, rows) == 100
    assert demo.exact_match([text.replace(":", ": ") for text in right], rows) == 0
    assert len(demo.sparkline([3.0, 2.0, 1.0])) == 3


def test_demo_fails_on_a_missed_bar_and_on_a_reload_that_differs() -> None:
    demo = module_at(ROOT / "examples" / "orders.py")
    good = demo.Agreement("merged", error=0.0, limit=1.0, equal_answers=1.0, least_equal=1.0)
    assert demo.verdict(0, 100, [good], bar=True) == 0
    assert demo.verdict(0, 10, [good], bar=True) == 1
    assert demo.verdict(50, 100, [good], bar=True) == 1
    assert demo.verdict(0, 10, [good], bar=False) == 0
    for bad in ({"error": 2.0}, {"error": float("nan")}, {"equal_answers": 0.9}):
        assert demo.verdict(0, 100, [replace(good, **bad)], bar=False) == 1
