"""Thin products of LoRA that join a pass over their wide operand which is made anyway.

Shapes: T rows, K columns, R ranks of a stack, padded. x, n [T, K]; A [R, K]; U, V [T, R].

copy_low   X = x, where it has to move beside its tail;   U = x A^T
norm_sum   dA = V^T n,   n = x * rstd * (w + offset), which is not written

A thin product costs one read of its wide operand and little else. 8192 x 4096 in bf16 on an H100:
the copy and U take 60 us together and 121 apart, of which 67 are the copy's; n made again and dA
take 44 us, and 86 where n is written and read.

A program of `copy_low` has whole rows, at whose end it has its rows of U. A program of `norm_sum`
has columns: it walks down rows and keeps its columns of dA. To fill the device the rows are walked
in parts, whose sums are added in order afterwards; nothing is added atomically, so runs repeat bit
for bit. Rounding: products of rounded factors, summed in fp32 or wider; U is rounded once, n where
the family's norm rounds (`rms_norm.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.ops.rms_norm import normalize_row
from sloth.kernels.rows import next_power_of_2

# All ranks of a stack together: more leave no registers for the tile.
MAX_RANK = 64
# Of a matrix instruction.
_MIN_RANK = 16
_COPY_T, _COPY_K = 32, 256
_COPY_OPTIONS = {"num_warps": 4, "num_stages": 3}
# Rows that one program of a sum walks.
_SPAN = 512
_SUM_T, _SUM_K = 32, 128
_SUM_OPTIONS = {"num_warps": 4, "num_stages": 3}


@jit
def _copy_low_kernel(
    x_ptr,
    A_ptr,
    copy_ptr,
    low_ptr,
    x_stride,
    A_stride,
    copy_stride,
    low_stride,
    num_rows,
    num_cols,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    down, ranks = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, RANK)[None, :]
    cols = tl.arange(0, BLOCK_K)
    low = tl.zeros((BLOCK_T, RANK), tl.float32)
    for first in range(0, num_cols, BLOCK_K):
        inside = cols < num_cols - first
        mask = (down < num_rows - start) & inside[None, :]
        x_tile = x_ptr + start * x_stride + first + (down * x_stride + cols[None, :])
        x = tl.load(x_tile, mask=mask, other=0.0)
        copy = copy_ptr + start * copy_stride + first + (down * copy_stride + cols[None, :])
        tl.store(copy, x, mask=mask)
        A_tile = A_ptr + first + (ranks * A_stride + cols[:, None])
        A = tl.load(A_tile, mask=inside[:, None], other=0.0)
        low = tl.dot(x, A, low, input_precision="ieee")
    out = low_ptr + start * low_stride + (down * low_stride + ranks)
    tl.store(out, low.to(low_ptr.dtype.element_ty), mask=down < num_rows - start)


@jit
def _norm_sum_kernel(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    v_ptr,
    sums_ptr,
    x_stride,
    v_stride,
    num_rows,
    num_cols,
    num_ranks,
    span,
    OFFSET: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first, part = tl.program_id(0).to(tl.int64) * BLOCK_K, tl.program_id(1).to(tl.int64)
    # Inside a tile offsets fit 32 bits; where it begins takes 64.
    cols, ranks = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, RANK)[:, None]
    down, across = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    inside = cols < num_cols - first
    w = tl.load(weight_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
    dA = tl.zeros((RANK, BLOCK_K), tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, num_rows), BLOCK_T):
        left = num_rows - start
        x_tile = x_ptr + start * x_stride + first + (down * x_stride + cols)
        x = tl.load(x_tile, mask=(down < left) & inside, other=0.0)
        rstd = tl.load(rstd_ptr + start + down, mask=down < left, other=0.0)
        n = normalize_row(x.to(tl.float32), w, rstd, x.dtype, OFFSET).to(x.dtype)
        v_tile = v_ptr + start * v_stride + (across * v_stride + ranks)
        v = tl.load(v_tile, mask=(across < left) & (ranks < num_ranks), other=0.0)
        dA = tl.dot(v, n, dA, input_precision="ieee")
    out = sums_ptr + (part * RANK + ranks) * num_cols + first + cols
    tl.store(out, dA, mask=inside)


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_copy_low_kernel": [
        {
            "signature": {
                **dict.fromkeys(("x_ptr", "A_ptr", "copy_ptr", "low_ptr"), "*bf16"),
                **dict.fromkeys(("x_stride", "A_stride", "copy_stride", "low_stride"), "i32:16"),
                **{"num_rows": "i32", "num_cols": "i32:16"},
            },
            "constexprs": {"RANK": MAX_RANK, "BLOCK_T": _COPY_T, "BLOCK_K": _COPY_K},
            "options": _COPY_OPTIONS,
        }
    ],
    "_norm_sum_kernel": [
        {
            "signature": {
                **dict.fromkeys(("x_ptr", "weight_ptr", "v_ptr"), "*bf16"),
                **dict.fromkeys(("rstd_ptr", "sums_ptr"), "*fp32"),
                **dict.fromkeys(("x_stride", "v_stride", "num_cols", "span"), "i32:16"),
                **{"num_rows": "i32", "num_ranks": "i32:16"},
            },
            "constexprs": {
                **{"OFFSET": offset, "RANK": MAX_RANK},
                **{"BLOCK_T": _SUM_T, "BLOCK_K": _SUM_K},
            },
            "options": _SUM_OPTIONS,
        }
        for offset in (0.0, 1.0)
    ],
}


def _tile(rank: int) -> int:
    return max(next_power_of_2(rank), _MIN_RANK)


def copy_low(x: Tensor, A: Tensor, rank: int, out: Tensor) -> Tensor:
    """x [T, K], A [R, K] -> U = x A^T [T, R] in x's dtype; x is copied to `out` [T, K].

    All with inner stride 1 and any row stride. Rows of A from `rank` on are zeros.
    """
    num_rows, num_cols = x.shape
    # fp32 tiles of this size leave no room in shared memory.
    fits = rank <= MAX_RANK and x.dtype != torch.float32
    if engine_for(x) == "torch" or not fits:
        return out.copy_(x) @ A.T
    low = torch.zeros(num_rows, len(A), dtype=x.dtype, device=x.device)
    if num_rows:
        _copy_low_kernel[(-(-num_rows // _COPY_T),)](
            *(x, A, out, low),
            *(tensor.stride(0) for tensor in (x, A, out, low)),
            *(num_rows, num_cols),
            RANK=_tile(rank),
            BLOCK_T=_COPY_T,
            BLOCK_K=_COPY_K,
            **_COPY_OPTIONS,
        )
    return low


def sums_norms(x: Tensor, rank: int) -> bool:
    """Whether `norm_sum` makes n on the way, rather than as a tensor of its own."""
    fits = rank <= MAX_RANK and x.dtype != torch.float32
    return engine_for(x) == "triton" and fits


def norm_sum(
    x: Tensor, weight: Tensor, rstd: Tensor, offset: float, v: Tensor, rank: int
) -> Tensor:
    """dA = V^T n [rank, K], fp32, of n = x * rstd * (weight + offset), where `sums_norms`.

    x [T, K], v [T, R] with inner stride 1 and any row stride, weight [K], rstd [T] fp32. Columns of
    v from `rank` on are zeros, and have no rows in dA.
    """
    num_rows, num_cols = x.shape
    parts, tile = max(-(-num_rows // _SPAN), 1), _tile(rank)
    sums = torch.empty(parts, tile, num_cols, dtype=torch.float32, device=x.device)
    _norm_sum_kernel[(-(-num_cols // _SUM_K), parts)](
        *(x, weight.contiguous(), rstd, v, sums),
        *(x.stride(0), v.stride(0), num_rows, num_cols, v.shape[1], _SPAN),
        OFFSET=float(offset),
        RANK=tile,
        BLOCK_T=_SUM_T,
        BLOCK_K=_SUM_K,
        **_SUM_OPTIONS,
    )
    return sums[:, :rank].sum(0)
