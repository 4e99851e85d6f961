"""Models and adapters written as GGUF: read back by sloth, Hugging Face and the gguf package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.testing import assert_close

import sloth
from sloth import errors, exporting_gguf
from sloth.exporting import merged_tensors
from sloth.formats.gguf import GGUFFile
from sloth.formats.gguf_archs import interleave
from sloth.lora import projections
from tests.assets import smollm2
from tests.oracles import WHOLE_BLOCKS, hf_gguf_logits, save_tiny, save_tiny_llama
from tests.test_lora import randomised
from tests.text.test_tokenizer import TEXTS, byte_level_folder
from tests.tiny_configs import LLAMA_VARIANTS
from tests.tolerance import FP32_CHAIN, FP32_MERGE, gguf_logit_error

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
TOKENS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(5))
QUANTS = ["f16", "bf16", "q8_0", "q4_0"]


def chat_folder(folder: Path, **settings: Any) -> Path:
    """A tiny model with tokenizer, chat template and two stop tokens."""
    save_tiny_llama(folder, **{"vocab_size": 340, **WHOLE_BLOCKS, **settings})
    byte_level_folder(folder, chat_template=TEMPLATE)
    end = FastTokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("gguf_out") / "base")


def load(path: Path, **settings: Any) -> sloth.Model:
    return sloth.load(path, device="cpu", level="reference", **settings)


@torch.no_grad()
def logits(model: sloth.Model) -> Tensor:
    return model.logits(TOKENS)


def rounded_by(model: sloth.Model, dtype: torch.dtype) -> sloth.Model:
    """The model with every matrix rounded once, in fp32 again."""
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.to(dtype))
    return model


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "tied_biased", "no_gqa", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("quant, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_16_bit_file_computes_as_the_model_rounded_once(
    variant: str, quant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(chat_folder(tmp_path / "base", **LLAMA_VARIANTS[variant]))
    path = model.save_gguf(tmp_path / "out" / "model.gguf", quant)
    expected = logits(rounded_by(model, dtype))
    assert torch.equal(logits(load(path)), expected)
    if variant in ("plain", "no_gqa"):  # Hugging Face's loader leaves out scaling and biases
        assert_close(hf_gguf_logits(path, TOKENS), expected, **FP32_CHAIN)


def test_a_window_that_the_file_cannot_say_is_said_aloud(tmp_path: Path) -> None:
    folder = save_tiny("mistral", tmp_path / "base", vocab_size=340, sliding_window=24)
    byte_level_folder(folder)
    with pytest.warns(UserWarning, match=r"24 tokens back.* context of 24 of the model's 512"):
        load(folder).save_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_a_quantized_file_computes_as_the_reference_quantizers_matrices(
    quant: str, folder: Path, tmp_path: Path
) -> None:
    model = load(folder)
    before = logits(model)
    path = model.save_gguf(tmp_path / "model.gguf", quant)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if parameter.dim() == 2:
                kind = "q8_0" if name == "lm_head.weight" else quant
                type_id = gguf.GGMLQuantizationType[kind.upper()]
                packed = gguf.quants.quantize(parameter.numpy(), type_id)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, type_id).copy()))
    again = logits(load(path))
    assert torch.equal(again, logits(model))
    error = float((again - before).square().mean().sqrt() / before.square().mean().sqrt())
    assert 0 < error < gguf_logit_error(quant)
    assert_close(hf_gguf_logits(path, TOKENS), again, **FP32_CHAIN)


@pytest.mark.parametrize("base", [None, "nf4"])
def test_the_adapter_is_merged_and_an_nf4_base_dequantised(
    base: str | None, folder: Path, tmp_path: Path
) -> None:
    model = randomised(load(folder, quant=base).add_lora())
    adapted = logits(model)
    path = model.save_gguf(tmp_path / "model.gguf", "bf16")
    assert torch.equal(logits(model), adapted), "saving changed the model"
    file = GGUFFile(path)
    for name, value in merged_tensors(model):
        stored = value.float() if value.dim() == 1 else value.bfloat16().float()
        assert torch.equal(file.tensor(name), stored), name


def test_a_head_trained_apart_from_the_embedding_is_written(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "base", tie_word_embeddings=True)
    config = sloth.LoraConfig(modules_to_save=["lm_head"])
    model = randomised(load(folder).add_lora(config))
    file = GGUFFile(model.save_gguf(tmp_path / "model.gguf"))
    assert file.config["tie_word_embeddings"] is False and "lm_head.weight" in file.names


def test_rows_that_are_no_whole_blocks_are_stored_in_f16(tmp_path: Path) -> None:
    model = load(chat_folder(tmp_path / "base", intermediate_size=100))
    path = model.save_gguf(tmp_path / "model.gguf", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 100
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0" and kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_metadata_as_the_gguf_package_reads_them(folder: Path, tmp_path: Path) -> None:
    path = load(folder).save_gguf(tmp_path / "model.gguf", "q8_0")
    fields = gguf.GGUFReader(path).fields
    got = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "base",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.block_count": 4,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.vocab_size": 340,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {name: got.get(name) for name in expected} == expected
    types = {name: fields[name].types[0].name for name in expected}
    assert types["llama.block_count"] == "UINT32" and types["llama.rope.freq_base"] == "FLOAT32"
    assert len(got["tokenizer.ggml.tokens"]) == 340


def test_the_tokenizer_gives_the_same_ids(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    again = load(model.save_gguf(tmp_path / "model.gguf")).tokenizer
    assert again.stop_ids == model.tokenizer.stop_ids and len(again.stop_ids) == 2
    for text in TEXTS:
        assert again.encode(text) == model.tokenizer.encode(text)
    messages = [{"role": "user", "content": "hello"}]
    assert again.chat is not None and model.tokenizer.chat is not None
    assert again.chat.render(messages) == model.tokenizer.chat.render(messages)


def test_the_modelfile_names_the_file_and_every_stop(folder: Path, tmp_path: Path) -> None:
    load(folder).save_gguf(tmp_path / "tiny-q8_0.gguf", "q8_0")
    assert (tmp_path / "Modelfile").read_text() == (
        'FROM ./tiny-q8_0.gguf\nPARAMETER stop "</s>"\nPARAMETER stop "<|end|>"\n'
    )
    assert {file.name for file in tmp_path.iterdir()} == {"tiny-q8_0.gguf", "Modelfile"}


def test_a_second_quant_in_the_folder_has_a_modelfile_of_its_own(
    folder: Path, tmp_path: Path
) -> None:
    model = load(folder)
    model.save_gguf(tmp_path / "a.gguf", "q8_0")
    model.save_gguf(tmp_path / "b.gguf", "bf16")
    for name, file in (("a", "Modelfile"), ("b", "b.Modelfile")):
        assert (tmp_path / file).read_text().startswith(f"FROM ./{name}.gguf\n")


def test_a_real_model_comes_back(tmp_path: Path) -> None:
    model = load(smollm2())
    again = load(model.save_gguf(tmp_path / "model.gguf", "bf16"))
    assert again.hf_config["rope_parameters"] == model.hf_config["rope_parameters"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in again.generate(messages, max_new_tokens=8)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["model.gguf"], ["Modelfile", "model.Modelfile"]])
def test_nothing_is_overwritten(names: list[str], folder: Path, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(errors.OutputExists, match=names[-1]):
        load(folder).save_gguf(tmp_path / "model.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_unknown_quantizations_and_endings_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="f16, bf16, q8_0, q4_0, got 'q4_k_m'"):
        model.save_gguf(tmp_path / "model.gguf", "q4_k_m")
    with pytest.raises(ValueError, match=r"\.gguf"):
        model.save_gguf(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "base")
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.save(str(folder / "tokenizer.json"))
    with pytest.raises(errors.UnsupportedConfig, match="Punctuation.*llama-bpe"):
        load(folder).save_gguf(tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base")
    with pytest.raises(errors.TokenizerMissing, match="tokenizer"):
        load(folder).save_gguf(tmp_path / "model.gguf")


ANOTHER_RAMP = {**LLAMA_VARIANTS["llama3"]["rope_parameters"], "low_freq_factor": 2.0}


@pytest.mark.parametrize(
    "settings, says",
    [
        (LLAMA_VARIANTS["dynamic"], "dynamic"),
        (LLAMA_VARIANTS["yarn_mscale"], "mscale"),
        ({"rope_parameters": ANOTHER_RAMP}, "llama3"),
    ],
    ids=["dynamic", "yarn", "llama3"],
)
def test_a_config_that_a_file_cannot_state_is_refused(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = load(chat_folder(tmp_path / "base", **settings))
    with pytest.raises(errors.UnsupportedConfig, match=says):
        model.save_gguf(tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_values_beyond_f16_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.network.model.embed_tokens.weight[5, 3] = 1e5
    with pytest.raises(errors.UnsupportedConfig, match="bf16"):
        model.save_gguf(tmp_path / "model.gguf", "f16")
    model.save_gguf(tmp_path / "model.gguf", "bf16")


@pytest.mark.parametrize("quant", QUANTS)
def test_a_damaged_file_is_noticed_and_not_published(
    quant: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)

    def damaged(model: sloth.Model) -> Any:
        for name, value in merged_tensors(model):
            if "layers.2.mlp.up_proj" in name:
                value = value.clone()
                value[7, 40:] = value[7, 40:].flip(0)
            yield name, value

    original = exporting_gguf.write_model

    def write(*arguments: Any) -> None:
        original(*arguments[:-1], damaged(model))

    monkeypatch.setattr(exporting_gguf, "write_model", write)
    with pytest.raises(errors.CheckpointMismatch, match="layers.2.mlp.up_proj"):
        model.save_gguf(tmp_path / "model.gguf", quant)
    assert list(tmp_path.iterdir()) == []


# -- the adapter -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "alpha": 8},
        {"r": 4, "alpha": 8, "use_rslora": True},
        {"r": 4, "alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.0}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_adapter_names_shapes_and_scale(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """A program adds alpha / r of B A to the file's matrix: that must be the model's s B A."""
    model = randomised(load(folder).add_lora(**settings))
    assert model.save_adapter(tmp_path / "out", format="gguf") == tmp_path / "out"
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    got = {name: field.contents() for name, field in reader.fields.items()}
    assert got["general.architecture"] == "llama" and got["general.type"] == "adapter"
    assert got["adapter.type"] == "lora" and got["adapter.lora.alpha"] == 8.0
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    adapted = projections(model.network)
    del adapted["lm_head"]
    assert len(stored) == 2 * len(adapted)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for path, module in adapted.items():
        _, _, layer, _, leaf = path.split(".")
        a, b = (stored[f"blk.{layer}.{names[leaf]}.weight.lora_{x}"] for x in "ab")
        lora = module.lora_slot
        assert lora is not None and a.shape == lora.A.shape and b.shape == lora.B.shape
        expected = (lora.scale * lora.B @ lora.A).detach()
        heads = {"q_proj": 4, "k_proj": 2}.get(leaf)
        expected = interleave(expected, heads) if heads else expected
        assert_close(got["adapter.lora.alpha"] / a.shape[0] * b @ a, expected, **FP32_MERGE)
    assert a.dtype == b.dtype == torch.float32


def test_base_file_plus_adapter_file_is_the_merged_file(folder: Path, tmp_path: Path) -> None:
    model = randomised(load(folder).add_lora(r=4, alpha=8))
    model.save_adapter(tmp_path / "adapter", format="gguf")
    merged = GGUFFile(model.save_gguf(tmp_path / "merged" / "m.gguf", "bf16"))
    base = GGUFFile(load(folder).save_gguf(tmp_path / "base" / "m.gguf", "bf16"))
    reader = gguf.GGUFReader(tmp_path / "adapter" / "adapter.gguf")
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    name = "model.layers.1.self_attn.k_proj.weight"
    delta = 8 / 4 * stored["blk.1.attn_k.weight.lora_b"] @ stored["blk.1.attn_k.weight.lora_a"]
    together = base.arch.to_file(name, base.tensor(name), base.config) + delta
    expected = merged.arch.to_file(name, merged.tensor(name), merged.config)
    assert float((together - expected).norm() / expected.norm()) < torch.finfo(torch.bfloat16).eps


def test_adapters_a_gguf_file_cannot_hold_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterMismatch, match="no adapter"):
        load(folder).save_adapter(tmp_path / "out", format="gguf")
    model = load(folder).add_lora(modules_to_save=["lm_head"])
    with pytest.raises(errors.AdapterMismatch, match="lm_head.*save_gguf"):
        model.save_adapter(tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match="'peft' or 'gguf', got 'onnx'"):
        model.save_adapter(tmp_path / "out", format="onnx")
    model = load(folder).add_lora()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(errors.OutputExists):
        model.save_adapter(tmp_path / "out", format="gguf")
