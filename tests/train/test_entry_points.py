"""Row 28: Python, flags and a YAML file are one code path; so are generating here and there."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import sloth
from sloth import cli
from sloth.lora_config import LoraConfig
from tests.oracles import save_tiny_llama
from tests.train.fakes import ROWS, FakeTokenizer

SETTINGS = {
    "max_steps": 3,
    "batch_size": 2,
    "grad_accum": 2,
    "lr": 0.02,
    "seed": 3,
    "packing": True,
    "max_length": 120,
    "schedule": "cosine",
    "lora_plus": 4.0,
}
FLAGS = [
    *("--max-steps", "3", "--batch-size", "2", "--grad-accum", "2", "--lr", "0.02", "--seed", "3"),
    *("--packing", "--max-length", "120", "--schedule", "cosine", "--lora-plus", "4"),
    *("--lora.r", "2", "--lora.dropout", "0.1", "--quant", "nf4"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model and data; every load gets a tokenizer of characters."""
    save_tiny_llama(tmp_path / "base")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(text)
    plain = sloth.load

    def load(*names, **settings):
        model = plain(*names, **{**settings, "device": "cpu"})
        model._tokenizer = FakeTokenizer()
        model.tokenizer.decode = lambda ids, **rest: "".join(f"<{token}>" for token in ids)
        return model

    monkeypatch.setattr(sloth, "load", load)
    monkeypatch.setattr("sloth.loading.load", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_row_28_the_same_seed_gives_byte_equal_adapters_from_every_entry_point(place):
    model = sloth.load("base", quant="nf4")
    model.train("rows.jsonl", output="python", lora=LoraConfig(r=2, dropout=0.1), **SETTINGS)
    assert cli.main(["train", "base", "rows.jsonl", "--output", "flags", *FLAGS]) == 0
    attached = sloth.load("base", quant="nf4")
    torch.rand(5)  # nor do torch's generators matter
    attached.add_lora(r=2, dropout=0.1).train("rows.jsonl", output="attached", **SETTINGS)
    given = {**SETTINGS, "lora": {"r": 2, "dropout": 0.1}, "quant": "nf4", "output": "yaml"}
    (place / "run.yaml").write_text(yaml.safe_dump(given))
    assert cli.main(["train", "base", "rows.jsonl", "--config", "run.yaml"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, *others = (
            (place / output / "adapter" / name).read_bytes()
            for output in ("python", "attached", "flags", "yaml")
        )
        assert all(other == first for other in others), name
    other_seed = ["--output", "other", *FLAGS, "--seed", "4"]
    assert cli.main(["train", "base", "rows.jsonl", *other_seed]) == 0
    other = place / "other" / "adapter" / "adapter_model.safetensors"
    assert other.read_bytes() != (place / "yaml/adapter/adapter_model.safetensors").read_bytes()


def test_row_28_a_chat_turn_gets_the_same_answer_from_python_generate_and_chat(
    place, monkeypatch, capsys
):
    model = sloth.load("base")
    model.add_lora(r=2).save_adapter("adapter")
    answer = model.generate([{"role": "user", "content": "hi"}], max_new_tokens=4)
    adapted = ["base", "--adapter", "adapter", "--max-new-tokens", "4"]
    assert cli.main(["generate", *adapted, "hi", "--chat"]) == 0
    assert capsys.readouterr().out.strip() == answer.strip()
    lines = iter(["hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", *adapted, "--temperature", "0"]) == 0
    assert answer.strip() in capsys.readouterr().out
