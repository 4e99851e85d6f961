"""SmolLM3: layers without rotary positions."""

from __future__ import annotations

import pytest

from sloth.errors import UnsupportedConfig
from sloth.models.smollm3 import SmolLM3Config
from tests.models.common import YARN, ArchitectureTests


class TestSmolLM3(ArchitectureTests):
    model_type = "smollm3"
    variants = {
        "tied": dict(
            head_dim=32, num_hidden_layers=5, tie_word_embeddings=True, rope_parameters=YARN
        ),
        "window_biased": dict(
            head_dim=16,
            num_hidden_layers=3,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    }
    unread = dict(hidden_act="gelu", sliding_windows=4)
    defects = dict(no_rope_layers=[1, 1, 1, 1, 1], rms_norm_eps=1e-2)


BASE = dict(
    model_type="smollm3",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=8,
    num_attention_heads=2,
)


def test_every_fourth_layer_has_no_rotary_positions_unless_said():
    config = SmolLM3Config.from_hf(BASE | dict(max_window_layers=28))
    assert [i for i, spec in enumerate(config.layers()) if spec.rope is None] == [3, 7]
    assert config.rope.theta == 2e6 and config.tie_word_embeddings
    second = SmolLM3Config.from_hf(BASE | dict(no_rope_layer_interval=2)).layers()
    assert [spec.rope is None for spec in second] == [False, True] * 4
    with pytest.raises(UnsupportedConfig, match="no_rope_layers"):
        SmolLM3Config.from_hf(BASE | dict(no_rope_layers=[1, 0]))
    with pytest.raises(UnsupportedConfig, match="no_rope_layers.*8 entries"):
        SmolLM3Config.from_hf(BASE | dict(no_rope_layers=["x"] * 8))
