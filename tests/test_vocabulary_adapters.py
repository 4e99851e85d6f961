"""Adapters on embedding and head, tied and not: trained, saved, merged, read by PEFT and HF."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import sloth
from sloth import errors
from sloth.estimating import on_meta
from sloth.lora import adapter_disabled, attach_lora
from sloth.train.config import TrainConfig
from sloth.train.network_sizes import NetworkSizes
from sloth.train.optim import kind_of, parameter_groups
from tests.oracles import (
    hf_logits,
    peft_model,
    resized_hf_folder,
    save_peft_adapter,
    save_tiny,
)
from tests.test_lora import TOKENS, logits, randomised
from tests.tolerance import FP32_ADAPTER, FP32_CHAIN

SMALL = dict(num_hidden_layers=2, head_dim=16)
WAYS = {
    "low-rank embedding": dict(targets=["v_proj", "embed_tokens"], r=4),
    "low-rank head": dict(targets=["v_proj", "lm_head"], r=4),
    "low-rank both": dict(targets=["v_proj", "embed_tokens", "lm_head"], r=4),
    "DoRA head": dict(targets=["v_proj", "lm_head"], r=4, use_dora=True),
    "rows": dict(targets=["v_proj"], r=4, trainable_token_indices=[7, 3, 150]),
    "full embedding": dict(targets=["v_proj"], r=4, modules_to_save=["embed_tokens"]),
    "full both": dict(targets=["v_proj"], r=4, modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied and an untied Llama, and a Gemma, which scales its embedding."""
    root = tmp_path_factory.mktemp("vocabulary")
    return {
        "tied": save_tiny("llama", root / "tied", tie_word_embeddings=True, **SMALL),
        "untied": save_tiny("llama", root / "untied", **SMALL),
        "scaled": save_tiny("gemma", root / "scaled", num_hidden_layers=2),
    }


@pytest.mark.parametrize("kind", ["tied", "untied", "scaled"])
@pytest.mark.parametrize("way", WAYS)
def test_adapter_is_the_same_here_in_peft_reloaded_and_merged(folders, tmp_path, way, kind):
    base = folders[kind]
    model = randomised(sloth.load(base, device="cpu").add_lora(sloth.LoraConfig(**WAYS[way])))
    ours = logits(model)
    model.save_adapter(tmp_path / "adapter")
    theirs = peft_model(base, tmp_path / "adapter")
    with torch.no_grad():
        assert_close(ours, theirs(TOKENS).logits, **FP32_ADAPTER)
    again = sloth.load(base, adapter=tmp_path / "adapter", device="cpu")
    assert torch.equal(logits(again), ours)
    model.save_merged(tmp_path / "merged")
    assert_close(hf_logits(tmp_path / "merged", TOKENS), ours, **FP32_CHAIN)
    before = hf_logits(base, TOKENS)
    assert not torch.allclose(ours, before, **FP32_CHAIN)
    model.save_base(tmp_path / "base")
    assert torch.equal(hf_logits(tmp_path / "base", TOKENS), before)
    with model.adapter_off():
        assert_close(logits(model), before, **FP32_CHAIN)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("level", ["reference", "ops", "auto"])
@pytest.mark.parametrize("way", ["low-rank both", "DoRA head", "rows", "full both"])
def test_gradients_match_autograd_through_peft(folders, tmp_path, way, kind, level):
    model = sloth.load(folders[kind], device="cpu", level=level)
    randomised(model.add_lora(sloth.LoraConfig(**WAYS[way]))).save_adapter(tmp_path / "adapter")
    theirs = peft_model(folders[kind], tmp_path / "adapter")
    for name, parameter in theirs.named_parameters():
        trained = ("lora", "modules_to_save", "tokens_delta")
        parameter.requires_grad_(any(mark in name for mark in trained))
    expected = theirs(TOKENS, labels=TOKENS).loss
    expected.backward()
    loss = model.loss(TOKENS, TOKENS)
    loss.backward()
    assert_close(loss, expected, **FP32_CHAIN)
    ours = {n: p.grad for n, p in model.network.named_parameters() if p.requires_grad}
    gradients = {_our_name(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == gradients.keys()
    for name, gradient in ours.items():
        assert_close(gradient, gradients[name], **FP32_CHAIN, msg=lambda m, n=name: f"{n}: {m}")


def _our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    for mark in (".default", ".modules_to_save"):
        name = name.replace(mark, "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


TIED_BY_PEFT = {
    "saved embedding": dict(modules_to_save=["embed_tokens"]),
    "saved head": dict(modules_to_save=["lm_head"]),
    "low-rank embedding": dict(target_modules=["v_proj", "embed_tokens"]),
    "low-rank head": dict(target_modules=["v_proj", "lm_head"]),
    "low-rank by pattern": dict(target_modules=r".*(v_proj|embed_tokens)"),
    "rows": dict(trainable_token_indices=[7, 3, 150]),
}


@pytest.mark.parametrize("way", TIED_BY_PEFT)
def test_what_peft_keeps_tied_gives_the_same_logits_here_and_back(folders, tmp_path, way):
    settings = dict(target_modules=["v_proj"], r=4, ensure_weight_tying=True) | TIED_BY_PEFT[way]
    theirs = save_peft_adapter(folders["tied"], tmp_path / "adapter", **settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name and parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
            if "lora_embedding" in name:  # logits of about 1; the head's factors are these ones
                parameter *= 0.1
        theirs.save_pretrained(tmp_path / "adapter")
        expected = theirs(TOKENS).logits
    notice = nullcontext() if way == "rows" else pytest.warns(UserWarning, match="keeps .* tied")
    with notice:
        model = sloth.load(folders["tied"], adapter=tmp_path / "adapter", device="cpu")
    assert_close(logits(model), expected, **FP32_ADAPTER)
    model.save_adapter(tmp_path / "again")
    with torch.no_grad():
        back = peft_model(folders["tied"], tmp_path / "again")(TOKENS).logits
    assert_close(back, expected, **FP32_ADAPTER)


WITH_MATRICES = {
    "projections": dict(target_modules=["v_proj"]),
    "saved embedding": dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    "saved head": dict(target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "rows": dict(target_modules=["v_proj"], trainable_token_indices=[7, 3, 150]),
}


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(
    ("way", "num_rows"), [("projections", 160), *((way, 163) for way in WITH_MATRICES)]
)
def test_frozen_matrices_that_peft_saves_along_replace_the_bases(
    folders, tmp_path, way, kind, num_rows
):
    """And stay with the adapter: the base on disk lacks them."""
    other = save_tiny("llama", tmp_path / "x", 5, tie_word_embeddings=kind == "tied", **SMALL)
    resized = resized_hf_folder(other, tmp_path / "resized", num_rows)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    file = resized / "model.safetensors"
    mixed = load_file(folders[kind] / "model.safetensors")
    mixed |= {name: value for name, value in load_file(file).items() if name in names}
    save_file(mixed, file, metadata={"format": "pt"})
    theirs = save_peft_adapter(resized, tmp_path / "adapter", r=4, **WITH_MATRICES[way])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokens = torch.cat((TOKENS, torch.full((2, 1), num_rows - 1)), 1)
    with torch.no_grad():
        expected = theirs(tokens).logits
    model = sloth.load(folders[kind], adapter=tmp_path / "adapter", device="cpu")
    with torch.no_grad():
        assert_close(model.logits(tokens), expected, **FP32_ADAPTER)
    model.save_adapter(tmp_path / "again")
    again = sloth.load(folders[kind], adapter=tmp_path / "again", device="cpu")
    with torch.no_grad():
        assert torch.equal(again.logits(tokens), model.logits(tokens))
        back = peft_model(resized, tmp_path / "again")(tokens).logits
    assert_close(back, expected, **FP32_ADAPTER)
    with pytest.raises(errors.AdapterMismatch, match="along"):
        model.save_adapter(tmp_path / "gguf", format="gguf")


def test_two_matrices_for_a_tied_pair_are_refused(folders, tmp_path):
    theirs = save_peft_adapter(folders["untied"], tmp_path / "a", target_modules=["v_proj"], r=4)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(errors.AdapterMismatch, match="lm_head.*one in this model"):
        sloth.load(folders["tied"], adapter=tmp_path / "a", device="cpu")


def test_a_tied_head_without_training_of_its_own_costs_no_memory(folders):
    model = sloth.load(folders["tied"], device="cpu")
    model.add_lora(**WAYS["low-rank both"])
    head, embedding = model.network.lm_head, model.network.model.embed_tokens
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    sizes = NetworkSizes.of(model.network)
    apart = sloth.load(folders["untied"], device="cpu").add_lora(**WAYS["low-rank both"])
    assert sizes.embedding_stays and not NetworkSizes.of(apart.network).embedding_stays
    assert NetworkSizes.of(apart.network).weights - sizes.weights == embedding.weight.nbytes


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_sizes_are_known_before_anything_is_loaded(folders, kind, way, quant):
    config = sloth.LoraConfig(**({} if way is None else WAYS[way]))
    model = sloth.load(folders[kind], quant=quant, device="cpu", dtype="float32").add_lora(config)
    network, _ = on_meta(folders[kind], quant, torch.float32)
    attach_lora(network, config)
    assert NetworkSizes.of(network) == NetworkSizes.of(model.network)


def test_switched_off_rows_and_low_rank_embedding_leave_the_base(folders):
    base = logits(sloth.load(folders["untied"], device="cpu"))
    for way in ("low-rank embedding", "rows"):
        model = randomised(sloth.load(folders["untied"], device="cpu").add_lora(**WAYS[way]))
        with adapter_disabled(model.network):
            assert_close(logits(model), base, **FP32_CHAIN)


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        ("untied", dict(targets=["embed_tokens"], use_dora=True), "use_dora"),
        ("untied", dict(targets=["embed_tokens"], trainable_token_indices=[1]), "embed_tokens"),
        ("untied", dict(trainable_token_indices=[160]), "row 160"),
        ("tied", dict(trainable_token_indices={"lm_head": [1]}), "tied"),
        ("tied", dict(targets=["lm_head"], trainable_token_indices=[1]), "tied"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(folders, kind, config, match):
    model = sloth.load(folders[kind], device="cpu")
    with pytest.raises(errors.AdapterMismatch, match=match):
        model.add_lora(**config)
    assert not model.has_adapter
    assert all(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        dict(trainable_token_indices=[1, 1]),
        dict(trainable_token_indices=[-1]),
        dict(trainable_token_indices={"norm": [1]}),
        dict(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
    ],
)
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(ValueError, match="trainable_token_indices"):
        sloth.LoraConfig(**bad)


@pytest.mark.parametrize("way", ["low-rank embedding", "rows", "DoRA head"])
def test_gguf_adapters_refuse_what_they_cannot_say(folders, tmp_path, way):
    model = sloth.load(folders["untied"], device="cpu").add_lora(**WAYS[way])
    with pytest.raises(errors.AdapterMismatch, match="save_gguf"):
        model.save_adapter(tmp_path / "adapter", format="gguf")


def test_rows_and_low_rank_embeddings_take_the_embedding_rate(folders):
    model = sloth.load(folders["untied"], device="cpu")
    model.add_lora(targets=["v_proj", "embed_tokens"], trainable_token_indices={"lm_head": [3]})
    trained = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    kinds = {name: kind_of(name) for name in trained if "v_proj" not in name}
    assert set(kinds.values()) == {"embedding"} and len(kinds) == 3
    groups = parameter_groups(trained, TrainConfig(output="x", lr=1e-3, embedding_lr=1e-4))
    scaled = next(group for group in groups if group["lr_scale"] < 1)
    assert len(scaled["params"]) == 3


def test_the_planner_counts_a_trained_heads_gradient(folders):
    def head_gradient(**config) -> int:
        model = sloth.load(folders["untied"], device="cpu").add_lora(**config)
        return NetworkSizes.of(model.network).head_gradient

    assert head_gradient() == 0
    assert head_gradient(modules_to_save=["lm_head"]) == 160 * 64 * 8
    assert head_gradient(targets=["lm_head"], r=4) == 160 * 68 * 12
    assert head_gradient(trainable_token_indices={"lm_head": [3]}) == 160 * 64 * 12
