"""Rows from Python, with what other libraries put into them."""

from __future__ import annotations

import pytest

from sloth.data.dataset import load_data
from sloth.data.sources import open_rows
from tests.data.test_masks import chat
from tests.train.fakes import FakeTokenizer

MESSAGES = chat("ask", "no", "ask", "yes")["messages"]


def test_tuples_are_lists_wherever_lists_are_read():
    pair = {"prompt": tuple(MESSAGES[:1]), "completion": tuple(MESSAGES[1:])}
    history = {"instruction": "ask", "output": "yes", "history": (("ask", "no"),)}
    rows = ({"messages": tuple(MESSAGES)}, {"messages": MESSAGES}, pair, history)
    data = load_data(rows, FakeTokenizer(), 999)
    assert data.counts.kinds == {"messages": 2, "prompt/completion": 1, "alpaca": 1}
    assert all(example == data.examples[0] for example in data.examples)
    pair = {"prompt": "ask", "chosen": tuple(MESSAGES[1:2]), "rejected": tuple(MESSAGES[3:])}
    assert load_data([pair], FakeTokenizer(), 999, pairs=True).counts.turns == 2


def test_arrays_and_scalars_of_numpy_are_lists_and_numbers():
    """As `.to_dict("records")` of a DataFrame from Parquet gives them, or a data set's numpy
    format.
    """
    numpy = pytest.importorskip("numpy")
    marked = [{**m, "weight": numpy.int64(i != 1)} for i, m in enumerate(MESSAGES)]
    rows = [
        {"messages": numpy.array(MESSAGES, dtype=object), "id": numpy.longdouble(1)},
        {"messages": numpy.array(marked, dtype=object), "tools": numpy.array([], dtype=object)},
        {"text": numpy.array("ask"), "messages": float("nan"), "tools": numpy.float64("nan")},
        {"text": numpy.str_("ask"), "id": numpy.arange(6).reshape(2, 3)},
        numpy.str_("ask"),
    ]
    data = load_data(rows, FakeTokenizer(), 999)
    assert data.counts.kinds == {"messages": 2, "text": 3}
    assert data.counts.turns == 3
    assert data.examples[2] == data.examples[3] == data.examples[4]
    assert [row["id"] for _, row in open_rows(rows[3:4]).read()] == [[[0, 1, 2], [3, 4, 5]]]


def test_records_of_a_data_frame_are_its_rows():
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"messages": MESSAGES, "n": 1}, {"messages": MESSAGES}])
    frame = pandas.DataFrame(table.to_pandas())
    found = load_data(frame.to_dict("records"), FakeTokenizer(), 999)
    assert found.fingerprint == load_data(frame, FakeTokenizer(), 999).fingerprint
    assert found.counts.turns == 4
