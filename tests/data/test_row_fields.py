"""Fields beside a row's texts: earlier turns, and marks that say which messages are trained."""

from __future__ import annotations

import json

import pytest

from sloth.data.dataset import load_data
from sloth.data.rows import Chat, Completion, read_row
from sloth.errors import DataError, TokenizerMissing
from tests.data.test_masks import chat, encoded, fake, spans
from tests.train.fakes import FakeTokenizer

ALPACA = {"instruction": "ask", "input": "this", "output": "yes"}
HISTORY = [["q1", "a1"], ["q2", "a2"]]


# -- Alpaca's history ------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
def test_alpaca_history_comes_before_the_instruction(history):
    """It was left out without a word."""
    row = {**ALPACA, "history": history, "system": "be kind"}
    kind, content = read_row(row, "data[0]", has_template=True)
    talk = chat("q1", "a1", "q2", "a2", "ask\n\nthis", "yes", system="be kind")["messages"]
    assert (kind, content) == ("alpaca", Chat(talk, first_trained=2))


def test_answers_of_alpaca_history_are_trained_as_those_of_messages():
    row = {**ALPACA, "input": "", "history": HISTORY}
    talk = chat("q1", "a1", "q2", "a2", "ask", "yes")
    for train_on, trained in (
        ("assistant", ["a1<|end|>", "a2<|end|>", "yes<|end|>"]),
        ("last", ["yes<|end|>"]),
    ):
        ((example,), (same,)), _, _ = encoded(fake("llama"), [row, talk], train_on=train_on)
        assert spans(example, fake("llama")) == trained and example == same
    columns = {"instruction": "i", "output": "o", "history": "h"}
    rows = [{"i": "ask", "o": "yes", "h": HISTORY}, {"i": "ask", "o": "yes"}]
    data = load_data(rows, FakeTokenizer(), 999, columns=columns)
    assert data.counts.turns == 4 and data.counts.kinds == {"alpaca": 2}


@pytest.mark.parametrize("history", [None, [], "", " ", "[]"])
def test_alpaca_without_earlier_turns_is_what_it_was(history):
    row = {**ALPACA, "history": history}
    assert read_row(row, "", True) == read_row(ALPACA, "", True)
    assert read_row(row, "", False)[1] == Completion("ask\n\nthis\n\n", "yes")


def test_earlier_turns_need_a_chat_template():
    tokenizer = FakeTokenizer()
    tokenizer.chat = None
    with pytest.raises(TokenizerMissing, match=r"data\[0\] holds chat messages"):
        load_data([{**ALPACA, "history": HISTORY}], tokenizer, 99)
    with pytest.raises(DataError, match=r"data\[0\]: a row of .* no place for 'history'"):
        read_row({"prompt": "ask", "completion": "yes", "history": HISTORY}, "data[0]", True)
    assert read_row({"prompt": "a", "completion": "b", "history": "of ill health"}, "", True)


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ("of ill health", "history: expected a list .*got a text; where the column is something"),
        ("[[1", "history: expected JSON"),
        ({"q1": "a1"}, r"history: expected a list of earlier turns.*got an object; where the col"),
        ([["q1", "a1"], "q2"], r"history\[1\]: expected a list .*got a text"),
        ([["q1"]], r"history\[0\]: expected a list .*got 1 items"),
        ([["q1", None]], r"history\[0\]: expected a text, got null"),
    ],
)
def test_a_malformed_history_is_refused_with_its_place(history, said):
    with pytest.raises(DataError, match=rf"^data\[0\]: {said}"):
        read_row({**ALPACA, "history": history}, "data[0]", True)
