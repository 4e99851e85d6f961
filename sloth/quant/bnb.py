"""bitsandbytes' 4-bit tensors in safetensors files: reading and writing them.

A quantized `P.weight` (uint8 codes [n / 2, 1]) comes with, under the same name:

    .absmax                           uint8 (double quantization) or fp32
    .quant_map                        fp32 [16], the codebook
    .nested_absmax, .nested_quant_map fp32, only with double quantization
    .quant_state.bitsandbytes__nf4    uint8, JSON text: shape, dtype, block sizes, nested offset

Which tensors are 4-bit is told by these keys, never by the config's skip lists, which go stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.kernels.ops.nf4 import (
    BLOCKSIZE,
    NESTED_BLOCKSIZE,
    NF4Weight,
    dynamic_map,
    nf4_code,
)

STATE_KEY = "quant_state.bitsandbytes__nf4"
FP4_STATE_KEY = "quant_state.bitsandbytes__fp4"
BNB_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)


def bnb_tensors(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """The file entries of one quantized weight called `name` (ending in `.weight`)."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.codes,
        f"{name}.absmax": weight.absmax,
        # Copies: a file cannot hold one tensor under several names.
        f"{name}.quant_map": nf4_code(weight.codes.device).clone(),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        state |= {
            "nested_blocksize": weight.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": float(weight.offset),
        }
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = dynamic_map(weight.codes.device).clone()
    text = json.dumps(state).encode()
    tensors[f"{name}.{STATE_KEY}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def read_bnb(name: str, tensor: Callable[[str], Tensor], names: Container[str]) -> NF4Weight:
    """The quantized weight `name` from its file entries.

    tensor: reads one entry. names: what the file holds. Raises UnsupportedConfig for other kinds,
    block sizes or maps, CheckpointMismatch for damaged or missing entries.
    """

    def entry(suffix: str) -> Tensor:
        key = f"{name}.{suffix}"
        if key not in names:
            raise CheckpointMismatch(f"{name} is a 4-bit weight, but {key} is missing")
        return tensor(key).clone()

    try:
        state = json.loads(bytes(entry(STATE_KEY).tolist()))
        shape = tuple(int(size) for size in state["shape"])
        dtype = getattr(torch, state["dtype"])
        nested_blocksize = state.get("nested_blocksize", NESTED_BLOCKSIZE)
        offset = state.get("nested_offset")
        known = (state["quant_type"], state["blocksize"], nested_blocksize)
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{name}.{STATE_KEY} cannot be read: {error}") from error
    if known != ("nf4", BLOCKSIZE, NESTED_BLOCKSIZE) or len(shape) != 2:
        raise UnsupportedConfig(
            f"{name} is quantized as {known} of shape {list(shape)}; sloth reads matrices in nf4, "
            f"blocks of {BLOCKSIZE}, scales in blocks of {NESTED_BLOCKSIZE}"
        )
    if not torch.equal(entry("quant_map").float(), nf4_code(torch.device("cpu"))):
        raise UnsupportedConfig(f"{name}.quant_map is not the NF4 codebook")
    # With 16-bit "quant storage" the same bytes are labelled as bf16.
    codes = tensor(name).clone().contiguous().view(torch.uint8).reshape(-1, 1)
    absmax = entry("absmax")
    num_elements = shape[0] * shape[1]
    num_blocks = -(-num_elements // BLOCKSIZE)
    if codes.numel() != (num_elements + 1) // 2 or absmax.numel() != num_blocks:
        raise CheckpointMismatch(
            f"{name} holds {codes.numel()} bytes and {absmax.numel()} scales, which do not make a "
            f"matrix of shape {list(shape)}"
        )
    if offset is None:
        return NF4Weight(codes, absmax.float(), (shape[0], shape[1]), dtype)
    entries = entry("nested_quant_map").float()
    if not torch.equal(entries, dynamic_map(torch.device("cpu"))):
        raise UnsupportedConfig(f"{name}.nested_quant_map is not the dynamic 8-bit map")
    return NF4Weight(
        codes,
        absmax,
        (shape[0], shape[1]),
        dtype,
        entry("nested_absmax").float(),
        torch.tensor(offset, dtype=torch.float32),
        entries,
    )


def bnb_quantization_config(compute_dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` entry of a config.json whose weights `bnb_tensors` wrote."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
