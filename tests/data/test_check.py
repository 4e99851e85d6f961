"""`sloth data check`: what it shows is what training would do, and it refuses what that would."""

from __future__ import annotations

import json
import re

import pytest

from sloth import cli
from sloth.commands import data as data_command
from sloth.data.check import check_data, epoch_seconds, histogram
from sloth.data.examples import Example, ExamplesWriter
from sloth.errors import DataError
from sloth.train.config import TrainConfig
from sloth.train.trainer import Trainer
from tests.commands.models import save_texts, save_tiny_model
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data_command, "_read_model", lambda *rest: (FakeTokenizer(), 10**6, None, 50)
    )
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0]]))
    return file


def test_it_shows_format_lengths_counts_and_one_masked_row(file, capsys):
    assert cli.main(["data", "check", str(file), "--model", "m", "--max-length", "60"]) == 0
    said = capsys.readouterr().out
    for line in (
        "format            messages (12 rows)",
        "examples          11, longest 92 tokens",
        "too long          3 truncated (25.0%), losing 56 tokens",
        "end of turn       12 of 12 assistant turns end in a stop token",
        "duplicates        2 examples (18.2%)",
        "steps per epoch   3",
        "epoch takes       about",
        "lengths, in tokens:",
        "[+yo<|end|>+]",
        "examples are longer than the 50 positions that the model is made for",
    ):
        assert line in said, line


BLANK, DOUBLED = " \n", "<s><s>ab"


def test_row_4_it_shows_what_is_trained_doubled_beginnings_and_blank_answers(file, capsys):
    """Counted by hand: a chat of one letter each way has 24 tokens, of which 2 are trained."""
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
        for answer in ("a", BLANK, "")
    ]
    rows = [*chats, {"text": DOUBLED}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "check", str(file), "--model", "m"]) == 0
    said = capsys.readouterr().out
    # Answers of 1, 2 and 0 letters with <|end|>; all of the text and its </s> but for the first.
    tokens, trained = 24 + 25 + 23 + 5, 2 + 3 + 1 + 4
    share = f"{trained / tokens:.1%}"
    assert f"tokens per epoch  {tokens}, of which trained {trained} ({share})\n" in said
    assert "double BOS        1 rows\n" in said and "blank answers     2 rows\n" in said
    assert "WARNING: 1 rows begin with the beginning-of-text token twice" in said
    assert "WARNING: 2 rows have a blank answer" in said


@pytest.mark.parametrize("is_terminal", [True, False])
def test_trained_tokens_of_the_shown_row_are_green_on_a_terminal(
    file, capsys, monkeypatch, is_terminal
):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert cli.main(["data", "check", str(file), "--model", "m"]) == 0
    said = capsys.readouterr().out
    row = said[said.index("first row") :]
    if is_terminal:
        green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", row, re.DOTALL)
        assert green == ["[+yo<|end|>+]"]
    else:
        assert "[+yo<|end|>+]" in row and "\x1b" not in said


def test_row_31_malformed_rows_are_refused_or_counted_and_named(file, capsys):
    file.write_text(file.read_text() + '{"text": 1}\n{\n')
    command = ["data", "check", str(file), "--model", "m"]
    assert cli.main(command) == 2
    assert f"{file}:13: text: expected a text" in capsys.readouterr().err
    assert cli.main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "malformed         2 rows skipped (14.3%)" in said
    assert f"WARNING: 2 of 14 rows are malformed and left out (14.3%); first {file}:13: " in said


def test_flags_win_over_the_file_whichever_way_they_turn_a_setting(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("packing: true\nskip_bad: false\nmax_length: 60\nlr: 1.0e-3\n")
    command = ["rows.jsonl", "--model", "m"]
    for flags, expected in (
        ([], (True, False, 60)),
        (["--no-packing", "--skip-bad"], (False, True, 60)),
        (["--max-length", "2048", "--no-skip-bad"], (True, False, 2048)),
    ):
        parsed, config = data_command._read([*command, "--config", str(file), *flags])
        assert (
            config.packing,
            config.skip_bad,
            config.max_length,
        ) == expected and config.lr == 1e-3
        assert (parsed.data, parsed.model) == ("rows.jsonl", "m")
    assert data_command._read(command)[1] == TrainConfig()
    columns = ["--columns", "prompt", "question", "--objective", "dpo"]
    given = data_command._read([*command, *columns])[1]
    assert given == TrainConfig(columns={"prompt": "question"}, objective="dpo")


def test_its_counts_are_those_of_the_run(file, tmp_path):
    config = TrainConfig(max_length=120, packing=True, output=tmp_path / "run")
    check = check_data(str(file), FakeTokenizer(), config)
    trainer = Trainer(FakeModel(), str(file), config)
    assert check.data.counts == trainer.data.counts
    assert check.data.fingerprint == trainer.data.fingerprint
    assert check.steps_per_epoch == trainer.plan.num_steps
    report = trainer.run()
    assert (report.tokens, report.trained_tokens) == (
        check.data.counts.tokens,
        check.data.counts.trained_tokens,
    )


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        ([{"question": "a", "answer": "b"}], []),
        ([{"messages": [{"role": "user", "content": "a"}]}], []),
        ([{"prompt": "a" * 99, "completion": "b"}], ["--max-length", "20"]),
        ([{"text": "a" * 99}], ["--max-length", "20", "--on-long", "error"]),
        ([{"chosen": "a", "rejected": "b"}], []),
        ([], []),
    ],
)
def test_row_22_what_training_refuses_is_refused_with_the_same_words(file, rows, flags, capsys):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "check", str(file), "--model", "m", *flags]) == 2
    said = capsys.readouterr().err
    pairs = zip(flags[::2], flags[1::2], strict=True)
    settings = {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}
    with pytest.raises(DataError) as caught:
        Trainer(FakeModel(), str(file), TrainConfig(**settings))
    assert said == f"error: {caught.value}\n"


def test_held_out_rows_that_are_trained_on_are_counted(tmp_path):
    for name, rows in (("train", ROWS[:8]), ("valid", ROWS[6:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    check = check_data(tmp_path, FakeTokenizer(), TrainConfig())
    assert check.held_out.counts.examples == 5
    # ROWS[7] says what ROWS[0] says, so both are trained on.
    assert check.leaked == 2 and check.duplicates == 1
    assert "2 are trained on, too" in check.lines(2048, None)["held out"]
    trainer = Trainer(FakeModel(), tmp_path, output=tmp_path / "run", max_steps=1)
    assert list(trainer.run().eval_losses) == [1]


def test_histogram_covers_every_length_and_counts_each_once():
    writer = ExamplesWriter()
    for length in [1, 1, 2, 30, 57]:
        writer.add(Example([5] * length, [5] * length))
    lines = histogram(writer.finish()[0])
    rows = [line.split() for line in lines]
    assert sum(int(row[3]) for row in rows) == 5
    assert rows[0][0] == "1" and int(rows[-1][2]) >= 57
    assert rows[0][4] == "#" * 40 and int(rows[0][3]) == 3


def test_time_of_an_epoch_grows_with_tokens_and_parameters(monkeypatch):
    monkeypatch.setattr("sloth.data.check._operations_per_second", lambda: 1e9)
    assert epoch_seconds(1000, 10**6) == pytest.approx(4 / 0.7)
    assert epoch_seconds(2000, 10**7) == pytest.approx(20 * 4 / 0.7)


def test_the_command_reads_a_real_models_tokenizer_and_size(tmp_path):
    from tests.assets import smollm2

    tokenizer, *sizes = data_command._read_model(str(smollm2()), None)
    assert tokenizer.chat is not None and sizes == [134_515_008, 49_152, 8192]


def test_a_model_that_training_refuses_is_refused(tmp_path, capsys):
    """Its config was left unread where it could not be, and the data were said to be fine."""
    base = save_tiny_model(tmp_path / "base")
    data = save_texts(tmp_path / "rows.jsonl")
    config = json.loads((base / "config.json").read_text())
    capsys.readouterr()
    for wrong in ({"model_type": "other"}, {"hidden_act": "tanh"}):
        (base / "config.json").write_text(json.dumps({**config, **wrong}))
        said = []
        for command in (["data", "check", str(data), "--model"], ["train"]):
            rest = [] if command[0] == "data" else [str(data), "--device", "cpu"]
            assert cli.main([*command, str(base), *rest]) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1] and next(iter(wrong.values())) in said[0]


def test_tokens_that_the_model_has_no_row_for_are_refused(file, monkeypatch, capsys):
    monkeypatch.setattr(
        data_command, "_read_model", lambda *rest: (FakeTokenizer(), 10**6, 100, None)
    )
    assert cli.main(["data", "check", str(file), "--model", "m"]) == 2
    assert "the model has rows for 100 tokens (vocab_size)" in capsys.readouterr().err


def test_anything_but_check_is_refused(capsys):
    assert cli.main(["data", "chek"]) == 2
    assert "has one command, check; got 'chek'" in capsys.readouterr().err
