"""DoRA's dots of a stack's outputs and the gradient of its B, in one pass over dY and Y.

Shapes: T rows, N columns, R ranks of a stack, padded. dY, Y [T, N]; U [T, R]; b [N].

    dots = sum_T dY (Y - b)  [N]  (`dora.py`);   dB = dY^T U  [N, R], neither scaled nor with gains

Both are sums over rows of dY, which is read once instead of twice. A program has columns: it walks
down rows in parts, whose sums are added in order afterwards; nothing is added atomically, so runs
repeat bit for bit. Bytes moved: one read of dY and of Y, 235 MB a layer of an 8B model at 8192
tokens less than apart (q|k|v, o and down; of gate|up the sums come along elsewhere, `glu_lora.py`).
Rounding: products of rounded factors, summed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.ops.dora import column_dots
from sloth.kernels.rows import next_power_of_2

# All ranks of a stack together: more leave no registers for the tile.
MAX_RANK = 64
# Of a matrix instruction.
_MIN_RANK = 16
# Rows that one program walks: 1024 programs at 8192 x 4096.
_SPAN = 512
_BLOCK_T, _BLOCK_N = 32, 64
_OPTIONS = {"num_warps": 4, "num_stages": 3}


@jit
def _output_sums_kernel(
    dy_ptr,
    y_ptr,
    bias_ptr,
    low_ptr,
    sums_ptr,
    dy_stride,
    y_stride,
    low_stride,
    num_rows,
    num_cols,
    span,
    num_ranks,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of a part stand below each other: dB turned, then the dots."""
    first, part = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1).to(tl.int64)
    # Inside a tile offsets fit 32 bits; where it begins takes 64.
    cols, ranks = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, RANK)[:, None]
    down, across = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    inside = cols < num_cols - first
    bias = tl.zeros((1, BLOCK_N), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
    dB = tl.zeros((RANK, BLOCK_N), tl.float32)
    dots = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, num_rows), BLOCK_T):
        left = num_rows - start
        mask = (down < left) & inside
        dy_tile = dy_ptr + start * dy_stride + first + (down * dy_stride + cols)
        y_tile = y_ptr + start * y_stride + first + (down * y_stride + cols)
        # The small factor comes turned, [RANK, BLOCK_T].
        low_tile = low_ptr + start * low_stride + (across * low_stride + ranks)
        dy = tl.load(dy_tile, mask=mask, other=0.0)
        y = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(low_tile, mask=(across < left) & (ranks < num_ranks), other=0.0)
        dots += dy.to(tl.float32) * (y - bias)
        dB = tl.dot(low, dy, dB, input_precision="ieee")
    out = sums_ptr + part * (RANK + 1) * num_cols + first + cols
    tl.store(out + ranks * num_cols, dB, mask=inside)
    tl.store(out + RANK * num_cols, tl.sum(dots, axis=0)[None, :], mask=inside)


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_output_sums_kernel": [
        {
            "signature": {
                **{f"{name}_ptr": "*bf16" for name in ("dy", "y", "bias", "low")},
                "sums_ptr": "*fp32",
                **{f"{name}_stride": "i32:16" for name in ("dy", "y", "low")},
                **{"num_rows": "i32", "num_cols": "i32:16", "span": "i32:16"},
                "num_ranks": "i32:16",
            },
            "constexprs": {
                **{"HAS_BIAS": True, "RANK": rank},
                **{"BLOCK_T": _BLOCK_T, "BLOCK_N": _BLOCK_N},
            },
            "options": _OPTIONS,
        }
        for rank in (_MIN_RANK, MAX_RANK)
    ]
}


def output_sums(
    dy: Tensor, y: Tensor, bias: Tensor | None, low: Tensor, rank: int
) -> tuple[Tensor, Tensor | None]:
    """dy, y [T, N], bias [N], U [T, R] -> (dots [N], dB [N, R or less]) in fp32 or wider; no dB
    where it does not come along.

    All with inner stride 1 and any row stride. Columns of U from `rank` on are zeros, and those of
    dB may be left out.
    """
    num_rows, num_cols = dy.shape
    fits = 0 < rank <= MAX_RANK and dy.dtype != torch.float32
    if engine_for(dy) == "torch" or not fits or not num_rows:
        return column_dots(dy, y, bias), None
    parts, tile = -(-num_rows // _SPAN), max(next_power_of_2(rank), _MIN_RANK)
    sums = torch.empty(parts, tile + 1, num_cols, dtype=torch.float32, device=dy.device)
    _output_sums_kernel[(-(-num_cols // _BLOCK_N), parts)](
        *(dy, y, dy if bias is None else bias, low, sums),
        *(dy.stride(0), y.stride(0), low.stride(0)),
        *(num_rows, num_cols, _SPAN, low.shape[1]),
        HAS_BIAS=bias is not None,
        RANK=tile,
        BLOCK_T=_BLOCK_T,
        BLOCK_N=_BLOCK_N,
        **_OPTIONS,
    )
    total = sums.sum(0)
    return total[tile], total[:tile].T
