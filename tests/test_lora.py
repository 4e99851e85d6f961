"""LoRA on a network: targets, freezing, PEFT equality in both directions, merge, switching off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

import sloth
from sloth import errors
from sloth.errors import one_line
from sloth.lora import (
    adapter_disabled,
    count_parameters,
    merged_weight,
    projections,
    redraw_lora,
)
from tests.oracles import hf_logits, peft_model, save_peft_adapter, save_tiny_llama
from tests.tolerance import FP32_ADAPTER, FP32_CHAIN, FP32_MERGE

TOKENS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(5))
TOKENS[0, :6] = torch.tensor([7, 3, 150, 9, 4, 5])  # whose rows are trained below


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora_tied")
    return save_tiny_llama(root / "base", tie_word_embeddings=True)


def randomised(model: sloth.Model) -> sloth.Model:
    """Give the adapter weights that show: B starts at zero, so a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                noise = noise.to(parameter.device)
                parameter.add_(noise * (0.1 if "lora" in name else 0.02))
    return model


def logits(model: sloth.Model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


CONFIGS = {
    "all": dict(),
    "by_name": dict(targets=["q_proj", "down_proj"], r=4),
    "regex": dict(targets=r"model\.layers\.[02]\..*(k|gate)_proj"),
    "layers": dict(targets=["v_proj", "o_proj"], layers=[1, 3]),
    "excluded": dict(exclude=["up_proj", r"model.layers.0.self_attn.q_proj"]),
    "patterns": dict(
        r=8, alpha=12, rank_pattern={"q_proj": 2, r"layers.1.mlp.*": 5}, alpha_pattern={"q_proj": 3}
    ),
    "rslora": dict(r=9, alpha=6, use_rslora=True),
    "head": dict(targets=["q_proj", "lm_head"]),
    "saved_modules": dict(targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "saved_head": dict(modules_to_save=["lm_head"]),
    "embedding": dict(targets=["q_proj", "embed_tokens"], r=4),
    "embedding_and_head": dict(targets=["q_proj", "embed_tokens", "lm_head"], r=4),
    "token_rows": dict(targets=["q_proj"], trainable_token_indices=[7, 3, 150]),
    "token_rows_of_both": dict(
        trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [9, 2, 17]}
    ),
    "dora_token_rows": dict(use_dora=True, r=4, trainable_token_indices=[7, 3]),
    "dora": dict(r=4, use_dora=True),
    "dora_some": dict(targets=["k_proj", "down_proj"], r=4, use_dora=True, use_rslora=True),
    "dora_head": dict(targets=["q_proj", "lm_head"], r=4, use_dora=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_adapter_gives_the_same_logits_in_peft(folder, tmp_path, name):
    model = sloth.load(folder, device="cpu")
    randomised(model.add_lora(sloth.LoraConfig(**CONFIGS[name])))
    model.save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        theirs = peft_model(folder, tmp_path / "adapter")(TOKENS).logits
    assert_close(logits(model), theirs, **FP32_ADAPTER)
    assert not torch.allclose(theirs, hf_logits(folder, TOKENS))


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_model_trained_apart_is_untied_and_agrees_with_peft(tied_folder, tmp_path, saved):
    model = sloth.load(tied_folder, device="cpu")
    config = sloth.LoraConfig(targets=["v_proj"], modules_to_save=saved)
    randomised(model.add_lora(config)).save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        theirs = peft_model(tied_folder, tmp_path / "adapter")(TOKENS).logits
    assert_close(logits(model), theirs, **FP32_ADAPTER)
    model.save_merged(tmp_path / "merged")
    assert_close(hf_logits(tmp_path / "merged", TOKENS), theirs, **FP32_CHAIN)
    model.save_base(tmp_path / "base")
    assert_close(hf_logits(tmp_path / "base", TOKENS), hf_logits(tied_folder, TOKENS), **FP32_CHAIN)


PEFT_SETTINGS = {
    "list": dict(target_modules=["q_proj", "up_proj"], r=4, lora_alpha=8),
    "all_linear": dict(target_modules="all-linear", r=4, lora_alpha=8),
    "regex": dict(target_modules=r".*\.self_attn\.[kv]_proj", r=4, lora_alpha=8),
    "layers": dict(target_modules=["q_proj"], layers_to_transform=[0, 2], r=4, lora_alpha=8),
    "layers_pattern": dict(
        target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern=["h", "layers"], r=4
    ),
    "gaussian": dict(target_modules=["q_proj"], r=4, init_lora_weights="gaussian"),
    "orthogonal": dict(target_modules=["q_proj"], r=4, init_lora_weights="orthogonal"),
    "patterns": dict(
        target_modules=["q_proj", "k_proj"],
        r=4,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"q_proj": 1},
    ),
    "rslora": dict(target_modules=["o_proj"], r=4, lora_alpha=8, use_rslora=True),
    "head_saved": dict(target_modules=["o_proj"], r=4, modules_to_save=["lm_head"]),
    "excluded": dict(target_modules="all-linear", exclude_modules=["up_proj"], r=2),
    "embedding": dict(target_modules=["o_proj", "embed_tokens"], r=4),
    "embedding_and_head": dict(target_modules=["embed_tokens", "lm_head"], r=4),
    "token_rows": dict(target_modules=["o_proj"], r=4, trainable_token_indices=[9, 4, 150]),
    "token_rows_of_both": dict(
        target_modules=["o_proj"],
        r=4,
        trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [9, 2, 17]},
    ),
    "dora": dict(target_modules="all-linear", r=4, lora_alpha=8, use_dora=True),
    "dora_head": dict(target_modules=["o_proj", "lm_head"], r=4, use_dora=True),
}


@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_adapter_written_by_peft_gives_the_same_logits_here(folder, tmp_path, name):
    theirs = save_peft_adapter(folder, tmp_path / "adapter", **PEFT_SETTINGS[name])
    model = sloth.load(folder, adapter=tmp_path / "adapter", device="cpu")
    with torch.no_grad():
        assert_close(logits(model), theirs(TOKENS).logits, **FP32_ADAPTER)
    assert any(p.requires_grad for p in model.network.parameters())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_start_rewrote_the_base_loads_once_converted(folder, tmp_path, start):
    settings = dict(target_modules=["q_proj"], r=4, init_lora_weights=start)
    theirs = save_peft_adapter(folder, tmp_path / "before", **settings)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "trained")
    with pytest.raises(errors.AdapterMismatch, match=f"{start}.*path_initial_model"):
        sloth.load(folder, adapter=tmp_path / "trained", device="cpu")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    theirs.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "before")
    )
    model = sloth.load(folder, adapter=tmp_path / "plain", device="cpu")
    assert_close(logits(model), expected, **FP32_CHAIN)


@pytest.mark.parametrize("name", ["all_linear", "dora", "dora_head", "rslora", "patterns"])
def test_merge_equals_peft_merge_and_unload(folder, tmp_path, name):
    theirs = save_peft_adapter(folder, tmp_path / "adapter", **PEFT_SETTINGS[name])
    model = sloth.load(folder, adapter=tmp_path / "adapter", device="cpu")
    merged = dict(theirs.merge_and_unload().named_parameters())
    for path, module in projections(model.network).items():
        assert_close(merged_weight(module), merged[f"{path}.weight"].data, **FP32_MERGE)


def test_dora_on_nf4_is_peft_on_the_unpacked_base_merged_too(folder, tmp_path):
    model = sloth.load(folder, device="cpu", quant="nf4")
    randomised(model.add_lora(r=4, use_dora=True))
    model.save_base(tmp_path / "unpacked")
    model.save_adapter(tmp_path / "adapter")
    theirs = peft_model(tmp_path / "unpacked", tmp_path / "adapter")
    with torch.no_grad():
        assert_close(logits(model), theirs(TOKENS).logits, **FP32_ADAPTER)
    model.save_merged(tmp_path / "merged")
    assert_close(hf_logits(tmp_path / "merged", TOKENS), logits(model), **FP32_CHAIN)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_fresh_dora_changes_no_bit(folder, quant):
    model = sloth.load(folder, device="cpu", quant=quant, level="ops")
    before = logits(model)
    model.add_lora(r=4, use_dora=True)
    assert torch.equal(logits(model), before)
    lengths = model.network.model.layers[0].self_attn.q_proj.lora_magnitude_vector
    assert lengths.requires_grad and lengths.dtype == torch.float32


def test_attaching_freezes_the_base_and_starts_at_zero_change(folder):
    model = sloth.load(folder, device="cpu")
    before = logits(model)
    model.add_lora(sloth.LoraConfig(r=4))
    assert_close(logits(model), before, **FP32_CHAIN)
    trainable = {name for name, p in model.network.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    module = model.network.model.layers[0].self_attn.q_proj
    assert module.lora_A.weight.shape == (4, 64) and module.lora_B.weight.shape == (128, 4)
    assert module.lora_A.weight.dtype == torch.float32
    total, trained = count_parameters(model.network)
    assert trained == sum(p.numel() for p in model.network.parameters() if p.requires_grad) < total


def test_switched_off_adapter_leaves_the_base(folder):
    model = randomised(sloth.load(folder, device="cpu").add_lora())
    base = logits(sloth.load(folder, device="cpu"))
    with adapter_disabled(model.network):
        assert_close(logits(model), base, **FP32_CHAIN)
    assert not torch.allclose(logits(model), base)


@pytest.mark.parametrize(
    "config",
    [
        dict(targets=["nothing"]),
        dict(targets=["q_proj", "typo_proj"]),
        dict(targets="("),
        dict(exclude="("),
        dict(layers=[99]),
        dict(layers=[0, 99]),
        dict(layers=[-1, 0]),
        dict(rank_pattern={"typo_proj": 2}),
        dict(targets=["q_proj"], alpha_pattern={"q_proj": 2, "v_proj": 3}),
        dict(exclude=r".*"),
        dict(exclude=["up_proj", "typo_proj"]),
        dict(exclude=["mlp"]),
        dict(exclude=r".*\.9\..*"),
        dict(targets=["q_proj"], exclude="typo_proj"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_what_exists(folder, config):
    with pytest.raises(errors.NoTargets) as caught:
        sloth.load(folder, device="cpu").add_lora(sloth.LoraConfig(**config))
    setting = next(reversed(config))
    assert setting in str(caught.value)
    if "(" not in config.values() and setting != "layers":
        assert "q_proj" in str(caught.value)


def test_what_an_adapter_file_lists_in_vain_is_no_obstacle(folder, tmp_path):
    save_peft_adapter(folder, tmp_path / "adapter", target_modules=["q_proj", "typo_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(config.read_text())
    written |= {"rank_pattern": {"typo_proj": 2}, "layers_to_transform": [0, 1, 2, 3, 99]}
    for excluded in (["typo_proj"], r"vision_tower\..*"):
        config.write_text(json.dumps(written | {"exclude_modules": excluded}))
        assert sloth.load(folder, adapter=tmp_path / "adapter", device="cpu").has_adapter


def test_what_is_excluded_need_not_be_among_the_targets(folder):
    """It is enough that the model has it."""
    model = sloth.load(folder, device="cpu")
    model.add_lora(targets=["q_proj"], exclude=["up_proj", "lm_head", "embed_tokens"])
    assert model.has_adapter


def test_a_refused_adapter_leaves_the_model_as_it_was(folder):
    model = sloth.load(folder, device="cpu")
    with pytest.raises(errors.NoTargets):
        model.add_lora(sloth.LoraConfig(targets=["nothing"]))
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_a_second_adapter_is_refused(folder):
    model = sloth.load(folder, device="cpu").add_lora()
    with pytest.raises(errors.AdapterMismatch):
        model.add_lora()


def test_adapter_for_another_base_is_refused(folder, tmp_path):
    other = save_tiny_llama(tmp_path / "other", hidden_size=32, num_hidden_layers=2)
    sloth.load(other, device="cpu").add_lora().save_adapter(tmp_path / "adapter")
    with pytest.raises(errors.AdapterMismatch, match="another base"):
        sloth.load(folder, adapter=tmp_path / "adapter", device="cpu")


def test_saving_without_an_adapter_is_refused(folder, tmp_path):
    with pytest.raises(errors.AdapterMismatch):
        sloth.load(folder, device="cpu").save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(r=0), dict(dropout=1.0), dict(rank=4), dict(alpha=True)),
        *(dict(rank_pattern={"((": 2}), dict(alpha_pattern={"((": 2})),
    ],
)
def test_lora_config_refuses_nonsense(bad):
    with pytest.raises(ValidationError) as caught:
        sloth.LoraConfig(**bad)
    assert next(iter(bad)) in one_line(caught.value)


def test_a_setting_of_an_adapter_file_that_cannot_be_is_said_in_one_line(folder, tmp_path):
    save_peft_adapter(folder, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(config.read_text()) | {"modules_to_save": ["norm"]}
    config.write_text(json.dumps(written))
    with pytest.raises(errors.AdapterMismatch) as caught:
        sloth.load(folder, adapter=tmp_path / "adapter", device="cpu")
    assert "embed_tokens and lm_head, got 'norm'" in str(caught.value)
    assert "pydantic" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["all_linear", "dora", "dora_head"])
@pytest.mark.parametrize("level", ["reference", "ops", "auto"])
def test_adapter_gradients_match_peft(folder, tmp_path, level, name):
    theirs = save_peft_adapter(folder, tmp_path / "adapter", **PEFT_SETTINGS[name])
    model = sloth.load(folder, adapter=tmp_path / "adapter", device="cpu", level=level)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    expected = theirs(TOKENS, labels=TOKENS).loss
    expected.backward()
    loss = model.loss(TOKENS, TOKENS)
    loss.backward()
    assert_close(loss, expected, **FP32_CHAIN)
    gradients = {
        _our_name(name): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    trainable = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    assert trainable.keys() == gradients.keys()
    for name, parameter in trainable.items():
        assert_close(parameter.grad, gradients[name], **FP32_CHAIN)


def _our_name(name: str) -> str:
    """Of a parameter of a PEFT model, whose adapter is called default."""
    name = name.removeprefix("base_model.model.").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


# -- where an adapter starts -----------------------------------------------------------------------


def factors(model: sloth.Model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.network.named_parameters() if "lora_" in n}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_adapter_neither_reads_nor_moves_torchs_generators(folder: Path) -> None:
    """Row 28: attached twice, whatever was drawn before, it is the same."""
    targets = {"targets": ["q_proj", "embed_tokens"], "r": 4}
    first = factors(sloth.load(folder, device="cpu").add_lora(**targets))
    torch.rand(3)
    model, state = sloth.load(folder, device="cpu"), torch.get_rng_state()
    assert same(factors(model.add_lora(**targets)), first)
    assert torch.equal(torch.get_rng_state(), state)
    bound = model.config.hidden_size**-0.5
    drawn = first["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert bound / 2 < drawn.abs().max() <= bound
    assert not first["model.layers.0.self_attn.q_proj.lora_B.weight"].any()
    assert not torch.equal(drawn, first["model.layers.1.self_attn.q_proj.lora_A.weight"])


def test_only_an_adapter_that_nobody_has_changed_is_drawn_anew(
    folder: Path, tmp_path: Path
) -> None:
    model = sloth.load(folder, device="cpu").add_lora(r=4)
    fresh = factors(model)
    assert redraw_lora(model.network, 5) and not same(factors(model), fresh)
    other = factors(model)
    assert not redraw_lora(model.network, 6) and same(factors(model), other), (
        "of seed 5, as a run left it"
    )
    with torch.no_grad():
        model.network.get_parameter("model.layers.0.self_attn.q_proj.lora_B.weight")[0, 0] = 1e-3
    model.save_adapter(tmp_path / "adapter")
    before = factors(model)
    loaded = sloth.load(folder, adapter=tmp_path / "adapter", device="cpu")
    for held in (model, loaded):
        assert not redraw_lora(held.network, 7) and same(factors(held), before)
