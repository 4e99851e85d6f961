"""Writes GGUF files of the llama architecture from Hugging Face folders, as converters do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    path, leaf = name.rsplit(".", 1)
    if path.startswith("model.layers."):
        _, _, index, rest = path.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[path]}.{leaf}"


def interleave(value: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from halves to neighbours, as llama.cpp rotates them."""
    heads = value.reshape(num_heads, 2, -1, *value.shape[1:])
    return heads.swapaxes(1, 2).reshape(value.shape)


def byte_level_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a small byte-level BPE; the first three are special."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["hello world, the turn of one user and another"] * 20, trainer)
    content = json.loads(fast.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    return tokens, [" ".join(merge) for merge in content["merges"]]


def add_byte_level_tokenizer(
    writer: gguf.GGUFWriter, size: int, pre: str | None = "smollm"
) -> None:
    tokens, merges = byte_level_vocabulary(size)
    num_pads = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in range(num_pads)])
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3) + [5] * num_pads)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_gguf(
    folder: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    divisors: Tensor | None = None,
    pre: str | None = "smollm",
) -> Path:
    """The model in `folder` as a GGUF file; matrices as `kind`, vectors as F32.

    extra: llama keys -> values, e.g. {"rope.scaling.type": "linear"}. divisors: rope_freqs.weight.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if "rope.dimension_count" not in (extra or {}):
        writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_float32)(f"llama.{key}", value)
    add_byte_level_tokenizer(writer, config["vocab_size"], pre)
    for name, tensor in load_file(folder / "model.safetensors").items():
        for letter, count in heads.items():
            if f".{letter}_proj." in name:
                tensor = interleave(tensor, count)
        values = tensor.contiguous().numpy()
        if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), values.astype(numpy.float32))
        else:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
