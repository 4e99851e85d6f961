"""Adapters of multimodal models: PEFT's names for the text tower, out and in, against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import sloth
from sloth.errors import AdapterMismatch
from sloth.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from sloth.lora import projections
from tests.formats.test_wrapper import TEXTS
from tests.models.common import random_tokens
from tests.oracles import (
    hf_logits,
    hf_wrapper_logits,
    peft_model,
    save_peft_adapter,
    save_tiny_wrapper,
)
from tests.test_lora import randomised
from tests.tolerance import FP32_ADAPTER, FP32_CHAIN, FP32_MERGE

pytestmark = pytest.mark.filterwarnings("ignore:this .* model reads images too")

TOKENS = random_tokens(1, 24)
NAMES = ["gemma3", "mistral3"]
PREFIX = "base_model.model."
TODAY = "model.language_model."
# What files in the wild have instead: Transformers before 4.52, and adapters of the text model.
OLDER = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}
TEXT = {"model.language_model.": "model."}

SETTINGS: dict[str, dict[str, Any]] = {
    "all": dict(),
    "some": dict(targets=["q_proj", "down_proj"], r=4, alpha=6, use_rslora=True),
    "layers": dict(targets=["v_proj"], layers=[1, 3]),
    "patterns": dict(
        r=4, rank_pattern={"model.layers.1.mlp.*": 2}, alpha_pattern={r"layers\.\d.*q_proj": 3}
    ),
    "saved": dict(targets=["o_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "head": dict(targets=["k_proj", "lm_head"]),
    "dora": dict(targets=["q_proj", "down_proj"], use_dora=True),
    "embedding": dict(targets=["k_proj", "embed_tokens"]),
    "token_rows": dict(targets=["k_proj"], trainable_token_indices=[5, 7]),
}
# Gemma's head is its embedding: there is no lm_head to target.
CASES = [("gemma3", key) for key in SETTINGS if key != "head"] + [
    ("mistral3", "all"),
    ("mistral3", "head"),
]
EVERY = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapter_wrappers")
    return {name: save_tiny_wrapper(name, root / name, TEXTS[name]) for name in NAMES}


def adapted(folder: Path, **settings: Any) -> sloth.Model:
    return randomised(sloth.load(folder, device="cpu", level="ops").add_lora(**settings))


@torch.no_grad()
def logits(model: sloth.Model) -> torch.Tensor:
    return model.logits(TOKENS)


@torch.no_grad()
def peft_logits(folder: Path, adapter: Path) -> torch.Tensor:
    return peft_model(folder, adapter)(TOKENS).logits


def renamed(adapter: Path, names: dict[str, str], **changes: object) -> Path:
    """The adapter's files with other prefixes in its tensors and other words in its settings."""
    tensors = load_file(adapter / WEIGHTS_NAME)
    for today, other in names.items():
        tensors = {n.replace(PREFIX + today, PREFIX + other): t for n, t in tensors.items()}
    save_file(tensors, adapter / WEIGHTS_NAME)
    settings = json.loads((adapter / CONFIG_NAME).read_text()) | changes
    (adapter / CONFIG_NAME).write_text(json.dumps(settings))
    return adapter


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_peft_applies_the_adapter_to_the_whole_model(folders, name, settings, tmp_path):
    """With no warning of missing keys: the vision tower's own q_proj are not among the targets."""
    model = adapted(folders[name], **SETTINGS[settings])
    adapter = model.save_adapter(tmp_path / "adapter")
    assert_close(logits(model), peft_logits(folders[name], adapter), **FP32_ADAPTER)
    base = hf_wrapper_logits(folders[name], TOKENS, torch.float32)
    assert not torch.allclose(logits(model), base, **FP32_CHAIN)
    for key in load_file(adapter / WEIGHTS_NAME):
        assert key.startswith((PREFIX + TODAY, f"{PREFIX}lm_head."))


def as_others_say(settings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Settings of a file with such names: the last parts of paths, a vision tower's among them."""
    ranks = {
        pattern.replace("model.", names.get(TODAY, TODAY)): rank
        for pattern, rank in settings.get("rank_pattern", {}).items()
    }
    return dict(
        target_modules=[*settings.get("targets", EVERY), "fc1"],
        layers_to_transform=settings.get("layers"),
        rank_pattern=ranks,
        alpha_pattern=settings.get("alpha_pattern", {}),
    )


@pytest.mark.parametrize("names", [{}, OLDER, TEXT], ids=["today", "before_4_52", "text_model"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_prefix_of_an_adapter_is_read(folders, name, settings, names, tmp_path):
    model = adapted(folders[name], **SETTINGS[settings])
    adapter = model.save_adapter(tmp_path / "adapter")
    if names:
        renamed(adapter, names, **as_others_say(SETTINGS[settings], names))
    again = sloth.load(folders[name], adapter=adapter, device="cpu", level="ops")
    assert torch.equal(logits(again), logits(model))
    adapted_here, adapted_there = (
        [path for path, module in projections(m.network).items() if module.has_lora]
        for m in (model, again)
    )
    assert adapted_here == adapted_there


WRITTEN_BY_PEFT: dict[str, dict[str, Any]] = {
    "regex": dict(
        target_modules=r".*language_model.*\.(q_proj|down_proj)", r=4, exclude_modules=r".*\.0\..*"
    ),
    "paths": dict(target_modules=["model.language_model.layers.2.self_attn.o_proj"], r=2),
    "patterns": dict(
        target_modules=r"model\.language_model\..*(q|k)_proj",
        r=4,
        rank_pattern={"model.language_model.layers.1.self_attn.q_proj": 2},
        alpha_pattern={"k_proj": 3},
    ),
}


@pytest.mark.parametrize(
    ("name", "settings"), [*(("mistral3", key) for key in WRITTEN_BY_PEFT), ("gemma3", "regex")]
)
def test_adapters_by_peft_are_read_and_merged_as_by_peft(folders, name, settings, tmp_path):
    theirs = save_peft_adapter(folders[name], tmp_path / "adapter", **WRITTEN_BY_PEFT[settings])
    model = sloth.load(folders[name], adapter=tmp_path / "adapter", device="cpu", level="ops")
    with torch.no_grad():
        assert_close(logits(model), theirs(TOKENS).logits, **FP32_ADAPTER)
    merged = dict(theirs.merge_and_unload().named_parameters())
    saved = load_file(model.save_merged(tmp_path / "merged") / "model.safetensors")
    for text, value in saved.items():
        whole = text.replace("model.", "model.language_model.", 1)
        assert_close(value, merged[whole].data, **FP32_MERGE)


@pytest.mark.parametrize(
    "settings",
    [
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
        dict(modules_to_save=["model.language_model.embed_tokens"]),
        dict(),
    ],
    ids=["saved, tied", "low-rank, tied", "saved", "frozen"],
)
@pytest.mark.filterwarnings("ignore:the adapter keeps embedding and head tied")
def test_embedding_and_head_of_the_whole_model_are_read(folders, settings, tmp_path):
    settings = dict(target_modules=[f"{TODAY}layers.0.self_attn.q_proj"], r=4) | settings
    theirs = save_peft_adapter(folders["gemma3"], tmp_path / "adapter", **settings)
    with torch.no_grad():
        for parameter in theirs.get_input_embeddings().parameters():
            parameter *= 0.3
        theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        expected = theirs(TOKENS).logits
    model = sloth.load(folders["gemma3"], adapter=tmp_path / "adapter", device="cpu", level="ops")
    assert_close(logits(model), expected, **FP32_ADAPTER)
    again = model.save_adapter(tmp_path / "again")
    assert_close(peft_logits(folders["gemma3"], again), expected, **FP32_ADAPTER)


def test_what_an_adapter_has_on_the_vision_tower_is_left_out_by_name(folders, tmp_path):
    theirs = save_peft_adapter(folders["gemma3"], tmp_path / "a", target_modules=["q_proj"], r=2)
    with pytest.warns(UserWarning, match=r"leaves out 2 tensors .*vision_tower"):
        model = sloth.load(folders["gemma3"], adapter=tmp_path / "a", device="cpu", level="ops")
    with torch.no_grad():
        assert_close(logits(model), theirs(TOKENS).logits, **FP32_ADAPTER)


def test_an_adapter_of_the_whole_model_fits_the_saved_text_model(folders, tmp_path):
    """And leaves it under the names of the text model, which PEFT then needs."""
    model = adapted(folders["mistral3"])
    adapter, base = model.save_adapter(tmp_path / "a"), model.save_base(tmp_path / "base")
    text = sloth.load(base, adapter=adapter, device="cpu", level="ops")
    assert torch.equal(logits(text), logits(model))
    with pytest.raises(ValueError, match="Target modules"):  # PEFT does not guess
        peft_model(base, adapter)
    again = text.save_adapter(tmp_path / "text_adapter")
    assert_close(peft_logits(base, again), logits(model), **FP32_ADAPTER)


def test_a_layer_missing_from_the_file_is_noticed(folders, tmp_path):
    adapter = adapted(folders["gemma3"], targets=["q_proj"]).save_adapter(tmp_path / "a")
    renamed(adapter, {}, target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS_NAME)
    lost = [n for n in tensors if ".layers.2." in n]
    save_file({n: t for n, t in tensors.items() if n not in lost}, adapter / WEIGHTS_NAME)
    with pytest.raises(AdapterMismatch, match="missing model.layers.2"):
        sloth.load(folders["gemma3"], adapter=adapter, device="cpu", level="ops")


def test_settings_come_back_as_the_text_models(folders, tmp_path):
    adapter = adapted(folders["gemma3"], **SETTINGS["patterns"]).save_adapter(tmp_path / "a")
    config = read_adapter(adapter).config
    ranks = {f"model.layers.1.mlp.{kind}_proj": 2 for kind in ("gate", "up", "down")}
    assert config.rank_pattern == ranks and config.r == 4
    assert set(config.alpha_pattern.values()) == {3.0} and len(config.alpha_pattern) == 7


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_the_merged_model_is_the_text_model(folders, name, quant, tmp_path):
    model = sloth.load(folders[name], quant=quant, device="cpu", level="ops")
    randomised(model.add_lora())
    saved = model.save_merged(tmp_path / "merged")
    assert (
        json.loads((saved / "config.json").read_text())["model_type"] == TEXTS[name]["model_type"]
    )
    assert_close(hf_logits(saved, TOKENS), logits(model), **FP32_CHAIN)
