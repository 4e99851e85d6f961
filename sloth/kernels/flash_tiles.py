"""Tiles and constants of our own attention kernels (`ops/flash_attention.py` and its backward)."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.rows import next_power_of_2

Part = Literal["fwd", "dq", "dkv", "dk", "dv"]

# A softcap up to here keeps every e^C, and the sum of a million of them, within fp32 and bf16.
_LARGEST_BOUND = 64.0


class Tiles(NamedTuple):
    """Queries and keys of a tile, and how its program is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


# By head dim (rounded up). What fits the 99 KiB of the smaller GPUs:
_SMALL: dict[Part, dict[int, Tiles]] = {
    "fwd": {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 32, 4, 1)},
    "dq": {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 32, 4, 1)},
    "dkv": {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 32, 4, 1)},
}
_FP32: dict[int, Tiles] = {
    64: Tiles(64, 64, 4, 1),
    128: Tiles(32, 32, 4, 1),
    256: Tiles(16, 16, 4, 1),
}
# Of compute capability 9.0 and 10.0, searched on an H100:
_LARGE: dict[Part, dict[int, Tiles]] = {
    "fwd": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 32, 4, 3), 256: Tiles(128, 32, 8, 3)},
    "dq": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(128, 64, 8, 1)},
    "dkv": {64: Tiles(64, 64, 4, 3), 128: Tiles(32, 64, 4, 3)},
    "dk": {256: Tiles(64, 128, 8, 1)},
    "dv": {256: Tiles(64, 128, 8, 2)},
}
_LARGE_CAPABILITIES = (90, 100)


@cache
def _has_large_memory(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor in _LARGE_CAPABILITIES


def _tiles(part: Part, block_e: int, dtype: torch.dtype, large: bool) -> Tiles | None:
    """None where the part is not summed in a program of its own, or only there."""
    if dtype == torch.float32:
        return None if part in ("dk", "dv") else _FP32.get(block_e)
    return (_LARGE if large else _SMALL).get(part, {}).get(block_e)


def _constants(
    part: Part, tiles: Tiles, head_dim: int, window: int | None, softcap: float | None, half: bool
) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if part == "fwd":
        bounded = softcap is not None and softcap <= _LARGEST_BOUND and not half
        wanted |= {"BOUNDED": bounded}
    elif part != "dq":
        wanted |= {"NEED_DK": part != "dv", "NEED_DV": part != "dk"}
    return {
        **{"WINDOW": window, "SOFTCAP": softcap},
        **wanted,
        **{"HEAD_DIM": head_dim, "BLOCK_E": _width(head_dim)},
        **{"BLOCK_Q": tiles.queries, "BLOCK_K": tiles.keys},
    }


def _width(head_dim: int) -> int:
    return max(next_power_of_2(head_dim), 64)


def _tiles_for(part: Part, q_BHTE: Tensor) -> Tiles | None:
    large = q_BHTE.is_cuda and _has_large_memory(q_BHTE.device)
    return _tiles(part, _width(q_BHTE.shape[-1]), q_BHTE.dtype, large)


def key_parts(q_BHTE: Tensor) -> tuple[Part, ...]:
    """The launches that sum dK and dV for these queries: both in one, or one after the other."""
    return ("dv", "dk") if _tiles_for("dkv", q_BHTE) is None else ("dkv",)


def constants(
    part: Part, q_BHTE: Tensor, window: int | None, softcap: float | None, has_documents: bool
) -> dict[str, Any]:
    """Constexprs and options of a launch for these queries."""
    tiles = _tiles_for(part, q_BHTE)
    assert tiles is not None, f"{part} has no launch of its own here"
    half = q_BHTE.dtype == torch.float16
    return {
        **_constants(part, tiles, q_BHTE.shape[-1], window, softcap, half),
        **{"HAS_DOCUMENTS": has_documents, "num_warps": tiles.warps, "num_stages": tiles.stages},
    }


def compile_entries(
    part: Part, strided: tuple[str, ...], sums: tuple[str, ...], bounds: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The most demanding launches of a kernel, for the test that compiles every kernel.

    strided: tensors [B, H, T, E]; sums: fp32 of each query; bounds: int32 of each token.
    """
    entries = []
    for block_e in (128, 256):
        for dtype, large, where in (
            (torch.bfloat16, True, {"capabilities": _LARGE_CAPABILITIES}),
            (torch.bfloat16, False, {"capabilities": (80, 86, 120)}),
            (torch.float32, False, {"capabilities": (86,)}),
        ):
            tiles = _tiles(part, block_e, dtype, large)
            wider = _tiles(part, 2 * block_e, dtype, large)
            if tiles is None or wider is not None:  # one tile says it all
                continue
            found = _constants(part, tiles, block_e, 4096, 50.0, False)
            pointer = "*fp32" if dtype == torch.float32 else "*bf16"
            entries.append(
                {
                    "signature": {
                        **{f"{name}_ptr": pointer for name in strided},
                        **{f"{name}_ptr": "*fp32" for name in sums},
                        **{f"{name}_ptr": "*i32" for name in bounds},
                        **{f"{name}_stride_{dim}": "i32:16" for name in strided for dim in "bht"},
                        **{name: "i32" for name in ("num_tokens", "num_heads", "groups")},
                        "scale": "fp32",
                    },
                    "constexprs": found | {"HAS_DOCUMENTS": True},
                    "options": {"num_warps": tiles.warps, "num_stages": tiles.stages},
                    **where,
                }
            )
    return entries
