"""GGUF files give back the model they were written from; damaged ones say what is wrong."""

from __future__ import annotations

import json
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sloth
from sloth.errors import CheckpointMismatch, SlothError, UnsupportedConfig
from sloth.formats.gguf import GGUFFile
from sloth.formats.gguf_header import read_header
from sloth.models.llama import LlamaConfig
from sloth.models.rope import Rope, RopeParameters
from sloth.text.tokenizer import Tokenizer
from tests.assets import smollm2
from tests.formats.gguf_files import write_gguf
from tests.oracles import hf_tokenizer, save_tiny_llama
from tests.tiny_configs import LLAMA_VARIANTS

Kind = gguf.GGMLQuantizationType
VOCAB = 320
MOST_SECONDS = 0.5  # to refuse a header that states absurd counts
MODELS: dict[str, dict[str, Any]] = {
    "untied, grouped": {},
    "tied, biased": LLAMA_VARIANTS["tied_biased"],
    "no_gqa": LLAMA_VARIANTS["no_gqa"],
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base"
    return save_tiny_llama(path, **{"vocab_size": VOCAB, **MODELS[request.param]})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder and its F32 file for tests of settings and damage."""
    folder = tmp_path_factory.mktemp("small") / "base"
    save_tiny_llama(
        folder, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=32, intermediate_size=32
    )
    write_gguf(folder, folder / "model.gguf")
    return folder


def hf_config(folder: Path) -> LlamaConfig:
    return LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))


def test_fp32_tensors_and_config_come_back_exactly(folder: Path, tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(folder, tmp_path / "m.gguf"))
    original = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in original.items()} == file.names
    for name, tensor in original.items():
        got = file.tensor(name)
        assert torch.equal(got, tensor), name
        assert got.dtype == torch.float32 and got.is_contiguous()
    assert LlamaConfig.from_hf(file.config) == hf_config(folder)
    assert file.config["bos_token_id"] == 1 and file.config["eos_token_id"] == 2


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_quantized_rows_are_dequantised_then_put_in_order(
    folder: Path, tmp_path: Path, kind: Kind
) -> None:
    """Blocks lie within rows, so quantizing commutes with moving rows: equality is exact."""
    file = GGUFFile(write_gguf(folder, tmp_path / "m.gguf", kind))
    for name, tensor in load_file(folder / "model.safetensors").items():
        expected = tensor
        if tensor.dim() == 2:
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            expected = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
        assert torch.equal(file.tensor(name), expected), name


def test_loaded_gguf_computes_as_the_folder_does(folder: Path, tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 5, 9, 200, 31, 7]])
    from_file = sloth.load(write_gguf(folder, tmp_path / "m.gguf"), device="cpu")
    from_folder = sloth.load(folder, device="cpu")
    assert torch.equal(from_file.logits(tokens), from_folder.logits(tokens))
    text = "hello world 42"
    assert from_file.tokenizer.decode(from_file.tokenizer.encode(text)) == text


# -- rotary scaling --------------------------------------------------------------------------------


def rope_of(folder: Path, tmp_path: Path, **settings: Any) -> RopeParameters:
    return LlamaConfig.from_hf(
        GGUFFile(write_gguf(folder, tmp_path / "r.gguf", **settings)).config
    ).rope


def test_linear_and_yarn_scaling(small: Path, tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert rope_of(small, tmp_path, extra=linear).to_hf() == {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": 4.0,
    }
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.finetuned": True,
    }
    assert rope_of(small, tmp_path, extra=yarn).to_hf() == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
    }


def llama3_divisors(original: int, factor: float, **settings: float) -> Tensor:
    given = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": settings.get("low", 1.0),
        "high_freq_factor": settings.get("high", 4.0),
        "original_max_position_embeddings": original,
    }
    plain = Rope(RopeParameters.from_hf(None, 1e4, 32, 512)).frequencies
    return plain / Rope(RopeParameters.from_hf(given, 1e4, 32, 512)).frequencies


@pytest.mark.parametrize("original, factor", [(8192, 8.0), (8192, 32.0), (64, 8.0), (256, 2.5)])
def test_llama3_scaling_is_recovered_from_its_divisors(
    small: Path, tmp_path: Path, original: int, factor: float
) -> None:
    rope = rope_of(small, tmp_path, divisors=llama3_divisors(original, factor))
    assert rope.rope_type == "llama3" and rope["factor"] == factor
    assert rope["original_max_position_embeddings"] == original
    expected = Rope(RopeParameters.from_hf(None, 1e4, 32, 512)).frequencies
    expected = expected / llama3_divisors(original, factor)
    torch.testing.assert_close(Rope(rope).frequencies, expected)


def test_divisors_of_one_are_no_scaling(small: Path, tmp_path: Path) -> None:
    assert rope_of(small, tmp_path, divisors=torch.ones(16)).rope_type == "default"


@pytest.mark.parametrize(
    "divisors",
    [llama3_divisors(64, 8.0, high=8.0), torch.linspace(1, 8, 16), torch.full((8,), 2.0)],
    ids=["other ramp", "no llama3", "other length"],
)
def test_divisors_that_no_config_gives_are_refused(
    small: Path, tmp_path: Path, divisors: Tensor
) -> None:
    with pytest.raises(UnsupportedConfig, match="rope_freqs"):
        GGUFFile(write_gguf(small, tmp_path / "r.gguf", divisors=divisors))


# -- settings that are not computed ----------------------------------------------------------------


@pytest.mark.parametrize(
    "extra, says",
    [
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.type": "linear"}, "factor is missing"),
        ({"rope.dimension_count": 16}, "rope.dimension_count is 16"),
    ],
)
def test_settings_that_cannot_be_represented_are_refused(
    small: Path, tmp_path: Path, extra: dict[str, Any], says: str
) -> None:
    path = write_gguf(small, tmp_path / "m.gguf", extra=extra)
    with pytest.raises(UnsupportedConfig, match=says):
        GGUFFile(path)


def test_an_unknown_key_is_refused_by_name_and_can_be_ignored(small: Path, tmp_path: Path) -> None:
    path = write_gguf(small, tmp_path / "m.gguf", extra={"logit_scale": 8.0, "expert_count": 0})
    with pytest.raises(UnsupportedConfig, match="llama.logit_scale"):
        sloth.load(path, device="cpu")
    model = sloth.load(path, device="cpu", ignore_config=["llama.logit_scale"])
    assert model.logits(torch.tensor([[1, 2]])).isfinite().all()


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_context_length(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedConfig, match="mamba.*llama, .*qwen2"):
        GGUFFile(tmp_path / "m.gguf")


def test_without_the_gguf_package_the_error_says_what_to_install(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedConfig, match=r"sloth-llm\[gguf\]"):
        GGUFFile(small / "model.gguf")


# -- damage ----------------------------------------------------------------------------------------


def test_cut_files_are_refused(small: Path, tmp_path: Path) -> None:
    content = (small / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    places = [0, 3, 10, 23, 24, 100, 2000, len(content) // 2, len(content) - 64]
    for place in places:
        cut.write_bytes(content[:place])
        with pytest.raises(CheckpointMismatch, match="cut.gguf"):
            GGUFFile(cut)


def test_metadata_without_sense_are_a_mismatch(small: Path, tmp_path: Path) -> None:
    extra = {"rope.scaling.type": "linear", "rope.scaling.factor": "x"}
    path = write_gguf(small, tmp_path / "odd.gguf", extra=extra)
    with pytest.raises(CheckpointMismatch, match="odd.gguf"):
        GGUFFile(path)
    file = GGUFFile(small / "model.gguf")
    file.metadata["tokenizer.ggml.token_type"] = 7
    with pytest.raises(CheckpointMismatch, match="model.gguf"):
        file.tokenizer_files()


def test_flipped_bytes_give_an_error_of_ours_or_a_model(small: Path, tmp_path: Path) -> None:
    content = (small / "model.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    draw = random.Random(0)
    num_refused = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[draw.randrange(9000)] = draw.randrange(256)
        damaged.write_bytes(changed)
        try:
            file = GGUFFile(damaged)
            file.tokenizer_files()
        except SlothError:
            num_refused += 1
    assert num_refused > 50


HEADER = b"GGUF" + struct.pack("<I", 3)
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "content",
    [
        HEADER + struct.pack("<QQ", 2**60, 0),
        HEADER + struct.pack("<QQ", 0, 2**60),
        HEADER + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 0, 2**60),
        HEADER + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**40),
        HEADER + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1),
        HEADER + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", 8, 2**62),
        HEADER + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 77),
        HEADER + struct.pack("<QQ", 0, 2) + (KEY + struct.pack("<IB", 0, 1)) * 2,
        HEADER + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 2**31),
        b"GGUF" + struct.pack(">I", 3) + bytes(24),
        b"GGML" + bytes(40),
    ],
    ids="tensors keys array strings nested text type twice dims big-endian magic".split(),
)
def test_header_bombs_are_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bomb.gguf"
    path.write_bytes(content + bytes(64))
    began = time.process_time()
    with pytest.raises(CheckpointMismatch, match="bomb.gguf"):
        read_header(path)
    assert time.process_time() - began < MOST_SECONDS


# -- a real model ----------------------------------------------------------------------------------


def test_smollm2_is_read_as_what_it_is(tmp_path: Path) -> None:
    file = GGUFFile(smollm2())
    assert len(file.names) == 272
    config = LlamaConfig.from_hf(file.config)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rope.theta == 1e5 and config.rms_norm_eps == 1e-5 and config.tie_word_embeddings
    norm = file.tensor("model.norm.weight")
    assert norm.shape == (576,) and norm.isfinite().all()
    for name, content in file.tokenizer_files().items():
        (tmp_path / name).write_text(content)
    ours, theirs = Tokenizer.from_folder(tmp_path), hf_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "What is 2 + 2, \u00e9l\u00e8ve \U0001f600?"}]
    assert ours.chat is not None
    text = ours.chat.render(messages, add_generation_prompt=True)
    ids = ours.encode(text, add_special_tokens=False)
    template = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == template and ours.decode(ids, skip_special_tokens=False) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, 2, (2,))
    assert ours.encode("hello") == theirs.encode("hello") == [28120]
