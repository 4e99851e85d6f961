"""Rotary tables: right at long positions, in fp32, for every scaling type."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

import sloth
from sloth.errors import UnsupportedConfig
from sloth.models.rope import Rope, RopeParameters
from tests.oracles import hf_logits, save_tiny_llama
from tests.tolerance import ROPE_TABLE

SCALINGS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_right_at_positions_up_to_131072(name):
    rope = Rope(RopeParameters.from_hf(SCALINGS[name], 5e5, 128, 131072))
    positions = torch.tensor([[0, 1, 4095, 4096, 30000, 65537, 131071]])
    cos, sin = rope.tables(positions, torch.float32)
    angles = positions[..., None].double() * rope.frequencies.double()
    angles = torch.cat((angles, angles), -1)
    assert_close(cos.double(), angles.cos() * rope.attention_factor, **ROPE_TABLE)
    assert_close(sin.double(), angles.sin() * rope.attention_factor, **ROPE_TABLE)


def test_yarn_takes_its_factor_from_the_two_lengths():
    given = {"rope_type": "yarn", "original_max_position_embeddings": 8192}
    explicit = RopeParameters.from_hf(given | {"factor": 16.0}, 5e5, 128, 131072)
    assert RopeParameters.from_hf(given, 5e5, 128, 131072) == explicit


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_a_length_of_pretraining_beside_the_scaling_is_read_as_hugging_face_reads_it(
    kind, tmp_path
):
    inside = SCALINGS[kind] | {"original_max_position_embeddings": 16, "factor": 4.0}
    folder = save_tiny_llama(tmp_path / "m", rope_parameters=inside | {"rope_theta": 1e4})
    expected = sloth.load(folder, device="cpu").network.config.rope
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 64  # what is beside it wins
    config["original_max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    model = sloth.load(folder, device="cpu", level="reference")
    assert model.network.config.rope == expected
    tokens = torch.arange(40)[None] + 3
    with torch.no_grad():
        assert torch.equal(model.logits(tokens), hf_logits(folder, tokens))


def test_a_plain_table_may_be_told_that_its_factor_is_one():
    plain = RopeParameters.from_hf(None, 1e4, 64, 2048)
    assert RopeParameters.from_hf({"type": "default", "factor": 1.0}, 1e4, 64, 2048) == plain
    with pytest.raises(UnsupportedConfig, match=r"factor=2\.0"):
        RopeParameters.from_hf({"type": "default", "factor": 2.0}, 1e4, 64, 2048)


def test_tables_in_bf16_are_the_fp32_ones_rounded_once():
    rope = Rope(RopeParameters.from_hf(None, 1e4, 64, 2048))
    positions = torch.arange(1000, 2000)[None]
    wide, narrow = (rope.tables(positions, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(wide.bfloat16(), narrow)


def test_tables_without_values_change_nothing_that_is_kept():
    rope = Rope(RopeParameters.from_hf(SCALINGS["dynamic"], 1e4, 16, 8))
    before = rope.tables(torch.arange(20)[None], torch.float32)
    cos, sin = rope.tables(torch.arange(40, device="meta")[None], torch.bfloat16)
    assert cos.is_meta and sin.is_meta and cos.shape == (1, 40, before[0].shape[-1])
    assert cos.dtype == torch.bfloat16
    after = rope.tables(torch.arange(20)[None], torch.float32)
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
