"""Qwen 2: biases on q, k and v, a window on the upper layers, tied small models."""

from __future__ import annotations

import pytest

from sloth.errors import UnsupportedConfig
from sloth.models.qwen2 import Qwen2Config
from tests.models.common import YARN, ArchitectureTests

WINDOW = dict(use_sliding_window=True, sliding_window=16, max_window_layers=2)


class TestQwen2(ArchitectureTests):
    model_type = "qwen2"
    variants = {
        "window": WINDOW | dict(head_dim=32, rope_parameters=YARN),
        "plain": dict(head_dim=16, num_key_value_heads=4),
        "tied": dict(head_dim=16, tie_word_embeddings=True, num_key_value_heads=1),
    }
    unread = dict(hidden_act="gelu", qk_norm=True, use_mrope=True)
    defects = dict(sliding_window=17, rms_norm_eps=1e-2)


BASE = dict(
    model_type="qwen2",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
)


def windows(**settings: object) -> list[int | None]:
    return [spec.window for spec in Qwen2Config.from_hf(BASE | settings).layers()]


def test_a_window_counts_only_where_it_is_switched_on():
    assert windows(sliding_window=16, max_window_layers=0) == [None] * 3
    on = dict(use_sliding_window=True, sliding_window=16)
    assert windows(**on) == [None] * 3  # below layer 28
    assert windows(**on, max_window_layers=1) == [None, 16, 16]
    named = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(**on, max_window_layers=1, layer_types=named) == [16, None, None]
    with pytest.raises(UnsupportedConfig, match="sliding_window"):
        windows(layer_types=named)
    with pytest.raises(UnsupportedConfig, match="layer_types"):
        windows(layer_types=named[:2])
    with pytest.raises(UnsupportedConfig, match="layer_types"):
        windows(layer_types=["chunked_attention"] * 3)
