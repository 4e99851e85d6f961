"""Mistral, Ministral and Ministral 3: windows, heads apart from the width, scaled queries."""

from __future__ import annotations

import json

import pytest
import torch

import sloth
from sloth.errors import UnsupportedConfig
from sloth.models.mistral import MistralConfig
from sloth.models.rope import QueryScale
from tests.models.common import LINEAR, YARN, ArchitectureTests, random_tokens, read_config
from tests.oracles import hf_logits, save_tiny

# Past 16 tokens queries grow; mscale makes YaRN's attention factor differ from 1.
GROWING = YARN | dict(
    llama_4_scaling_beta=0.3, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5
)
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


class TestMistral(ArchitectureTests):
    model_type = "mistral"
    variants = {
        "window": dict(sliding_window=16, head_dim=32),
        "no_window": dict(sliding_window=None, head_dim=16, num_key_value_heads=4),
        "yarn_tied": dict(sliding_window=None, rope_parameters=YARN, tie_word_embeddings=True),
        "window_linear": dict(sliding_window=7, rope_parameters=LINEAR),
        "ministral": dict(model_type="ministral", sliding_window=16, layer_types=MIXED),
        "ministral3": dict(model_type="ministral3", rope_parameters=GROWING),
        "ministral3_window": dict(
            model_type="ministral3",
            sliding_window=16,
            rope_parameters=GROWING | dict(mscale=1.0, mscale_all_dim=1.0),
            tie_word_embeddings=True,
        ),
    }
    # layer_types: read from a whole config.json, whose type they change, not from a text_config
    unread = dict(layer_types=MIXED, attention_bias=True, hidden_act="gelu")
    defects = dict(sliding_window=17, rms_norm_eps=1e-2)


@pytest.mark.parametrize("kinds", [MIXED, None], ids=["mixed", "null"])
def test_mistral_with_layer_types_is_ministral_as_for_hugging_face(tmp_path, kinds):
    settings = dict(sliding_window=16, layer_types=kinds)
    folder = save_tiny("ministral", tmp_path / "base", **settings)
    saved = read_config(folder) | dict(model_type="mistral", layer_types=kinds)
    (folder / "config.json").write_text(json.dumps(saved | {"architectures": None}))
    tokens = random_tokens()
    for dtype in (torch.float32, torch.bfloat16):
        model = sloth.load(folder, level="reference", dtype=dtype, device="cpu")
        expected = hf_logits(folder, tokens, dtype)
        with torch.no_grad():
            assert torch.equal(model.logits(tokens), expected)
        again = model.save_base(tmp_path / str(dtype))
        assert torch.equal(hf_logits(again, tokens, dtype), expected)
    assert read_config(again)["model_type"] == "ministral"
    assert model.network.model_type == "ministral" and model.level == "reference"


BASE = dict(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def config(model_type: str = "mistral", **settings: object) -> MistralConfig:
    return MistralConfig.from_hf(BASE | dict(model_type=model_type) | settings)


def test_an_absent_window_is_the_types_default_and_a_null_one_is_none():
    assert [spec.window for spec in config().layers()] == [4096, 4096]
    assert [spec.window for spec in config(sliding_window=None).layers()] == [None, None]
    assert [spec.window for spec in config("ministral").layers()] == [4096, 4096]
    assert [spec.window for spec in config("ministral3").layers()] == [None, None]


def test_a_window_of_no_keys_is_refused():
    with pytest.raises(UnsupportedConfig, match="sliding_window=0.*null for no window"):
        config(sliding_window=0)


def test_ministral3_without_rotary_settings_gets_the_types_own():
    built = config("ministral3")
    assert built.rope.rope_type == "yarn" and built.rope["factor"] == 16.0
    assert built.query_scale == QueryScale(0.1, 16384)


def test_a_query_scale_needs_its_length_and_its_type():
    scaled = dict(rope_theta=1e4, rope_type="default", llama_4_scaling_beta=0.1)
    with pytest.raises(UnsupportedConfig, match="original_max_position_embeddings"):
        config("ministral3", rope_parameters=scaled)
    with pytest.raises(UnsupportedConfig, match="llama_4_scaling_beta"):
        config("mistral", rope_parameters=scaled)


def test_the_query_scale_is_one_up_to_the_original_length_and_a_staircase_beyond():
    table = QueryScale(0.1, 4).table(torch.arange(13)[None], torch.float64)[0, :, 0, 0]
    steps = 1 + 0.1 * torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(table, steps.repeat_interleave(4)[:13].double())
