"""Every architecture's row: what is written from a Hugging Face folder is read back as that folder,
by sloth and by Hugging Face's own GGUF loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import sloth
from sloth.errors import UnsupportedConfig
from sloth.formats.gguf import GGUFFile
from sloth.formats.gguf_archs import GGUF_ARCHS, arch_of_model, interleave, uninterleave
from sloth.formats.gguf_config import hyperparameters
from sloth.formats.gguf_write import largest_error, model_metadata, plan, write_model
from tests.formats.gguf_files import byte_level_vocabulary
from tests.oracles import hf_gguf_logits, hf_logits, save_tiny
from tests.test_lora import randomised
from tests.text.test_tokenizer import byte_level_folder
from tests.tiny_configs import GGUF_TYPES
from tests.tolerance import BF16_WEIGHTS_LOGITS, FP32_CHAIN

VOCAB = 340
TOKENS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(5))
# Hugging Face's loader has no row for these; llama files stand for mistral, gemma2 for gemma.
WITHOUT_HF_LOADER = {"gemma", "ministral3", "smollm3"}


# Whether llama.cpp rotates neighbouring pairs (LLAMA_ROPE_TYPE_NORM of its llama_model_rope_type),
# for which its converter reorders the rows. sloth's own reader undoes what its writer did, right
# or wrong, so it is written down here once more, from their source.
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp
ROTATES_NEIGHBOURS = {
    **{"llama": True, "mistral3": True, "smollm3": True},
    **{"qwen2": False, "qwen3": False, "gemma": False, "gemma2": False, "gemma3": False},
}


def test_heads_are_stored_in_the_order_that_llama_cpp_rotates() -> None:
    stored = {name: arch.interleaved for name, arch in GGUF_ARCHS.items()}
    assert stored == ROTATES_NEIGHBOURS, "look a new architecture up there, and add it here"


def vocabulary() -> dict[str, Any]:
    tokens, merges = byte_level_vocabulary(VOCAB)
    num_pads = VOCAB - len(tokens)
    kinds = [3] * 3 + [1] * (len(tokens) - 3) + [5] * num_pads
    found = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + [f"[PAD{index}]" for index in range(num_pads)],
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def write_folder(folder: Path, path: Path, quant: str = "f16", **changes: Any) -> Path:
    """The model in a Hugging Face folder as a GGUF file."""
    config = json.loads((folder / "config.json").read_text()) | changes
    arch = arch_of_model(config["model_type"])
    assert arch is not None
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    metadata = model_metadata(arch, config, vocabulary(), "tiny", quant)
    write_model(path, arch, config, metadata, plan(arch, shapes, quant), tensors.items())
    return path


def halved(folder: Path) -> None:
    """Round a folder's matrices to fp16, so that a file in f16 holds them exactly."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    rounded = {k: v.half().float() if v.dim() == 2 else v for k, v in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=GGUF_TYPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archs") / request.param
    save_tiny(request.param, path, vocab_size=VOCAB)
    halved(path)
    return path


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_folder(folder, folder.parent / f"{folder.name}.gguf")


def test_tensors_come_back(folder: Path, file: Path) -> None:
    """Matrices exactly; Gemma's norms are stored plus one, which costs a rounding."""
    read = GGUFFile(file)
    expected = load_file(folder / "model.safetensors")
    assert read.names == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        if read.arch.norm_offset and name.endswith("norm.weight"):
            assert bool(((read.tensor(name) - tensor).abs() <= largest_error(tensor, "F32")).all())
        else:
            assert torch.equal(read.tensor(name), tensor), name


def test_config_comes_back(folder: Path, file: Path) -> None:
    told = GGUFFile(file).config
    original = json.loads((folder / "config.json").read_text())
    is_mistral = original["model_type"] in ("mistral", "ministral")
    for key in told.keys() & original.keys():
        if not (is_mistral and key in ("architectures", "model_type")):
            assert told[key] == original[key], key
    needed = {"hidden_size", "rope_parameters", "rms_norm_eps", "vocab_size", "num_hidden_layers"}
    assert needed <= told.keys() & original.keys()
    windows = {"sliding_window", "layer_types", "query_pre_attn_scalar"}
    if original["model_type"] in ("gemma2", "gemma3_text"):
        assert windows <= told.keys()


def test_hugging_faces_loader_computes_the_same(folder: Path, file: Path) -> None:
    if folder.name in WITHOUT_HF_LOADER:
        pytest.skip(f"Hugging Face reads no {folder.name} GGUF files")
    assert_close(hf_gguf_logits(file, TOKENS), hf_logits(folder, TOKENS), **FP32_CHAIN)


def test_sloth_computes_the_same_from_file_and_folder(folder: Path, file: Path) -> None:
    from_file = sloth.load(file, device="cpu").logits(TOKENS)
    assert_close(from_file, sloth.load(folder, device="cpu").logits(TOKENS), **FP32_CHAIN)


def test_a_model_of_every_type_is_written_and_verified(folder: Path, tmp_path: Path) -> None:
    """Through the model, whose config is compared with the file's."""
    byte_level_folder(folder)
    model = sloth.load(folder, device="cpu", level="reference").add_lora(r=2, alpha=2)
    path = randomised(model).save_gguf(tmp_path / "model.gguf", "bf16")
    model.save_adapter(tmp_path / "adapter", format="gguf")
    again = sloth.load(path, device="cpu", level="reference").logits(TOKENS).detach()
    expected = model.logits(TOKENS).detach()
    error = (again - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < BF16_WEIGHTS_LOGITS


@pytest.mark.parametrize("name", GGUF_ARCHS)
def test_names_are_the_gguf_packages(name: str) -> None:
    arch = GGUF_ARCHS[name]
    (package_arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    theirs = gguf.get_tensor_name_map(package_arch, 2)
    for module in ("model.embed_tokens", "model.norm"):
        assert arch.gguf_name(f"{module}.weight") == f"{theirs.get_name(module)}.weight"
    for module in arch.names:
        path = f"model.layers.1.{module}"
        stored = arch.gguf_name(f"{path}.weight")
        assert stored == f"{theirs.get_name(path)}.weight"
        assert arch.hf_name(stored) == f"{path}.weight"
    # What stands before the MLP has one name in the package for all architectures; a norm after
    # the attention is told apart by the architecture's list of tensors.
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[package_arch]}
    for stored in arch.names.values():
        assert f"blk.{{bid}}.{stored}" in known


@pytest.mark.parametrize("name", GGUF_ARCHS)
def test_keys_are_the_gguf_packages(name: str) -> None:
    parts = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    known = {value for part in parts for value in vars(part).values() if isinstance(value, str)}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    rope |= {"original_max_position_embeddings": 8, "beta_fast": 8.0, "beta_slow": 2.0}
    config: dict[str, Any] = dict.fromkeys(
        ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"), 8
    )
    config |= dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "vocab_size"), 4)
    config |= {"rms_norm_eps": 1e-6, "rope_parameters": rope}
    arch = GGUF_ARCHS[name]
    config |= dict.fromkeys(arch.keys.values(), 2)
    if arch.local_rope:
        plain = {"rope_type": "default", "rope_theta": 1e4}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain}
    for key in hyperparameters(arch, config):
        assert "{arch}." + key in known, key


def test_reordering_rows_is_undone() -> None:
    value = torch.arange(24.0).reshape(12, 2)
    there = interleave(value, 2)
    assert there[:, 0].div(2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(uninterleave(there, 2), value)


def test_biases_are_reordered_like_their_rows(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m", vocab_size=VOCAB, attention_bias=True)
    read = GGUFFile(write_folder(folder, tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    bias = load_file(folder / "model.safetensors")["model.layers.1.self_attn.q_proj.bias"]
    assert torch.equal(read.tensor("model.layers.1.self_attn.q_proj.bias"), bias)
    assert torch.equal(stored["blk.1.attn_q.bias"], interleave(bias, 4))
    assert stored["blk.1.attn_q.bias"].dtype == torch.float32


# -- scaling and windows ---------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32, "beta_fast": 16.0}


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, YARN], ids=lambda rope: rope["rope_type"])
def test_rotary_scaling_comes_back(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m", vocab_size=VOCAB, rope_parameters=rope)
    path = write_folder(folder, tmp_path / "m.gguf")
    assert GGUFFile(path).config["rope_parameters"] == rope


def test_gemma3s_two_rotary_tables_come_back(tmp_path: Path) -> None:
    rope = {
        "full_attention": LINEAR | {"rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
    }
    folder = save_tiny("gemma3_text", tmp_path / "m", vocab_size=VOCAB, rope_parameters=rope)
    read = GGUFFile(write_folder(folder, tmp_path / "m.gguf"))
    assert read.config["rope_parameters"] == rope
    types = read.config["layer_types"]
    assert [kind == "full_attention" for kind in types] == [False] * 5 + [True, False]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"mscale": 0.7}, "mscale"),
        ({"mscale": None}, "mscale_all_dim without mscale"),
        ({"truncate": False}, "truncate"),
        ({"attention_factor": 1.5}, "attention_factor"),
        ({"rope_type": "linear"}, "yarn alone"),
    ],
)
def test_ministral3s_scaling_is_refused_where_the_program_would_take_another(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """It takes mscale for 1, and the length from which queries grow for yarn's."""
    folder = save_tiny("ministral3", tmp_path / "m", vocab_size=VOCAB, num_hidden_layers=1)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"] | changes
    with pytest.raises(UnsupportedConfig, match=says):
        write_folder(folder, tmp_path / "m.gguf", rope_parameters=rope)


def test_ministral3s_scaling_is_stated_in_the_programs_words(tmp_path: Path) -> None:
    folder = save_tiny("ministral3", tmp_path / "m", vocab_size=VOCAB, num_hidden_layers=1)
    fields = gguf.GGUFReader(write_folder(folder, tmp_path / "m.gguf")).fields
    got = {name: field.contents() for name, field in fields.items()}
    assert got["general.architecture"] == "mistral3"
    assert got["mistral3.attention.temperature_scale"] == torch.tensor(0.3).item()
    assert got["mistral3.rope.scaling.yarn_log_multiplier"] == 0.5
    assert got["mistral3.rope.scaling.original_context_length"] == 16


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rope_parameters": {**YARN, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "dynamic"),
    ],
)
def test_scaling_that_a_file_cannot_state_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path / "m", vocab_size=VOCAB, num_hidden_layers=1)
    with pytest.raises(UnsupportedConfig, match=says):
        write_folder(folder, tmp_path / "m.gguf", **changes)


def test_a_softcap_that_is_off_is_refused_where_absence_means_a_default(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "m", vocab_size=VOCAB, num_hidden_layers=1)
    with pytest.raises(UnsupportedConfig, match="attn_logit_softcapping"):
        write_folder(folder, tmp_path / "m.gguf", attn_logit_softcapping=None)


@pytest.mark.parametrize(
    "model_type, settings, positions",
    [
        ("mistral", {"sliding_window": 24}, 24),
        ("mistral", {"sliding_window": None}, 512),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}, 24),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 24}, 512),
        ("gemma2", {"sliding_window": 24}, 512),
    ],
)
def test_a_window_without_a_key_ends_the_context(
    model_type: str, settings: dict[str, Any], positions: int, tmp_path: Path
) -> None:
    folder = save_tiny(model_type, tmp_path / "m", vocab_size=VOCAB, **settings)
    assert (
        GGUFFile(write_folder(folder, tmp_path / "m.gguf")).config["max_position_embeddings"]
        == positions
    )


def test_smollm3s_layers_without_rotary_embedding_are_told(tmp_path: Path) -> None:
    folder = save_tiny("smollm3", tmp_path / "m", vocab_size=VOCAB)
    assert GGUFFile(write_folder(folder, tmp_path / "m.gguf")).config["no_rope_layers"] == [
        1,
        1,
        1,
        0,
        1,
    ]


def test_a_bias_the_program_does_not_read_is_refused(tmp_path: Path) -> None:
    arch = GGUF_ARCHS["qwen3"]
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(UnsupportedConfig, match=bias):
        plan(arch, {"model.embed_tokens.weight": (8, 8), bias: (8,)}, "f16")
    with pytest.raises(UnsupportedConfig, match="lm_head"):
        plan(GGUF_ARCHS["gemma2"], {"lm_head.weight": (8, 8)}, "f16")


# -- storage ---------------------------------------------------------------------------------------


def packed(value: Tensor, kind: str) -> Any:
    return gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("quant, kind", [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("bf16", "BF16")])
def test_bytes_are_the_reference_quantizers(quant: str, kind: str, tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "m", vocab_size=VOCAB)
    reader = gguf.GGUFReader(write_folder(folder, tmp_path / "m.gguf", quant))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    arch = GGUF_ARCHS["qwen2"]
    for name, value in load_file(folder / "model.safetensors").items():
        found = stored[arch.gguf_name(name)]
        if value.dim() == 1:
            assert found.tensor_type.name == "F32"
            continue
        expected = "Q8_0" if (quant, name) == ("q4_0", "lm_head.weight") else kind
        assert found.tensor_type.name == expected, name
        assert found.data.tobytes() == packed(value, expected).tobytes(), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1000.0])
def test_the_stated_error_is_kept_and_not_slack(kind: str, size: float) -> None:
    value = size * torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    type_id = gguf.GGMLQuantizationType[kind]
    back = torch.from_numpy(gguf.quants.dequantize(packed(value, kind), type_id).copy())
    share = (back - value).abs() / largest_error(value, kind)
    assert float(share.max()) <= 1
    if size >= 1:
        assert float(share.max()) > 0.5


# -- what the program takes for granted ------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, settings, says",
    [
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers"),
    ],
)
def test_what_the_program_would_compute_otherwise_is_refused(
    model_type: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = save_tiny(model_type, tmp_path / "m", vocab_size=VOCAB, **settings)
    byte_level_folder(folder)
    with pytest.raises(UnsupportedConfig, match=says):
        sloth.load(folder, device="cpu").save_gguf(tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_27b_models_query_scale_is_known_by_their_number_of_layers() -> None:
    config = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}
    gemma3 = GGUF_ARCHS["gemma3"].implied
    assert gemma3(config | {"num_hidden_layers": 62}) == {"query_pre_attn_scalar": 168}
    assert gemma3(config | {"num_hidden_layers": 48}) == {"query_pre_attn_scalar": 128}
