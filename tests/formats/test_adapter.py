"""PEFT adapter files: what is written, what is read, what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sloth.errors import AdapterMismatch
from sloth.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter, save_adapter_files
from sloth.lora_config import LoraConfig

Q = "model.layers.0.self_attn.q_proj"
TENSORS = {f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora_B.weight": torch.zeros(6, 2)}


def save(folder: Path, config: LoraConfig | None = None, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_adapter_files(
        folder,
        config or LoraConfig(r=2, alpha=3),
        TENSORS,
        base_name="org/base",
        revision="abc",
        target_suffixes=["q_proj"],
    )
    settings = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps(settings))
    return folder


def test_written_config_is_the_conservative_subset(tmp_path):
    settings = json.loads((save(tmp_path / "a") / CONFIG_NAME).read_text())
    assert settings["lora_alpha"] == 3 and isinstance(settings["lora_alpha"], int)
    assert settings["base_model_name_or_path"] == "org/base" and settings["revision"] == "abc"
    assert settings["task_type"] == "CAUSAL_LM" and settings["target_modules"] == ["q_proj"]
    newer = {"rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices", "use_dora"}
    assert not newer & settings.keys()
    names = load_file(tmp_path / "a" / WEIGHTS_NAME)
    assert set(names) == {f"base_model.model.{name}" for name in TENSORS}


def test_files_read_back_to_the_same_adapter(tmp_path):
    config = LoraConfig(
        r=2,
        alpha=2.5,
        dropout=0.1,
        rank_pattern={"q": 1},
        alpha_pattern={"q": 4},
        use_rslora=True,
        use_dora=True,
        trainable_token_indices={"embed_tokens": [1], "lm_head": [2, 1]},
    )
    files = read_adapter(save(tmp_path / "a", config))
    assert files.base_name == "org/base"
    assert files.config == config.model_copy(update={"targets": ["q_proj"]})
    assert all(torch.equal(files.tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "change",
    [
        dict(lora_bias=True),
        dict(bias="all"),
        dict(peft_type="IA3"),
        dict(fan_in_fan_out=True),
        dict(target_parameters=["experts"]),
        *(dict(init_lora_weights=start) for start in ("corda", "CorDA", "loftq", "lora_ga")),
        dict(layers_pattern=["h"]),
        dict(trainable_token_indices={"wte": [1]}),
        dict(target_modules=None),
        dict(modules_to_save=["score"]),
        dict(r=0),
    ],
)
def test_what_sloth_does_not_compute_is_refused_by_name(tmp_path, change):
    with pytest.raises(AdapterMismatch, match=next(iter(change))):
        read_adapter(save(tmp_path / "a", **change))


def test_unknown_tensors_are_refused(tmp_path):
    folder = save(tmp_path / "a")
    for name in ("other.weight", f"base_model.model.{Q}.lora_B.bias"):
        save_file({name: torch.zeros(1)}, folder / WEIGHTS_NAME)
        with pytest.raises(AdapterMismatch, match="cannot place"):
            read_adapter(folder)


def test_pickled_missing_and_damaged_weights_are_refused(tmp_path):
    folder = save(tmp_path / "a")
    (folder / WEIGHTS_NAME).write_bytes(b"damaged")
    with pytest.raises(AdapterMismatch, match="header"):
        read_adapter(folder)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterMismatch, match="no adapter_model"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterMismatch, match="safe_serialization"):
        read_adapter(folder)


def test_folders_that_hold_no_adapter_are_named(tmp_path):
    with pytest.raises(AdapterMismatch, match="adapter_config"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(AdapterMismatch, match="JSON"):
        read_adapter(tmp_path)


def test_a_config_nested_too_deeply_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterMismatch, match="adapter_config.json is not valid JSON"):
        read_adapter(tmp_path)
