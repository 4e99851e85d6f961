"""Gemma 3, text: q and k norms of 1 + w, five windows to one full layer, two rotary bases."""

from __future__ import annotations

import pytest
import torch

import sloth
from sloth.errors import UnsupportedConfig
from sloth.models.gemma3 import Gemma3Config
from tests.models.common import ArchitectureTests, random_tokens
from tests.oracles import hf_logits, save_tiny

# Seven layers: both kinds and the tail after a full one.
TINY = dict(
    num_hidden_layers=7,
    head_dim=32,
    sliding_window=16,
    query_pre_attn_scalar=24,
    tie_word_embeddings=True,
)
LOCAL = dict(rope_type="default", rope_theta=1e4)
ROPES = {
    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    "sliding_attention": LOCAL,
}


class TestGemma3(ArchitectureTests):
    model_type = "gemma3_text"
    variants = {
        "scaled": TINY | dict(rope_parameters=ROPES),
        "as_1b": TINY | dict(num_key_value_heads=1),
        "untied_capped": TINY
        | dict(
            num_hidden_layers=4,
            layer_types=["full_attention", "sliding_attention"] * 2,
            tie_word_embeddings=False,
            attention_bias=True,
            final_logit_softcapping=2.0,
        ),
    }
    unread = dict(hidden_activation="silu", use_bidirectional_attention=True)
    defects = dict(
        sliding_window=17,
        query_pre_attn_scalar=25,
        layer_types=["sliding_attention"] * 7,
        rope_parameters=ROPES | {"sliding_attention": LOCAL | dict(rope_theta=2e4)},
    )


def test_a_cap_on_scores_is_read_over_as_by_hugging_face(tmp_path):
    folder = save_tiny("gemma3_text", tmp_path / "base", **TINY, attn_logit_softcapping=0.5)
    tokens = random_tokens()
    with pytest.warns(UserWarning, match="attn_logit_softcapping.*caps no scores"):
        model = sloth.load(folder, level="reference", device="cpu")
    with torch.no_grad():
        assert torch.equal(model.logits(tokens), hf_logits(folder, tokens))


# What the text_config of the first 4B files says, and no more.
OLD = dict(
    model_type="gemma3_text",
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=34,
    rope_scaling=dict(factor=8.0, rope_type="linear"),
    sliding_window=1024,
)


def test_old_files_leave_much_to_the_types_defaults():
    config = Gemma3Config.from_hf(OLD)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262208, 131072)
    specs = config.layers()
    assert [i for i, spec in enumerate(specs) if spec.window is None] == [5, 11, 17, 23, 29]
    full, local = specs[5].rope, specs[0].rope
    assert full is not None and local is not None and local.rope_type == "default"
    assert (full.rope_type, full["factor"], full.theta, local.theta) == ("linear", 8.0, 1e6, 1e4)


def test_old_and_new_spellings_read_alike():
    old = OLD | dict(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6)
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    new = {key: value for key, value in OLD.items() if key != "rope_scaling"} | dict(
        rope_parameters=ROPES, layer_types=(kinds * 6)[:34], _sliding_window_pattern=6
    )
    assert Gemma3Config.from_hf(old) == Gemma3Config.from_hf(new) == Gemma3Config.from_hf(OLD)
    two = Gemma3Config.from_hf(OLD | dict(sliding_window_pattern=2)).layers()
    assert [spec.window for spec in two[:4]] == [1024, None] * 2


def test_one_rotary_entry_for_both_kinds_is_refused():
    with pytest.raises(UnsupportedConfig, match="rope_theta"):
        Gemma3Config.from_hf(OLD | dict(rope_parameters=LOCAL))
