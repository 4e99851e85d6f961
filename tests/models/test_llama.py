"""Llama against Hugging Face: logits bit-equal, gradients, loss, decoding, documents, names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import sloth
from sloth import errors
from sloth.models import ARCHITECTURES
from sloth.models.cache import KVCache
from sloth.models.llama import LlamaConfig
from tests.oracles import LLAMA_VARIANTS, hf_logits, hf_model, save_tiny_llama
from tests.tolerance import FP32_CHAIN

LEVELS = ("reference", "ops")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llama")
    return {name: save_tiny_llama(root / name, **more) for name, more in LLAMA_VARIANTS.items()}


def random_tokens(batch: int = 2, length: int = 70, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 160, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", LLAMA_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_logits_equal_hugging_face_bit_for_bit(folders, variant, dtype):
    tokens = random_tokens()
    model = sloth.load(folders[variant], level="reference", dtype=dtype, device="cpu")
    with torch.no_grad():
        ours = model.logits(tokens)
    assert torch.equal(ours, hf_logits(folders[variant], tokens, dtype))


@pytest.mark.parametrize("variant", LLAMA_VARIANTS)
def test_ops_logits_match_hugging_face(folders, variant):
    tokens = random_tokens()
    model = sloth.load(folders[variant], level="ops", dtype="float32", device="cpu")
    with torch.no_grad():
        assert_close(model.logits(tokens), hf_logits(folders[variant], tokens), **FP32_CHAIN)


def test_dynamic_rope_follows_hugging_face_through_growing_and_shrinking_lengths(folders):
    theirs = hf_model(folders["dynamic"])
    ours = sloth.load(folders["dynamic"], level="reference", device="cpu")
    for length in (20, 50, 70, 40, 32, 10, 60):
        tokens = random_tokens(1, length)
        with torch.no_grad():
            assert torch.equal(ours.logits(tokens), theirs(tokens).logits), length


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", ["plain", "tied_biased", "yarn"])
def test_loss_and_gradient_of_every_parameter_match_hugging_face(folders, variant, level):
    tokens = random_tokens()
    labels = tokens.clone()
    labels[0, :20] = -100
    theirs = hf_model(folders[variant])
    expected = theirs(tokens, labels=labels).loss
    expected.backward()
    model = sloth.load(folders[variant], level=level, dtype="float32", device="cpu")
    loss = model.loss(tokens, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss, expected, **FP32_CHAIN)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert {name for name, _ in model.network.named_parameters()} == gradients.keys()
    for name, parameter in model.network.named_parameters():
        assert_close(
            parameter.grad, gradients[name], **FP32_CHAIN, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_num_trained_divides_the_sum(folders):
    tokens = random_tokens()
    model = sloth.load(folders["plain"], device="cpu")
    with torch.no_grad():
        mean, halved = (
            model.loss(tokens, tokens),
            model.loss(tokens, tokens, num_trained=2 * 2 * 69),
        )
    assert_close(halved, mean / 2, **FP32_CHAIN)


@pytest.mark.parametrize("level", LEVELS)
def test_prefill_equals_decode(folders, level):
    tokens = random_tokens(2, 40)
    network = sloth.load(folders["llama3"], level=level, device="cpu").network
    with torch.no_grad():
        whole = network(tokens)
        cache = KVCache(network.config.num_hidden_layers, 40)
        parts = [network(tokens[:, :25], cache=cache)]
        parts += [network(tokens[:, i : i + 1], cache=cache) for i in range(25, 40)]
    assert_close(torch.cat(parts, 1), whole, **FP32_CHAIN)


@pytest.mark.parametrize("level", LEVELS)
def test_packed_documents_are_blind_to_each_other(folders, level):
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    tokens = random_tokens(1)
    model = sloth.load(folders["plain"], level=level, device="cpu")
    with torch.no_grad():
        packed = model.logits(tokens, positions)
        apart = [model.logits(tokens[:, :30]), model.logits(tokens[:, 30:])]
        assert_close(packed, torch.cat(apart, 1), **FP32_CHAIN)
        other = tokens.clone()
        other[:, :30] = (other[:, :30] + 7) % 150
        assert torch.equal(model.logits(other, positions)[:, 30:], packed[:, 30:])
        losses = [model.loss(t, t, num_trained=1) for t in (tokens[:, :30], tokens[:, 30:])]
        assert_close(model.loss(tokens, tokens, positions, 1), sum(losses), **FP32_CHAIN)


def test_documents_match_hugging_face_position_ids(folders):
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    tokens = random_tokens(1)
    model = sloth.load(folders["plain"], level="reference", device="cpu")
    with torch.no_grad():
        ours = model.logits(tokens, positions)
    apart = [hf_logits(folders["plain"], t) for t in (tokens[:, :30], tokens[:, 30:])]
    assert_close(ours, torch.cat(apart, 1), **FP32_CHAIN)


def test_tied_head_stores_one_matrix_and_sums_both_gradients(folders):
    network = sloth.load(folders["tied_biased"], device="cpu").network
    assert "lm_head.weight" not in dict(network.named_parameters())
    logits = network(random_tokens(1, 8))
    F.cross_entropy(logits[0], torch.arange(8)).backward()
    assert network.model.embed_tokens.weight.grad.abs().sum() > 0


def test_old_and_new_config_spellings_read_alike(folders):
    new = json.loads((folders["llama3"] / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    scaling = dict(new["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    old |= {"rope_scaling": scaling, "torch_dtype": "float32"}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)


def test_config_round_trips_through_hugging_face_json(folders):
    for folder in folders.values():
        config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
        assert LlamaConfig.from_hf(config.to_hf()) == config


def config_with(**changes: object) -> dict[str, object]:
    base = dict(
        model_type="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return base | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "zeta": 1}}, "zeta"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_settings_that_would_change_the_mathematics_are_refused_by_name(changes, words):
    with pytest.raises(errors.UnsupportedConfig, match=words):
        LlamaConfig.from_hf(config_with(**changes))


def test_an_unknown_key_can_be_ignored_on_purpose():
    config = LlamaConfig.from_hf(config_with(my_note="x"), ignore=["my_note"])
    assert config.head_dim == 4


def test_auto_map_on_a_supported_type_is_ignored_with_a_notice():
    with pytest.warns(UserWarning, match="auto_map"):
        LlamaConfig.from_hf(config_with(auto_map={"AutoModel": "evil.Model"}))


def test_architectures_name_their_own_model_type():
    for model_type, (config_class, decoder) in ARCHITECTURES.items():
        config = config_class.from_hf(config_with(model_type=model_type, hidden_act=None))
        with torch.device("meta"):
            assert decoder(config).model_type == model_type
