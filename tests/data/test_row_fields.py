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


# -- marks of messages -----------------------------------------------------------------------------

SAID = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def marked(**mark):
    """A talk in both spellings, whose first answer has the mark."""
    names = {"user": "human", "assistant": "gpt"}
    messages = [{"role": role, "content": text} for role, text in SAID]
    turns = [{"from": names[role], "value": text} for role, text in SAID]
    messages[1].update(mark)
    turns[1].update(mark)
    return [{"messages": messages}, {"conversations": turns}]


@pytest.mark.parametrize(
    ("mark", "is_trained"),
    [
        ({"train": False}, False),
        ({"train": False, "weight": None}, False),
        ({"train": None, "weight": 0.0}, False),
        ({"train": False, "weight": 0}, False),
        ({"train": True}, True),
        ({"train": True, "weight": 1}, True),
        ({"train": None, "weight": 1.0}, True),
    ],
)
def test_train_is_honoured_as_weight_is(mark, is_trained):
    """Axolotl's mark was left out, and what it took out was trained."""
    tokenizer = fake("llama")
    rows, num_by_prefixes, _ = encoded(tokenizer, marked(**mark) * 5)
    expected = ["b<|end|>"] * is_trained + ["d<|end|>"]
    assert [spans(example, tokenizer) for (example,) in rows] == [expected] * 10
    assert num_by_prefixes == 2  # a mark is no reason to learn no frame
    unmarked, _, _ = encoded(tokenizer, marked(), train_on="last")
    assert encoded(tokenizer, marked(**mark), train_on="last")[0] == unmarked


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ({"weight": 0.5}, r"\.weight: expected 1 \(trained\) or 0 .*got 0\.5"),
        ({"weight": 2}, r"\.weight: .*got 2"),
        ({"weight": "0"}, r"\.weight: .*got '0'"),
        ({"weight": False}, r"\.weight: .*got False"),
        ({"weight": [0]}, r"\.weight: .*got \[0\]"),
        ({"train": 0}, r"\.train: expected true or false, got 0"),
        ({"train": "no"}, r"\.train: expected true or false, got 'no'"),
        ({"train": True, "weight": 0}, r": weight 0 and train true disagree"),
        ({"train": False, "weight": 1}, r": weight 1 and train false disagree"),
    ],
)
def test_a_mark_that_means_nothing_is_refused_with_its_place(mark, said):
    for row, field in zip(marked(**mark), ("messages", "conversations"), strict=True):
        with pytest.raises(DataError, match=rf"^data\[0\]: {field}\[1\]{said}"):
            read_row(row, "data[0]", True)


@pytest.mark.parametrize("role", ["system", "user", "tool", "narrator"])
def test_a_mark_that_would_train_another_role_than_assistant_is_refused(role):
    said = rf"\.train: true on a message of role '{role}'; .*train_on='everything' trains all\)"
    row = {"messages": [{"role": role, "content": "a", "train": True}, *marked()[0]["messages"]]}
    with pytest.raises(DataError, match=rf"^data\[0\]: messages\[0\]{said}"):
        read_row(row, "data[0]", True)
    turn = {"from": role, "value": "a", "train": True}
    if role != "narrator":  # which that format does not know at all
        with pytest.raises(DataError, match=rf"^data\[0\]: conversations\[0\]{said}"):
            read_row({"conversations": [turn]}, "data[0]", True)


@pytest.mark.parametrize("mark", [{"train": False}, {"train": None}, {"weight": 1}, {"weight": 0}])
def test_a_mark_that_asks_nothing_new_of_another_role_changes_nothing(mark):
    tokenizer = fake("llama")
    rows = marked()
    for row in rows:
        for turn in next(iter(row.values()))[::2]:
            turn.update(mark)
    assert encoded(tokenizer, rows)[0] == encoded(tokenizer, marked())[0]


# -- columns ---------------------------------------------------------------------------------------


def test_an_empty_mapping_of_columns_is_none():
    """It left every column out."""
    with_none, with_empty = (
        load_data([{"text": "a"}], FakeTokenizer(), 99, columns=columns) for columns in (None, {})
    )
    assert with_none.fingerprint == with_empty.fingerprint
