"""Qwen 3: q and k normed per head before the rotary positions."""

from __future__ import annotations

from sloth.models.qwen3 import Qwen3Config
from tests.models.common import YARN, ArchitectureTests

WINDOW = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)


class TestQwen3(ArchitectureTests):
    model_type = "qwen3"
    variants = {
        "window": WINDOW | dict(head_dim=32, tie_word_embeddings=False, rope_parameters=YARN),
        "plain": dict(head_dim=16, num_key_value_heads=4, tie_word_embeddings=False),
        "biased_tied": dict(attention_bias=True, head_dim=32, tie_word_embeddings=True),
    }
    unread = dict(hidden_act="gelu", num_experts=8)
    defects = dict(sliding_window=17, rms_norm_eps=1e-2)


def test_heads_are_of_128_unless_said():
    config = Qwen3Config.from_hf(
        dict(
            model_type="qwen3",
            vocab_size=8,
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    assert config.head_dim == 128
