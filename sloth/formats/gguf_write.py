"""GGUF files out: a model's tensors one at a time, or an adapter's, through the `gguf` package.

    f16, bf16   matrices rounded once
    q8_0        blocks of 32: one fp16 step d = max|x| / 127, and x / d as int8
    q4_0        blocks of 32: one fp16 step d = x_max / -8, and x / d as 4 bits, -8 to 7

Vectors (norms, biases) stay fp32. A row that is no multiple of 32 is stored in f16. In q4_0 the
matrix that gives the logits has 8 bits: its error goes straight into the probabilities, and the
program's own quantizer spends more bits on it too. Nothing holds more than one tensor.

An adapter holds A [r, in] and B [out, r] as `<tensor>.lora_a` and `.lora_b`. Programs apply
alpha / r with r the rank of each pair, so any other scale is multiplied into B.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sloth.errors import UnsupportedConfig
from sloth.formats.gguf import gguf_package
from sloth.formats.gguf_archs import Config, GGUFArch
from sloth.formats.gguf_config import ROPE_DIVISORS, hyperparameters, rope_divisors

BLOCK = 32
QUANTIZATION_VERSION = 2

# quant -> (type of matrices, general.file_type), by the format's numbers.
QUANTS = {"f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the file: its name there, shape, and type by the package's name."""

    name: str
    shape: tuple[int, ...]
    kind: str


def plan(
    arch: GGUFArch, shapes: dict[str, tuple[int, ...]], quant: str
) -> dict[str, WrittenTensor]:
    """Hugging Face name -> what the file holds for it. Raises UnsupportedConfig."""
    head = "lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight"
    planned: dict[str, WrittenTensor] = {}
    for name, shape in shapes.items():
        stored = arch.gguf_name(name)
        if stored is None:
            raise UnsupportedConfig(f"a {arch.name} GGUF file has no place for {name}")
        kind = QUANTS[quant][0]
        if len(shape) < 2:
            kind = "F32"
        elif quant in ("q8_0", "q4_0") and shape[-1] % BLOCK:
            kind = "F16"
        elif quant == "q4_0" and name == head:
            kind = "Q8_0"
        planned[name] = WrittenTensor(stored, shape, kind)
    return planned


def model_metadata(
    arch: GGUFArch, config: Config, vocabulary: dict[str, Any], name: str, quant: str
) -> dict[str, Any]:
    """Every key of a model's file but general.architecture. Raises UnsupportedConfig."""
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": QUANTS[quant][1],
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{arch.name}.{key}": value for key, value in hyperparameters(arch, config).items()},
        **vocabulary,
    }


def write_model(
    path: Path,
    arch: GGUFArch,
    config: Config,
    metadata: dict[str, Any],
    planned: dict[str, WrittenTensor],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a model; `tensors` come under Hugging Face's names, in the order of `planned`."""
    divisors = rope_divisors(config)
    entries = list(planned.values())
    if divisors is not None:
        entries.insert(0, WrittenTensor(ROPE_DIVISORS, tuple(divisors.shape), "F32"))

    def values() -> Iterable[Tensor]:
        if divisors is not None:
            yield divisors
        for (name, value), expected in zip(tensors, planned, strict=True):
            assert name == expected, f"{name} comes where {expected} was announced"
            yield arch.to_file(name, value.detach().float().cpu(), config)

    _write(path, arch, metadata, entries, values())


def write_adapter(
    path: Path,
    arch: GGUFArch,
    config: Config,
    alpha: float,
    factors: dict[str, tuple[Tensor, Tensor, float]],
    name: str,
) -> None:
    """Write a LoRA adapter; factors: projection's path -> (A, B, scale).

    Raises UnsupportedConfig for a projection the file has no place for.
    """
    metadata = {
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    entries: list[WrittenTensor] = []
    values: list[Tensor] = []
    for path_in_model, (a, b, scale) in factors.items():
        weight = f"{path_in_model}.weight"
        stored = arch.gguf_name(weight)
        if stored is None:
            raise UnsupportedConfig(f"a {arch.name} GGUF adapter has no place for {path_in_model}")
        a, b = a.detach().float().cpu(), b.detach().float().cpu()
        folded = scale * a.shape[0] / alpha
        b = arch.rows_to_file(weight, b if folded == 1 else b * folded, config)
        for suffix, value in (("lora_a", a), ("lora_b", b)):
            entries.append(WrittenTensor(f"{stored}.{suffix}", tuple(value.shape), "F32"))
            values.append(value)
    _write(path, arch, metadata, entries, values)


def _write(
    path: Path,
    arch: GGUFArch,
    metadata: dict[str, Any],
    entries: list[WrittenTensor],
    values: Iterable[Tensor],
) -> None:
    gguf = gguf_package("writing")
    import numpy

    writer = gguf.GGUFWriter(path, arch.name)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind]
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size_bytes = math.prod(entry.shape) // block * block_bytes
            writer.add_tensor_info(
                entry.name, entry.shape, numpy.dtype(numpy.float32), size_bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, value in zip(entries, values, strict=True):
            if entry.kind == "F16" and float(value.abs().max()) > _LARGEST_F16:
                raise UnsupportedConfig(
                    f"{entry.name} has values beyond {_LARGEST_F16:.0f}, which f16 cannot hold; "
                    "write quant='bf16'"
                )
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.write_tensor_data(gguf.quants.quantize(value.contiguous().numpy(), kind))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with the type that programs expect: unsigned numbers, fp32, int32 in lists."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # the format has no empty list
        writer.add_array(key, value)


def largest_error(value: Tensor, kind: str) -> Tensor:
    """How far each element may lie from `value` (fp32, as in the file) once stored as `kind`.

    A step d is itself rounded to fp16, 2^-11 of d and as much of the block's largest element;
    below fp16's normal numbers it is off by up to 2^-25.
    """
    size = value.abs()
    if kind == "F32":
        # Gemma's norms are stored plus one, which rounds once more.
        return (1 + size) * 2.0**-23
    if kind == "F16":
        return size * 2.0**-11 + 2.0**-25
    if kind == "BF16":
        return size * 2.0**-8
    blocks = size.reshape(-1, BLOCK)
    steps, share = (127, 0.5) if kind == "Q8_0" else (8, 1.0)  # 4 bits lack the +8: a whole step
    bound = blocks.amax(1, keepdim=True) * (share / steps * 1.001 + 2.0**-11) + steps * 2.0**-25
    return bound.expand_as(blocks).reshape(value.shape)


def read_f32(path: Path, start: int, shape: tuple[int, ...]) -> Tensor:
    """An F32 tensor of a file just written, which begins at byte `start`."""
    with path.open("rb") as stream:
        stream.seek(start)
        raw = bytearray(stream.read(4 * math.prod(shape)))
    return torch.frombuffer(raw, dtype=torch.float32).reshape(shape)
