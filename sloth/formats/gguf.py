"""Llama models from GGUF files, as if they were a Hugging Face folder: config, tensors, tokenizer
files.

Tensor names are mapped (`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`) and
values dequantised to fp32 by the `gguf` package, one tensor at a time. llama.cpp rotates
neighbouring rows (2i, 2i+1) of a head, Hugging Face rows (i, i + E/2), so the file holds q and k
with the rows of each head interleaved; per head [E/2, 2] is turned back into [2, E/2], biases too.

A Llama 3 rotary scaling is stored as the divisors of the frequencies (`rope_freqs.weight`), not as
its numbers. They are recovered and the divisors computed from them must match the stored ones, else
UnsupportedConfig. Sources: the GGUF format (gguf_header.py) and the key names of the `gguf`
package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.formats.gguf_header import TensorEntry, read_header
from sloth.formats.gguf_tokenizer import rebuild_tokenizer
from sloth.models.rope import DEFAULT_THETA, Rope, RopeParameters

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"
# fp32 divisors written by programs that formed them in fp32 or fp64.
_DIVISOR_RELATIVE_ERROR = 1e-5
# Llama 3.1 to 3.3 use 8192; low and high frequency factors are 1 and 4 in all of them.
_LLAMA3_ORIGINAL_LENGTHS = (8192, *(2**n for n in range(4, 21)))

# Keys of the llama architecture that say nothing config.json needs.
_IRRELEVANT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
# Values that leave the computation as it is; any other value goes to the config, which refuses it
# by name.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


class GGUFFile:
    """A GGUF file of the llama architecture under Hugging Face names.

    config: the config.json this model would have. names: tensor name -> shape; a tensor that has no
    counterpart keeps its own name, so that loading reports it. metadata: the file's own keys.
    Raises CheckpointMismatch for a damaged file, UnsupportedConfig for a model that cannot be
    represented.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._gguf = _gguf_package()
        header = read_header(self.path)
        self.metadata = header.metadata
        self._check_extents(header.tensors, header.size_bytes)
        self._entries = {_hf_name(name): entry for name, entry in header.tensors.items()}
        divisors = self._entries.get(_ROPE_DIVISORS)
        with self._sensible_metadata():
            self.config = _config(
                self.metadata,
                {name: entry.shape for name, entry in self._entries.items()},
                None if divisors is None else self._dequantise(_ROPE_DIVISORS, divisors),
            )
        self._entries.pop(_ROPE_DIVISORS, None)
        self.names = {name: entry.shape for name, entry in self._entries.items()}

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` in fp32 on the CPU, in Hugging Face's layout."""
        value = self._dequantise(name, self._entries[name])
        if ".q_proj." in name:
            return _uninterleave(value, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return _uninterleave(value, self.config["num_key_value_heads"])
        return value

    def tokenizer_files(self) -> dict[str, str]:
        """tokenizer.json, tokenizer_config.json, generation_config.json from the metadata."""
        with self._sensible_metadata():
            return rebuild_tokenizer(self.metadata)

    @contextmanager
    def _sensible_metadata(self) -> Iterator[None]:
        """Numbers where texts belong, heads that are zero, and the like."""
        try:
            yield
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise CheckpointMismatch(f"{self.path}: its metadata make no sense: {error}") from error

    def _bytes_of(self, name: str, entry: TensorEntry) -> tuple[int, Any]:
        """(size in bytes, quantization type) of a tensor."""
        try:
            kind = self._gguf.GGMLQuantizationType(entry.type_id)
        except ValueError as error:
            raise UnsupportedConfig(
                f"{self.path}: {name} is stored in a type ({entry.type_id}) that the installed "
                "gguf package does not know; `pip install -U gguf` may help"
            ) from error
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if entry.shape and entry.shape[-1] % block:
            raise CheckpointMismatch(
                f"{self.path}: {name} has rows of {entry.shape[-1]}, which {kind.name} cannot "
                f"store in its blocks of {block}"
            )
        return math.prod(entry.shape) // block * block_bytes, kind

    def _check_extents(self, tensors: dict[str, TensorEntry], file_bytes: int) -> None:
        for name, entry in tensors.items():
            size, _ = self._bytes_of(name, entry)
            if entry.start + size > file_bytes:
                raise CheckpointMismatch(
                    f"{self.path} ends before its tensor {name} does; the file is cut short"
                )

    def _dequantise(self, name: str, entry: TensorEntry) -> Tensor:
        import numpy

        size, kind = self._bytes_of(name, entry)
        raw = numpy.fromfile(self.path, dtype=numpy.uint8, count=size, offset=entry.start)
        rows = raw.reshape(*entry.shape[:-1], -1)
        try:
            values = self._gguf.quants.dequantize(rows, kind)
        except NotImplementedError as error:
            raise UnsupportedConfig(
                f"{self.path}: {name} is stored as {kind.name}, which the gguf package cannot "
                "dequantise"
            ) from error
        return torch.from_numpy(values.astype(numpy.float32, copy=False)).reshape(entry.shape)


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedConfig(
            "reading a GGUF file needs the gguf package: pip install 'sloth-llm[gguf]'"
        ) from error
    return gguf


def _hf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _uninterleave(value: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from order 0, E/2, 1, E/2 + 1, ... to 0, 1, ...; [rows, in] or [rows]."""
    heads = value.reshape(num_heads, -1, 2, *value.shape[1:])
    return heads.transpose(1, 2).reshape(value.shape).contiguous()


class _Keys:
    """The metadata of one architecture; knows what was asked for."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self.prefix = f"{architecture}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in metadata.items()
            if key.startswith(self.prefix)
        }
        self.left = dict(self.values)

    def take(self, key: str, default: Any = ...) -> Any:
        self.left.pop(key, None)
        if key in self.values:
            return self.values[key]
        if default is ...:
            raise UnsupportedConfig(f"the GGUF file lacks {self.prefix}{key}")
        return default

    def same_for_all_layers(self, key: str, default: Any = ...) -> int:
        value = self.take(key, default)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) != 1:
            raise UnsupportedConfig(f"{self.prefix}{key} differs from layer to layer")
        return int(values.pop())

    def leftovers(self) -> dict[str, Any]:
        """Keys nobody asked for whose value could change the result, under their full names."""
        return {
            f"{self.prefix}{key}": value
            for key, value in self.left.items()
            if key not in _IRRELEVANT and not (key in _NEUTRAL and value == _NEUTRAL[key])
        }


def _config(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], divisors: Tensor | None
) -> dict[str, Any]:
    """The config.json of a llama file; `shapes` by Hugging Face names."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedConfig(
            f"GGUF architecture {architecture!r} is not supported; supported: llama"
        )
    if "model.embed_tokens.weight" not in shapes:
        raise CheckpointMismatch(
            "the GGUF file holds no token_embd.weight; it may be a vocabulary only"
        )
    keys = _Keys(metadata, architecture)
    hidden_size = keys.take("embedding_length")
    num_heads = keys.same_for_all_layers("attention.head_count")
    head_dim = keys.take("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.take(key, head_dim) != head_dim:
            raise UnsupportedConfig(
                f"llama.{key} is {keys.take(key)} with heads of {head_dim}; they must be equal"
            )
    max_positions = keys.take("context_length")
    token_ids = {
        f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{stored}_token_id")
        for kind, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": keys.same_for_all_layers("feed_forward_length"),
        "max_position_embeddings": max_positions,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
        "num_attention_heads": num_heads,
        "num_hidden_layers": keys.take("block_count"),
        "num_key_value_heads": keys.same_for_all_layers("attention.head_count_kv", num_heads),
        "rms_norm_eps": _shortest(keys.take("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope_parameters(keys, head_dim, max_positions, divisors),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        **{key: value for key, value in token_ids.items() if value is not None},
        **keys.leftovers(),
    }


def _rope_parameters(
    keys: _Keys, head_dim: int, max_positions: int, divisors: Tensor | None
) -> dict[str, Any]:
    theta = _shortest(keys.take("rope.freq_base", DEFAULT_THETA))
    kind = keys.take("rope.scaling.type", "none")
    factor = keys.take("rope.scaling.factor", None)
    old_factor = keys.take("rope.scale_linear", None)  # files of 2023
    if old_factor not in (None, 1.0):
        kind, factor = "linear", old_factor
    original = keys.take("rope.scaling.original_context_length", None)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "yarn"):
        if factor is None:
            raise UnsupportedConfig(
                f"llama.rope.scaling.type is {kind!r}, but its factor is missing"
            )
        found |= {"rope_type": kind, "factor": _shortest(factor)}
    elif kind != "none":
        raise UnsupportedConfig(f"llama.rope.scaling.type {kind!r} is not supported")
    if kind == "yarn":
        if original is not None:
            found["original_max_position_embeddings"] = original
        for key in ("beta_fast", "beta_slow"):
            value = keys.take(f"rope.scaling.yarn_{key}", None)
            if value is not None:
                found[key] = _shortest(value)
    if divisors is None or bool((divisors == 1).all()):
        return found
    if found["rope_type"] != "default":
        raise UnsupportedConfig(
            f"the GGUF file scales its rotary embedding twice: {kind} and {_ROPE_DIVISORS}"
        )
    return _llama3_rope(divisors, theta, head_dim, max_positions)


def _llama3_rope(
    divisors: Tensor, theta: float, head_dim: int, max_positions: int
) -> dict[str, Any]:
    """The llama3 scaling whose plain over scaled frequencies are `divisors` [head_dim / 2]."""
    plain = Rope(RopeParameters("default", theta, head_dim, max_positions)).frequencies
    for original in _LLAMA3_ORIGINAL_LENGTHS:
        found = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": _shortest(float(divisors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        scaled = Rope(RopeParameters.from_hf(found, theta, head_dim, max_positions)).frequencies
        same_shape = scaled.shape == divisors.shape
        if same_shape and torch.allclose(
            plain / scaled, divisors, rtol=_DIVISOR_RELATIVE_ERROR, atol=0.0
        ):
            return found
    raise UnsupportedConfig(
        f"the rotary divisors of {_ROPE_DIVISORS} are not those of a llama3 scaling with low and "
        "high frequency factors 1 and 4; load the model's Hugging Face folder instead"
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 9.99999975e-06 -> 1e-05."""
    value = float(value)
    packed = struct.pack("<f", value)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == packed:
            return short
    return value
