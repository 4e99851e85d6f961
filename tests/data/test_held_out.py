"""Held-out rows: of any kind of source, or drawn from the data by row."""

from __future__ import annotations

import json

import pytest

from sloth.data.check import check_data
from sloth.data.dataset import load_data
from sloth.data.held_out import divide, load_both
from sloth.errors import DataError
from sloth.train.config import TrainConfig
from sloth.train.trainer import Trainer
from tests.train.fakes import PAIRS, ROWS, FakeModel, FakeTokenizer


def loaded(source, **settings):
    return load_both(TrainConfig(**settings), source, FakeTokenizer())


def texts(data):
    return [FakeTokenizer().decode(example.tokens) for example in data.examples]


@pytest.mark.parametrize(("size", "count"), [(0.25, 3), (0.01, 1), (4, 4), (1, 1)])
def test_some_rows_are_held_out_and_every_row_is_on_one_side(size, count):
    """Their numbers add up to those of all, and the order of the rest stays."""
    whole, _ = loaded(ROWS)
    trained, held_out = loaded(ROWS, val_set_size=size)
    assert len(held_out.examples) == count == trained.counts.held_out == held_out.counts.rows
    assert sorted(texts(trained) + texts(held_out)) == sorted(texts(whole))
    left = iter(texts(whole))
    assert all(text in left for text in texts(trained))
    for name in ("examples", "tokens", "trained_tokens"):
        parts = getattr(trained.counts, name) + getattr(held_out.counts, name)
        assert parts == getattr(whole.counts, name)
    lengths = [len(example.tokens) for example in trained.examples]
    assert trained.examples.lengths.tolist() == lengths == trained.row_lengths()
    assert len({whole.fingerprint, trained.fingerprint, held_out.fingerprint}) == 3
    assert f", {count} held out: {11 - count} examples" in trained.summary()


def test_the_rows_held_out_are_a_function_of_the_seed():
    first, again, other = (loaded(ROWS, val_set_size=4, seed=seed)[1] for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint and texts(first) == texts(again)
    assert texts(first) != texts(other) and first.fingerprint != other.fingerprint


def test_what_a_row_became_stays_on_one_side():
    """Pieces of long rows; halves of pairs; packing is of what is left."""
    rows = [
        {"text": letter * length} for letter, length in zip("abcdef", range(20, 80), strict=False)
    ]
    trained, held_out = loaded(rows, val_set_size=2, max_length=16, on_long="split", packing=True)
    letters = [{text[-1] for text in texts(side)} for side in (trained, held_out)]
    assert not letters[0] & letters[1] and [len(side) for side in letters] == [4, 2]
    packed = sorted(index for row in trained.packing.rows for index in row)
    assert packed == list(range(len(trained.examples))) and held_out.packing is None
    trained, held_out = loaded(PAIRS, val_set_size=0.3, objective="orpo")
    assert (trained.num_rows, held_out.num_rows) == (6, 3)
    assert len(held_out.batch([0, 2], 1).lengths) == 4


@pytest.mark.parametrize("size", [11, 11.0, 0.99, 50])
def test_a_set_that_leaves_nothing_to_train_on_is_refused(size):
    with pytest.raises(DataError, match=f"val_set_size={size:g} of 11 rows leaves none"):
        divide(load_data(ROWS, FakeTokenizer(), 99), size, 0)


def test_two_ways_to_hold_rows_out_are_refused(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match="which have a valid split already"):
        loaded(tmp_path, val_set_size=0.5)
    with pytest.raises(ValueError, match="leave one of them out"):
        TrainConfig(val_set_size=0.5, eval_data="x.jsonl")
    with pytest.raises(ValueError, match="a share below 1, or a whole number"):
        TrainConfig(val_set_size=1.5)


@pytest.mark.parametrize("kind", ["folder", "mapping"])
def test_the_valid_split_of_the_data_serves_patience_and_the_best_weights(tmp_path, kind):
    """What needs held-out rows is refused only where the data bring none, by the check as well."""
    source = {"train": ROWS[:6], "valid": ROWS[6:]}
    if kind == "folder":
        for name, rows in source.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        source = tmp_path
    settings = {"eval_steps": 1, "patience": 5, "load_best": True, "batch_size": 3}
    report = Trainer(FakeModel(), source, output=tmp_path / "run", **settings).run()
    assert list(report.eval_losses) == [1, 2] and report.paths["best"].is_dir()
    with pytest.raises(ValueError, match="patience=5 has no effect without held-out rows"):
        check_data(ROWS, FakeTokenizer(), TrainConfig(**settings))


def test_the_run_evaluates_on_what_it_does_not_train_on(tmp_path):
    model = FakeModel()
    read, plain = {True: [], False: []}, model.loss

    def loss(tokens, *rest, **more):
        read[model.network.training] += map(model.tokenizer.decode, tokens.tolist())
        return plain(tokens, *rest, **more)

    model.loss = loss
    settings = {"val_set_size": 3, "batch_size": 1, "eval_batch_size": 1, "eval_steps": 4}
    trainer = Trainer(model, ROWS, output=tmp_path / "run", load_best=True, **settings)
    report = trainer.run()
    assert list(report.eval_losses) == [4, 8] and report.best_step in (4, 8)
    assert sorted(read[True]) == sorted(texts(trainer.data)) and len(read[True]) == 8
    assert sorted(read[False]) == sorted(2 * texts(trainer.eval_data))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["eval_data"]["name"] == "data (held out)"
    assert facts["data"]["counts"]["held_out"] == facts["eval_data"]["counts"]["rows"] == 3
    check = check_data(ROWS, FakeTokenizer(), TrainConfig(val_set_size=3, batch_size=1))
    assert check.steps_per_epoch == 8 and check.held_out.counts.examples == 3


def sources(tmp_path):
    """Every kind of source with these rows."""
    rows = ROWS[:3]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield from (file, str(file), rows, tuple(rows), iter(rows), {"valid": rows})
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    yield from (pandas.DataFrame(rows), pyarrow.Table.from_pylist(rows))


def test_held_out_rows_come_from_every_kind_of_source_that_data_do(tmp_path):
    for source in sources(tmp_path):
        config = TrainConfig(eval_data=source)
        assert config == config and (config == TrainConfig()) is False
        _, held_out = load_both(config, ROWS, FakeTokenizer())
        assert texts(held_out) == texts(load_data(ROWS[:3], FakeTokenizer(), 2048))
        is_named = isinstance(source, str) or hasattr(source, "suffix")
        assert config.plain().get("eval_data") == (str(source) if is_named else None)
    with pytest.raises(ValueError, match="expected a path or rows, got a int"):
        TrainConfig(eval_data=3)


def test_columns_are_those_of_eval_data_too_and_that_is_said():
    rows, columns = [{"q": "ask", "a": "yes"}] * 2, {"prompt": "q", "completion": "a"}
    own = [{"prompt": "ask", "completion": "yes"}]
    with pytest.raises(DataError, match=r"eval_data\[0\]: no column 'q'.*columns apply to them as"):
        loaded(rows, eval_data=own, columns=columns)
    with pytest.raises(DataError, match="no row has the column 's'.*columns apply to them as well"):
        loaded([{**rows[0], "s": "b"}], eval_data=rows, columns={**columns, "system": "s"})
    with pytest.raises(DataError) as caught:
        loaded(own, eval_data=rows, columns=columns)
    assert "eval_data" not in str(caught.value)
