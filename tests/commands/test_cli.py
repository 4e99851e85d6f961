"""The command: help without torch, flags over file over defaults, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sloth import cli
from sloth.commands.base import Loading
from sloth.errors import UnknownModel
from sloth.lora_config import LoraConfig
from sloth.train.config import TrainConfig
from sloth.train.trainer import Trainer, TrainReport
from tests.train.fakes import ROWS, FakeModel

ROOT = Path(__file__).parents[2]


class CommandModel(FakeModel):
    """FakeModel with what the commands beside train ask for."""

    dtype = torch.float32
    level, level_reason = "ops", "it is a fake"
    config = SimpleNamespace(to_hf=lambda: {"hidden_size": 16})
    seen: TrainConfig | None = None

    def train(self, data, config):
        self.seen = config
        return TrainReport([2.0, 1.0], 5, 0.1, {"output": Path("runs/x")})

    def generate(self, prompt, **settings):
        self.calls.append((prompt, settings))
        return iter(["an", "swer"])

    def save_base(self, folder, quant=None):
        self.calls.append(f"base {quant}")
        return folder

    def save_gguf(self, path, quant):
        self.calls.append(f"gguf {path} {quant}")
        return path

    def save_adapter(self, folder, format="peft"):
        if format == "peft":
            return super().save_adapter(folder)
        self.calls.append(f"adapter {folder} {format}")
        return folder


@pytest.fixture
def loaded(monkeypatch):
    """The model that every command loads; .loading and .quant say how."""
    model = CommandModel()

    def load(loading, name, quant, *rest):
        if name == "nope":
            raise UnknownModel("nope is no model;\n  did you mean\n  hope?")
        model.loading, model.quant = loading, quant
        return model

    monkeypatch.setattr(Loading, "load", load)
    return model


def test_help_and_usage_errors_do_not_import_torch():
    """Every command's help, and what is wrong before a command starts to work, in one process."""
    script = (
        "import json, sys\n"
        "from sloth.cli import COMMANDS, main\n"
        "calls = [['--help'], ['--version'], *([name, '--help'] for name in COMMANDS), ['train']]\n"
        "codes = [main(call) for call in calls]\n"
        "print(json.dumps(['torch' in sys.modules, codes]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    has_torch, codes = json.loads(done.stdout.splitlines()[-1])
    assert not has_torch
    assert codes == [0] * (2 + len(cli.COMMANDS)) + [2]


def test_init_and_runs_do_not_import_torch(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "step", "step": 1, "loss": 1.0}\n')
    script = (
        "import sys; from sloth.cli import main; "
        "codes = main(['init', 'a.yaml']), main(['runs', '.']); "
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "(0, 0) False"


def test_train_help_lists_every_setting(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in {*TrainConfig.model_fields, "config", "adapter", "device"} - {"lora"}:
        assert f"--{name.replace('_', '-')} " in shown or f"--{name.replace('_', '-')}," in shown
    for name in LoraConfig.model_fields:
        assert f"--lora.{name.replace('_', '-')}" in shown


def test_flags_win_over_the_file_and_the_file_over_defaults(loaded, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 3e-4\nseed: 4\nlora: {r: 4, alpha: 7}\nquant: nf4\n")
    arguments = ["train", "m", "d.jsonl", "--config", str(file), "--seed", "5", "--lora.r", "8"]
    assert cli.main([*arguments, "--level", "ops"]) == 0
    assert loaded.seen == TrainConfig(lr=3e-4, seed=5, quant="nf4", lora=LoraConfig(r=8, alpha=7))
    assert (loaded.quant, loaded.loading.level) == ("nf4", "ops")
    assert "2 steps, 5 tokens" in capsys.readouterr().out


def test_plain_train_uses_the_defaults_of_the_python_interface(loaded):
    assert cli.main(["train", "m", "d.jsonl"]) == 0
    assert loaded.seen == TrainConfig()


def test_bare_resume_means_true(loaded):
    cli.main(["train", "m", "d.jsonl", "--output", "o", "--resume"])
    assert loaded.seen.resume is True
    cli.main(["train", "m", "d.jsonl", "--resume", "--output", "o"])
    assert loaded.seen.resume is True
    cli.main(["train", "m", "d.jsonl", "--resume", "o/step-000003"])
    assert loaded.seen.resume == Path("o/step-000003")


def test_command_trains_as_the_python_interface_does(loaded, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    loaded.train = lambda data, config: Trainer(loaded, data, config).run()
    flags = ["--max-steps", "3", "--lora.r", "2", "--output", str(tmp_path / "a")]
    assert cli.main(["train", "m", str(file), *flags]) == 0
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    by_flags = [json.loads(row)["loss"] for row in rows]
    lora = LoraConfig(r=2)
    report = Trainer(FakeModel(), ROWS, max_steps=3, lora=lora, output=tmp_path / "b").run()
    assert by_flags == report.losses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nope", "d"], "error: nope is no model; did you mean hope?\n"),
        (
            ["train", "m", "d", "--lr", "-1"],
            "error: lr: Input should be greater than 0 (got -1.0)\n",
        ),
        (
            ["train", "m", "d", "--config", "none.yaml"],
            "error: config file none.yaml does not exist\n",
        ),
        (["export", "m"], "error: nothing to export"),
        (["export", "m", "--merged", "d"], "error: --merged needs --adapter"),
        (
            ["export", "m", "--adapter", "a", "--merged", "d", "--quant", "nf4"],
            "error: --quant says",
        ),
        (["export", "m", "--gguf-adapter", "d"], "error: --gguf-adapter needs --adapter"),
        (["export", "m", "--base", "d", "--gguf-quant", "f16"], "error: --gguf-quant says"),
        (
            ["train", "m", "d", "--learning-rate", "1"],
            "error: unknown flag --learning-rate; did you mean --lr?",
        ),
        (
            ["train", "m", "d", "--gradient_accumulation_steps=2"],
            "error: unknown flag --gradient-accumulation-steps; did you mean --grad-accum?",
        ),
        (["trian"], "error: unknown command 'trian'"),
        (
            ["estimate", "m", "--lora.r", "0"],
            "error: lora.r: Input should be greater than or equal to 1 (got 0)",
        ),
        (
            ["train", "m", "d", "--lora.r", "0", "--lora.dropout", "2"],
            "error: lora.r: Input should be greater than or equal to 1 (got 0); "
            "lora.dropout: Input should be less than 1 (got 2.0)",
        ),
        (
            ["train", "m", "d", "--lora.trainable-token-indices", "1", "1"],
            "error: lora: trainable_token_indices of embed_tokens must be token ids from 0 on, "
            "each once, got [1, 1]\n",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(loaded, capsys, arguments, said):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(said) and shown.count("\n") == 1


def test_what_cannot_be_read_as_a_flag_is_shown_beside_its_help_and_exits_with_2(loaded, capsys):
    for flags, said in ((["--seq", "abc"], "Tokens of a row."), (["--nope"], "options: --nope")):
        assert cli.main(["estimate", "m", *flags]) == 2
        shown = capsys.readouterr()
        assert shown.err.count(said) == 1 and not shown.out


def test_missing_data_file_is_one_line(loaded, capsys):
    loaded.train = lambda data, config: Trainer(loaded, data, config).run()
    assert cli.main(["train", "m", "none.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: data file none.jsonl does not exist")


def test_generate_streams_raw_text_or_a_chat_turn(loaded, capsys):
    assert cli.main(["generate", "m", "Once", "--stop", "x", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == "answer\n"
    cli.main(["generate", "m", "Hi", "--chat"])
    (raw, settings), (chat, _) = loaded.calls
    assert raw == "Once" and settings["stop"] == ["x"] and settings["max_new_tokens"] == 9
    assert chat == [{"role": "user", "content": "Hi"}] and settings["stream"] is True


def test_chat_keeps_the_conversation_until_reset(loaded, monkeypatch):
    lines = iter(["one", "", "two", "/reset", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    given = []
    plain = loaded.generate
    loaded.generate = lambda messages, **k: (given.append(list(messages)), plain(messages, **k))[1]
    assert cli.main(["chat", "m", "--system", "be brief"]) == 0
    assert [[m["content"] for m in messages] for messages in given] == [
        ["be brief", "one"],
        ["be brief", "one", "answer", "two"],
        ["be brief", "three"],
    ]


def test_chat_ends_with_its_input(loaded, monkeypatch):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert cli.main(["chat", "m"]) == 0


def test_export_writes_what_was_asked_for(loaded, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert cli.main(["export", "m", "--adapter", "a", "--merged", str(merged)]) == 0
    assert cli.main(["export", "m", "--base", "b", "--quant", "nf4"]) == 0
    assert loaded.calls == ["merged", "base nf4"]
    assert "merged  " in capsys.readouterr().out


def test_export_writes_gguf_files(loaded, capsys):
    gguf = ["export", "m", "--gguf", "m.gguf"]
    assert cli.main(gguf) == 0
    assert cli.main([*gguf, "--gguf-quant", "q4_0", "--adapter", "a", "--gguf-adapter", "b"]) == 0
    assert loaded.calls == ["gguf m.gguf f16", "gguf m.gguf q4_0", "adapter b gguf"]
    assert "gguf    m.gguf" in capsys.readouterr().out
    assert cli.main([*gguf, "--gguf-quant", "q4_k_m"]) == 2


def test_info_says_level_and_why(loaded, capsys):
    loaded.network = nn.Linear(4, 4, bias=False)
    assert cli.main(["info", "m"]) == 0
    shown = capsys.readouterr().out
    assert "ops: it is a fake" in shown and "16, of which trainable 16" in shown
    assert "hidden_size" in shown


def test_doctor_names_torch_and_engine(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "engine" in shown and "driver" in shown


def test_interrupt_ends_with_130(loaded, monkeypatch):
    def interrupted(data, config):
        raise KeyboardInterrupt

    loaded.train = interrupted
    assert cli.main(["train", "m", "d"]) == 130
