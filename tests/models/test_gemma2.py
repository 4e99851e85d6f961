"""Gemma 2: four norms a layer, capped scores and logits, alternating windows."""

from __future__ import annotations

from sloth.models.gemma2 import Gemma2Config
from tests.models.common import LINEAR, ArchitectureTests

# Caps so low that scores and logits of size 1 are bent, not only the rare large one.
TINY = dict(
    head_dim=32,
    sliding_window=16,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.0,
    tie_word_embeddings=True,
)


class TestGemma2(ArchitectureTests):
    model_type = "gemma2"
    variants = {
        "bent": TINY,
        "as_released": TINY | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        "no_caps_untied": TINY
        | dict(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
            attention_bias=True,
        ),
        "linear_one_kv_head": TINY | dict(num_key_value_heads=1, rope_parameters=LINEAR),
    }
    unread = dict(hidden_activation="silu", sliding_window_size=99)
    defects = dict(
        attn_logit_softcapping=1.6,
        final_logit_softcapping=2.1,
        sliding_window=17,
        query_pre_attn_scalar=25,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )


def test_absent_settings_are_the_releases_and_null_caps_are_off():
    base = dict(
        model_type="gemma2",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="gelu_pytorch_tanh",
        cache_implementation="hybrid",
        sliding_window_size=4096,
    )
    config = Gemma2Config.from_hf(base)
    assert [spec.window for spec in config.layers()] == [4096, None, 4096]
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.query_pre_attn_scalar, config.head_dim) == (256, 256)
    off = Gemma2Config.from_hf(base | dict(attn_logit_softcapping=None))
    assert off.attn_logit_softcapping is None
    assert Gemma2Config.from_hf(off.to_hf()) == off
