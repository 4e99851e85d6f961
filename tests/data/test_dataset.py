"""Rows into datasets, counted; order and batches."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth import cli
from sloth.commands.base import Loading
from sloth.constants import IGNORE_INDEX
from sloth.data.check import check_data
from sloth.data.dataset import StepPlan, _pieces, collate, load_data, order
from sloth.data.examples import Example
from sloth.data.show import describe_row
from sloth.errors import DataError
from sloth.train.config import load_config
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer


def load(source, max_length=2048):
    return load_data(source, FakeTokenizer(), max_length)


def test_file_list_and_iterator_give_the_same_examples(tmp_path):
    file = tmp_path / "rows.jsonl"
    text = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    from_file = load(file)
    assert from_file.examples == load(ROWS).examples == load(iter(ROWS)).examples
    assert from_file.fingerprint == load(ROWS).fingerprint != load(ROWS[1:]).fingerprint
    assert from_file.counts.rows == len(ROWS)


def test_truncated_and_dropped_rows_are_counted_exactly():
    rows = [
        {"prompt": "p" * 4, "completion": "c"},  # 7 tokens with <s> and </s>: fits
        {"prompt": "p" * 4, "completion": "c" * 20},  # cut, still trained
        {"prompt": "p" * 40, "completion": "c"},  # cut before its completion
        {"messages": [{"role": "user", "content": "a"}]},  # nothing trained
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "user", "content": "b"}],
        },
    ]
    counts = load(rows, max_length=10).counts
    assert (counts.rows, counts.examples, counts.truncated) == (5, 2, 3)
    assert (counts.dropped_by_truncation, counts.dropped_by_mask) == (1, 2)
    assert counts.tokens == 7 + 10
    assert counts.trained_tokens == 2 + 5
    assert counts.kinds == {"prompt/completion": 4, "messages": 1}
    assert "3 truncated (60.0%), 3 dropped (60.0%)" in counts.summary()


def test_zero_trained_tokens_names_truncation_or_mask():
    with pytest.raises(DataError, match=r"truncation: 1 lost.*max_length=8.*longest has 43"):
        load([{"prompt": "p" * 40, "completion": "c"}], max_length=8)
    with pytest.raises(DataError, match=r"mask: 1 hold nothing.*role assistant"):
        load([{"messages": [{"role": "user", "content": "a"}]}])


def test_no_rows_are_refused(tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text("\n")
    for source in (file, [], iter(())):
        with pytest.raises(DataError, match="holds no rows"):
            load(source)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "one JSON object on the line"),
        (b"\xff\xfe", "not UTF-8"),
        (b'[{"text": "a"}]', "got a JSON list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": 3}', "text: expected a text"),
        (b"null", "expected an object, got null"),
        (b"\x00", "one JSON object on the line"),
    ],
)
def test_malformed_line_is_refused_with_file_and_line(tmp_path, line, said):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2.*{said}"):
        load(file)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, raw):
    file = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    file.write_bytes(raw)
    with pytest.raises(DataError):
        load(file)


# -- row 22: what is too long ----------------------------------------------------------------------

LONG = [
    {"prompt": "p" * 4, "completion": "c"},  # 7 tokens with <s> and </s>: fits
    {"prompt": "p" * 4, "completion": "c" * 20},  # 26 tokens
    {"prompt": "p" * 40, "completion": "c"},  # 43 tokens, the trained ones at the end
]


@pytest.mark.parametrize(
    ("on_long", "expected", "said"),
    [
        ("truncate", {"examples": 2, "truncated": 2, "cut_tokens": 49}, "2 truncated (66.7%)"),
        ("drop", {"examples": 1, "dropped_by_length": 2, "tokens": 7}, "2 dropped (66.7%)"),
        ("split", {"examples": 5, "split": 2, "pieces": 4}, "2 split into 4"),
    ],
)
def test_row_22_every_policy_for_long_examples_counts_exactly(on_long, expected, said):
    data = load_data(LONG, FakeTokenizer(), 10, on_long=on_long)
    found = {name: getattr(data.counts, name) for name in expected}
    assert found == expected and said in data.summary()
    assert max(len(example.tokens) for example in data.examples) <= 10
    assert data.counts.tokens == sum(len(example.tokens) for example in data.examples)


def test_row_22_error_names_the_row_its_length_and_the_choices():
    with pytest.raises(
        DataError, match=r"data\[1\] has 26 tokens.*max_length=10.*'split' or 'drop'"
    ):
        load_data(LONG, FakeTokenizer(), 10, on_long="error")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(2, 20))
def test_row_22_splitting_keeps_every_target_exactly_once(trained, max_length):
    example = Example(
        list(range(len(trained))), [i if t else IGNORE_INDEX for i, t in enumerate(trained)]
    )
    pieces = list(_pieces(example, max_length))
    targets = [label for piece in pieces for label in piece.labels[1:] if label != IGNORE_INDEX]
    assert targets == [label for label in example.labels[1:] if label != IGNORE_INDEX]
    assert all(len(piece.tokens) <= max_length for piece in pieces)


def test_row_22_all_dropped_for_length_is_refused_with_that_cause():
    with pytest.raises(DataError, match=r"length: 2 were dropped.*max_length=10.*longest has 43"):
        load_data(LONG[1:], FakeTokenizer(), 10, on_long="drop")


# -- row 28: one code path -------------------------------------------------------------------------


def test_row_28_python_yaml_and_flags_train_on_the_same_tokens(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"q": "ask" * n, "a": "yes" * n}) + "\n" for n in range(1, 9))
    )
    columns, seen = {"prompt": "q", "completion": "a"}, []

    class Stop(Exception):
        pass

    def run(trainer):
        seen.append((trainer.data.fingerprint, trainer.data.packing, trainer.plan))
        raise Stop

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(Loading, "load", lambda *rest: TrainModel())
    given = {"columns": columns, "max_length": 24, "on_long": "split", "packing": True}
    yaml = tmp_path / "run.yaml"
    yaml.write_text(json.dumps(given))
    flags = ["--max-length", "24", "--on-long", "split", "--packing"]
    flags += ["--columns", "prompt", "q", "completion", "a"]
    for start in (
        lambda: Trainer(FakeModel(), str(file), **given).run(),
        lambda: cli.main(["train", "m", str(file), "--config", str(yaml)]),
        lambda: cli.main(["train", "m", str(file), *flags]),
    ):
        with pytest.raises(Stop):
            start()
    assert seen[0] == seen[1] == seen[2] and seen[0][1] is not None
    config = load_config(yaml)
    assert check_data(str(file), FakeTokenizer(), config).data.fingerprint == seen[0][0]


class TrainModel(FakeModel):
    def train(self, data, config):
        return Trainer(self, data, config).run()


def test_missing_file_empty_folder_and_single_row_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"no train file; expected one of train\.jsonl"):
        load(tmp_path)
    with pytest.raises(DataError, match="one row goes into a list"):
        load({"text": "a"})


def test_describe_row_marks_the_trained_spans():
    tokenizer = FakeTokenizer()
    row = {"prompt": "ask \x1b[2J", "completion": "yes [red]"}
    text = describe_row(load([row]).examples[0], tokenizer)
    assert text.plain == "<s>ask \ufffd[2J[+yes [red]</s>+]"
    long = describe_row(load([{"text": "x" * 9000}]).examples[0], tokenizer)
    assert long.plain.endswith("x ...+]") and len(long.plain) < 1600


def test_order_is_a_shuffle_that_depends_on_seed_and_epoch_only():
    first = order(50, 3, 0)
    assert sorted(first) == list(range(50))
    order.cache_clear()
    assert order(50, 3, 0) == first
    assert len({first, order(50, 3, 1), order(50, 4, 0), tuple(range(50))}) == 4


def test_every_epoch_reads_each_row_once_and_steps_may_span_epochs():
    plan = StepPlan.of(7, 2, 2, seed=1, max_steps=None, epochs=3)
    rows = [row for step in range(plan.num_steps) for row in plan.rows(step)]
    assert plan.num_steps == 6 and len(rows) == 21
    for epoch in range(3):
        assert sorted(rows[epoch * 7 : (epoch + 1) * 7]) == list(range(7))
    assert plan.micro_batches(5) == [rows[20:]]
    assert plan.epoch(6) == 3


def test_run_ends_with_whichever_of_max_steps_and_epochs_comes_first():
    def steps(max_steps, epochs):
        return StepPlan.of(10, 2, 1, 0, max_steps, epochs).num_steps

    assert steps(None, None) == 5
    assert steps(None, 0.5) == 3
    assert steps(12, None) == 12
    assert steps(12, 1) == 5
    assert steps(2, 1) == 2


def test_how_rows_are_split_into_micro_batches_does_not_change_a_step():
    plans = [StepPlan.of(9, b, a, 0, 4, None) for b, a in ((8, 1), (4, 2), (1, 8))]
    for step in range(4):
        assert len({tuple(plan.rows(step)) for plan in plans}) == 1
        assert [len(plan.micro_batches(step)) for plan in plans] == [1, 2, 8]


def test_collate_pads_right_and_trains_no_padding():
    batch = collate([Example([5, 6, 7], [IGNORE_INDEX, 6, 7]), Example([8], [8])], pad_id=6)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 6, 6]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert (batch.num_tokens, batch.num_trained) == (4, 2)
