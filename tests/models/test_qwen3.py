"""Qwen 3: q and k normed per head before the rotary positions."""

from __future__ import annotations

import json

import pytest
import torch

import sloth
from sloth.models.qwen3 import Qwen3Config
from tests.models.common import YARN, ArchitectureTests, random_tokens, read_config
from tests.oracles import hf_logits, save_tiny

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


def test_yarn_with_a_factor_for_other_programs_equals_hugging_face(tmp_path):
    """As DeepSeek-R1-0528-Qwen3-8B has it, with a length that 70 tokens pass."""
    folder = save_tiny("qwen3", tmp_path / "base", head_dim=32)
    given = read_config(folder)
    del given["rope_parameters"]
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    given |= dict(rope_theta=1e6, rope_scaling=scaling | dict(attn_factor=0.8782488562869419))
    (folder / "config.json").write_text(json.dumps(given))
    tokens = random_tokens()
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.warns(UserWarning, match="attn_factor=0.878.*Transformers does not read"):
            model = sloth.load(folder, level="reference", dtype=dtype, device="cpu")
        with torch.no_grad():
            assert torch.equal(model.logits(tokens), hf_logits(folder, tokens, dtype))


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
