"""A model's folder from strangers: its config and tokenizer are refused before they can hurt."""

from __future__ import annotations

import json
import shutil

import pytest

import sloth
from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.text.tokenizer import Tokenizer
from tests.oracles import save_tiny, save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("hostile") / "base")


@pytest.mark.parametrize(
    ("layers", "error", "said"),
    [
        (10**12, UnsupportedConfig, "more than the 2000 of any model"),
        (1999, CheckpointMismatch, r"asks for 1999 layers, and the weights are of \d"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_config_of_absurdly_many_layers_is_refused_before_one_is_built(
    tmp_path, kind, layers, error, said
):
    """By the tensors' names; without weights, by what any model has. Some configs list layers."""
    save_tiny(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(error, match=said):
        sloth.load(tmp_path, device="cpu")
    if error is UnsupportedConfig:
        with pytest.raises(error, match=said):
            sloth.estimate(tmp_path, seq=9)


def test_files_that_are_nested_without_end_are_refused_by_name(folder, tmp_path):
    """Reading one raises a RecursionError."""
    deep = "[" * 100_000
    for name in ("config.json", "tokenizer.json"):
        place = tmp_path / name
        shutil.copytree(folder, place)
        (place / name).write_text(deep)
        with pytest.raises(UnsupportedConfig, match=f"{name} is not valid JSON"):
            sloth.load(place, device="cpu")


TOKENIZER_JSON = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": ["a"]},
        {"chat_template": [3]},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"5": "a"}},
        {"eos_token": {"content": [1]}, "added_tokens_decoder": 3},
    ],
)
def test_a_tokenizers_config_of_wrong_types_is_refused(config):
    files = {"tokenizer.json": TOKENIZER_JSON, "tokenizer_config.json": json.dumps(config)}
    with pytest.raises(UnsupportedConfig, match="tokenizer"):
        Tokenizer.from_files(files)


def test_a_template_that_is_no_text_is_refused():
    files = {"tokenizer.json": TOKENIZER_JSON, "chat_template.jinja": b"\xff"}
    with pytest.raises(UnsupportedConfig, match="tokenizer files of the model cannot be read"):
        Tokenizer.from_files(files)
