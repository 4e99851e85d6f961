"""Preference pairs: every spelling comes to the same two contents, masks lie on the answers, a
pair is kept whole or not at all, and its batches hold what the pairs hold one by one.
"""

from __future__ import annotations

import json

import pytest
import torch

from sloth import cli
from sloth.commands import data as data_command
from sloth.constants import IGNORE_INDEX
from sloth.data.batches import collate_pairs
from sloth.data.dataset import load_data
from sloth.data.examples import Example
from sloth.data.preference import read_pair
from sloth.data.rows import Chat, Completion
from sloth.data.show import describe_first_row
from sloth.errors import DataError
from sloth.train.config import TrainConfig
from sloth.train.trainer import Trainer
from tests.train.fakes import PAIRS, ROWS, FakeModel, FakeTokenizer, reasoning


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def load(rows, **settings):
    return load_data(
        rows, FakeTokenizer(), settings.pop("max_length", 2048), pairs=True, **settings
    )


ASK, YES, NO = user("ask"), assistant("yes"), assistant("no")
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": [ASK], "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": YES, "rejected": NO},
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO], "score_chosen": 3.0},
        {"prompt": "ask", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": "ask", "chosen": [YES], "rejected": [NO]},
        {"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])},
        {
            "prompt": [{"from": "human", "value": "ask"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
)
def test_every_spelling_of_a_chat_pair_is_the_same_two_chats(row):
    assert read_pair(row, "") == (Chat([ASK, YES], None, 1), Chat([ASK, NO], None, 1))
    opened = read_pair({**row, "system": "be kind", "tools": "[1]"}, "")
    assert opened == tuple(Chat([SYSTEM, ASK, said], [1], 2) for said in (YES, NO))


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "ask", "chosen": " yes", "rejected": " no"}, "ask", " yes", " no"),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, "", "yes", "no"),
        (
            {"chosen": "The sky is blue", "rejected": "The sky is black"},
            "The sky is",
            " blue",
            None,
        ),
        ({"chosen": "Q: x\nYes", "rejected": "Q: x\nNo"}, "Q: x\n", "Yes", "No"),
        ({"chosen": "a b", "rejected": "a b c"}, "a", " b", " b c"),
        (
            {"prompt": "ask", "chosen": "[{x}]", "rejected": "[{1: 2}]", "system": "be kind"},
            *("be kind\n\nask", "[{x}]", "[{1: 2}]"),
        ),
    ],
)
def test_texts_without_a_prompt_share_whole_words(row, prompt, chosen, rejected):
    expected = Completion(prompt, chosen), Completion(prompt, rejected or " black")
    assert read_pair(row, "") == expected


def test_what_a_conversation_shares_ends_before_the_last_answer():
    first, second = [ASK, YES, user("more"), YES], [ASK, YES, user("more"), NO]
    assert read_pair({"chosen": first, "rejected": second}, "")[1] == Chat(second, None, 3)
    same = read_pair({"chosen": first, "rejected": first}, "")
    assert same == (Chat(first, None, 3), Chat(first, None, 3))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, YES]}, "expected a preference pair .*got a messages row; objective='s"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": [NO]}, "rejected: expected a text, like chose"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen: expected a text or a list of mes"),
        ({"prompt": "a", "chosen": [], "rejected": [NO]}, "chosen: expected a non-empty list"),
        ({"chosen": [YES], "rejected": [NO]}, "do not begin with the same first message"),
        ({"chosen": "yes", "rejected": "no"}, "do not begin with the same word"),
        (
            {"question": "ask", "chosen": "The yes", "rejected": "The no"},
            'the column \'question\' may be it; perhaps columns={"prompt": "question"',
        ),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, r"prompt\[0\].content"),
    ],
)
def test_what_is_no_pair_says_where_and_what_was_expected(row, said):
    with pytest.raises(DataError, match=rf"^data\[3\].*{said}"):
        read_pair(row, "data[3]")


def test_a_bad_row_of_a_file_is_named_by_its_line_or_left_out(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, {"chosen": 1}]))
    with pytest.raises(DataError, match=rf"pairs\.jsonl:{len(PAIRS) + 1}: field 'rejected'"):
        load(file)
    data = load(file, skip_bad=True)
    assert (data.num_rows, data.counts.malformed) == (len(PAIRS), 1)


# -- masks ---------------------------------------------------------------------------------------


def test_masks_lie_on_the_answers_alone():
    rows = [
        {"prompt": [ASK, YES, user("more")], "chosen": "so", "rejected": "not"},
        {"prompt": "ask", "chosen": " yes", "rejected": " no"},
    ]
    data, tokenizer = load(rows), FakeTokenizer()
    trained = [
        tokenizer.decode(
            [t for t in example.labels if t != IGNORE_INDEX], skip_special_tokens=False
        )
        for example in data.examples
    ]
    assert trained == ["so<|end|>", "not<|end|>", " yes</s>", " no</s>"]
    assert data.counts.kinds == {"preference": 2} and data.counts.turns == 2
    assert [example.num_trained for example in data.examples] == [3, 4, 5, 4]
    said = describe_first_row(data, tokenizer).plain
    assert said.startswith("chosen:\n<s><|start|>user\nask<|end|>")
    assert "[+so<|end|>+]\n\nrejected:\n" in said and "[+not<|end|>+]" in said


def test_an_answer_without_one_rendering_is_refused():
    answer = [assistant("b", thought="hm"), user("c"), assistant("d", thought="so")]
    row = {"prompt": [ASK], "chosen": answer, "rejected": [NO]}
    with pytest.raises(DataError, match="an answer of several turns has no one rendering"):
        load_data([row], FakeTokenizer(reasoning), 99, pairs=True)


# -- what is kept --------------------------------------------------------------------------------


def test_a_pair_is_kept_whole_or_not_at_all():
    rows = [
        {"prompt": "ask", "chosen": "yes", "rejected": "no"},
        {"prompt": "ask", "chosen": "y" * 30, "rejected": "no"},
        {"prompt": "a" * 30, "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [user("what?")]},
    ]
    data = load(rows, max_length=25)
    counts = data.counts
    assert (data.num_rows, counts.rows, counts.truncated) == (2, 4, 4)
    assert [len(example.tokens) for example in data.examples] == [8, 7, 25, 7]
    assert (counts.dropped_by_truncation, counts.dropped_by_mask) == (2, 1)
    assert counts.dropped_with_other == 1 and counts.examples + counts.dropped == 8
    dropped = load(rows, max_length=25, on_long="drop")
    assert dropped.num_rows == 1 and dropped.counts.dropped_with_other == 1
    with pytest.raises(DataError, match=r"data\[1\] has 35 tokens, more than max_length=25"):
        load(rows, max_length=25, on_long="error")


def test_pairs_with_the_same_answer_twice_are_told_of():
    counts = load([*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}]).counts
    assert counts.same_answers == 1
    assert "1 pairs have the same answer twice, which prefers nothing" in counts.warnings()


def test_prepared_pairs_are_found_again_and_never_taken_for_other_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sloth.data.dataset.MIN_CACHED_BYTES", 0)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    said: list[str] = []
    first, again = load(file), load(file, notice=said.append)
    assert "prepared examples from" in said[0]
    assert again.examples == first.examples and again.counts == first.counts
    with pytest.raises(DataError, match="preference pair"):
        load_data(file, FakeTokenizer(), 2048)


# -- batches -------------------------------------------------------------------------------------


def pair(tokens, answer):
    return Example(tokens, [IGNORE_INDEX] * (len(tokens) - answer) + tokens[len(tokens) - answer :])


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_batch_holds_what_its_pairs_hold(padding_free):
    pairs = [
        (pair([1, 2, 3, 4], 2), pair([1, 2, 5], 1)),
        (pair([6, 7], 1), pair([6, 8, 9, 9, 9], 4)),
    ]
    batch = collate_pairs(pairs, 0, padding_free)
    assert batch.tokens.shape == ((1, 14) if padding_free else (4, 5))
    assert batch.lengths == (4, 2, 3, 5) and batch.answers == (2, 1, 1, 4)
    assert (batch.num_pairs, batch.num_chosen, batch.num_tokens) == (2, 4, 14)
    values = batch.tokens[:, 1:].float()
    if batch.positions is not None:
        values = values.masked_fill(batch.positions[:, 1:] == 0, 0.0)
    assert batch.sums(values).tolist() == [9.0, 7.0, 7.0, 35.0]
    kept = batch.chosen_labels()
    full = [label for label in kept.flatten().tolist() if label != IGNORE_INDEX]
    assert full == [1, 2, 3, 4, 6, 7, 5, 8, 9, 9, 9]
    assert torch.equal(kept[kept != IGNORE_INDEX], batch.tokens[kept != IGNORE_INDEX])


# -- what a person sees ----------------------------------------------------------------------------


def test_data_check_shows_pairs_and_refuses_what_training_would(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        data_command, "_read_model", lambda *rest: (FakeTokenizer(), 10**6, *2 * [None])
    )
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, PAIRS[0]]))
    command = ["data", "check", str(file), "--model", "m"]
    assert cli.main([*command, "--objective", "dpo"]) == 0
    said = capsys.readouterr().out
    for line in (
        "format            preference (10 rows)",
        "examples          20, longest",
        "duplicates        1 pairs (10.0%)",
        "rows              10, a pair of examples each;",
        "pairs             10; 0 examples dropped with their other half; 0 pairs have the same",
        "chosen:\n<s><|start|>user",
        "rejected:\n<s><|start|>user",
    ):
        assert line in said, line
    assert cli.main(command) == 2
    assert "objective='dpo' or 'orpo' trains on" in capsys.readouterr().err
    rest = ["--objective", "orpo", "--packing"]
    assert cli.main([*command, *rest]) == 2
    assert "packing=True has no effect with objective='orpo'" in capsys.readouterr().err


@pytest.mark.parametrize(("objective", "rows"), [("dpo", ROWS), ("orpo", ROWS), ("sft", PAIRS)])
def test_rows_of_the_other_kind_are_refused_with_what_to_do(objective, rows):
    config = TrainConfig(objective=objective)
    with pytest.raises(DataError, match=r"data\[0\].*objective='"):
        Trainer(FakeModel().add_lora(), rows, config)
