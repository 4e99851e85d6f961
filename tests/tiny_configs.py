"""Configs of the tiny random models that tests compare with: what `tests.oracles` builds."""

from __future__ import annotations

from typing import Any

# Every size differs from its neighbours so that a swapped dimension cannot pass: head_dim is not
# hidden / heads, two query heads share one kv head.
TINY_LLAMA: dict[str, Any] = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# name -> settings beside TINY_LLAMA; original lengths are short so that every scaling is active.
LLAMA_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_biased": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "no_gqa": dict(num_key_value_heads=4, head_dim=16),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "dynamic": dict(
        max_position_embeddings=32,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    ),
    "llama3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "yarn": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "yarn_mscale": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=8.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=1.2,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        )
    ),
}

# model_type -> settings beside TINY_LLAMA; sizes as Hugging Face's GGUF loader needs them, which
# takes head sizes and query scales of some types from its own defaults.
_GEMMA: dict[str, Any] = dict(head_dim=256, tie_word_embeddings=True)
GGUF_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "ministral": dict(sliding_window=64, layer_types=["full_attention"] * 4),
    "ministral3": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=0.5,
            llama_4_scaling_beta=0.3,
        ),
    ),
    "qwen2": dict(head_dim=16),
    "qwen3": dict(head_dim=128, tie_word_embeddings=True),
    "gemma": _GEMMA,
    "gemma2": dict(**_GEMMA, sliding_window=16, query_pre_attn_scalar=256),
    "gemma3_text": dict(
        **_GEMMA, sliding_window=16, query_pre_attn_scalar=256, num_hidden_layers=7
    ),
    "smollm3": dict(head_dim=16, num_hidden_layers=5),
}
