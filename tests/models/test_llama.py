"""Llama: rotary scalings of every kind, biases; the shell's loss, head and config reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import sloth
from sloth import errors
from sloth.infer.decode import FixedStep
from sloth.infer.generate import generate_tokens
from sloth.models import ARCHITECTURES
from sloth.models.cache import KVCache
from sloth.models.llama import LlamaConfig
from tests.models.common import ArchitectureTests, random_tokens, read_config
from tests.oracles import hf_greedy, hf_logits, hf_model, save_tiny_llama
from tests.tiny_configs import LLAMA_VARIANTS
from tests.tolerance import FP32_CHAIN


class TestLlama(ArchitectureTests):
    model_type = "llama"
    # A dynamic table follows the longest sequence seen, so its documents are not blind to each
    # other in Hugging Face either; it has tests of its own below.
    variants = {name: more for name, more in LLAMA_VARIANTS.items() if name != "dynamic"}
    unread = dict(qk_norm=True, sliding_window=128, hidden_act="gelu")
    defects = dict(rms_norm_eps=1e-2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llama")
    return {
        name: save_tiny_llama(root / name, **LLAMA_VARIANTS[name])
        for name in ("plain", "tied_biased", "dynamic", "llama3")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_rope_equals_hugging_face(folders, dtype):
    tokens = random_tokens()
    model = sloth.load(folders["dynamic"], level="reference", dtype=dtype, device="cpu")
    with torch.no_grad():
        assert torch.equal(model.logits(tokens), hf_logits(folders["dynamic"], tokens, dtype))


def test_dynamic_rope_follows_hugging_face_through_growing_and_shrinking_lengths(folders):
    theirs = hf_model(folders["dynamic"])
    ours = sloth.load(folders["dynamic"], level="reference", device="cpu")
    for length in (20, 50, 70, 40, 32, 10, 60):
        tokens = random_tokens(1, length)
        with torch.no_grad():
            assert torch.equal(ours.logits(tokens), theirs(tokens).logits), length


def test_dynamic_rope_of_a_padded_batch_is_each_prompts_own(folders):
    """Below, across and above the length from which on the table grows, as if each came first."""
    network = sloth.load(folders["dynamic"], level="ops", device="cpu").network
    prompts = [random_tokens(1, length, length)[0].tolist() for length in (23, 30, 3, 60, 40)]
    stops = (2,)
    together = list(generate_tokens(network, prompts, 6, stops))
    for row, prompt in enumerate(prompts):
        ours = [step[row] for step in together if step[row] is not None]
        assert ours == hf_greedy(hf_model(folders["dynamic"]), prompt, 6, stops)


def test_dynamic_rope_on_a_fixed_cache_is_each_rows_own(folders):
    network = sloth.load(folders["dynamic"], level="ops", device="cpu").network
    tokens, padding = random_tokens(2, 50), 12
    documents = torch.ones(2, 30, dtype=torch.long)
    documents[1, :padding] = 0
    positions = torch.arange(30).repeat(2, 1)
    positions[1] = (positions[1] - padding).clamp(min=0)

    def steps(rows: slice, start: int) -> torch.Tensor:
        cache = KVCache(network.config.num_hidden_layers, 50 - start)
        cache.extend_documents(documents[rows, start:])
        network(tokens[rows, start:30], positions[rows, start:], cache)
        step = FixedStep(network, cache, positions[rows, -1:] + 1)
        return torch.stack([step(tokens[rows, i : i + 1]) for i in range(30, 50)], 1)

    with torch.no_grad():
        together = steps(slice(None), 0)
        alone = torch.cat([steps(slice(0, 1), 0), steps(slice(1, 2), padding)])
    assert_close(together, alone, **FP32_CHAIN)


def test_num_trained_divides_the_sum(folders):
    tokens = random_tokens()
    model = sloth.load(folders["plain"], device="cpu")
    with torch.no_grad():
        mean, halved = (
            model.loss(tokens, tokens),
            model.loss(tokens, tokens, num_trained=2 * 2 * 69),
        )
    assert_close(halved, mean / 2, **FP32_CHAIN)


def test_the_loss_of_packed_documents_is_the_sum_of_theirs(folders):
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    tokens = random_tokens(1)
    model = sloth.load(folders["plain"], level="ops", device="cpu")
    with torch.no_grad():
        losses = [model.loss(t, t, num_trained=1) for t in (tokens[:, :30], tokens[:, 30:])]
        assert_close(model.loss(tokens, tokens, positions, 1), sum(losses), **FP32_CHAIN)


def test_tied_head_stores_one_matrix_and_sums_both_gradients(folders):
    network = sloth.load(folders["tied_biased"], device="cpu").network
    assert "lm_head.weight" not in dict(network.named_parameters())
    logits = network(random_tokens(1, 8))
    F.cross_entropy(logits[0], torch.arange(8)).backward()
    assert network.model.embed_tokens.weight.grad.abs().sum() > 0


def test_old_and_new_config_spellings_read_alike(folders):
    new = read_config(folders["llama3"])
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    scaling = dict(new["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    old |= {"rope_scaling": scaling, "torch_dtype": "float32"}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)


def config_with(**changes: object) -> dict[str, object]:
    base = dict(
        model_type="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return base | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "zeta": 1}}, "zeta"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_settings_that_would_change_the_mathematics_are_refused_by_name(changes, words):
    with pytest.raises(errors.UnsupportedConfig, match=words):
        LlamaConfig.from_hf(config_with(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": "48"}, "positive whole number"),
        ({"num_attention_heads": 0}, "positive whole number"),
        ({"num_hidden_layers": 2.5}, "positive whole number"),
        ({"head_dim": 3}, "even"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"rms_norm_eps": "x"}, "positive number"),
        ({"rope_theta": float("nan")}, "positive number"),
        ({"tie_word_embeddings": "maybe"}, "true or false"),
        ({"rope_parameters": "yarn"}, "an object"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "positive number"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "known: default"),
    ],
)
def test_malformed_values_are_named_with_what_was_expected(changes, expected):
    key, value = list(changes.items())[-1]
    while isinstance(value, dict):
        key, value = list(value.items())[-1]
    with pytest.raises(errors.UnsupportedConfig, match=expected) as caught:
        LlamaConfig.from_hf(config_with(**changes))
    assert str(value) in str(caught.value)
    assert key in str(caught.value) or expected == "even"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keys_of_other_types_are_read_over_where_they_change_nothing(model_type):
    config_class, _ = ARCHITECTURES[model_type]
    plain = config_with(model_type=model_type, hidden_act=None)
    neutral = dict(attention_bias=False, mlp_bias=False, use_mrope=False, hidden_wobble=None)
    assert config_class.from_hf(plain | neutral) == config_class.from_hf(plain)


def test_a_key_of_the_rotary_settings_can_be_ignored_on_purpose():
    given = config_with(rope_scaling={"type": "linear", "factor": 2.0, "zeta": 1})
    with pytest.raises(errors.UnsupportedConfig, match=r"zeta=1.*ignore_config=\['zeta'\]"):
        LlamaConfig.from_hf(given)
    plain = config_with(rope_scaling={"type": "linear", "factor": 2.0})
    assert LlamaConfig.from_hf(given, ignore=["zeta"]) == LlamaConfig.from_hf(plain)


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
