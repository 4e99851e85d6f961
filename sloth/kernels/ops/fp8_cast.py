"""Rows to 8-bit floats: each row divided by a scale of its own, then rounded to e4m3.

    scale_i = max_j |x_ij| / 448;   x8_ij = e4m3(x_ij / scale_i)        x ~ scale_i x8_ij

e4m3 has 4 bits of exponent and 3 of mantissa: at most 448, normal down to 2^-6, so an element
within 2^-14 of its row's largest keeps a relative error of at most 2^-4; smaller ones keep an
absolute error of 2^-10 scales. (e5m2, the other 8-bit float, reaches further down with half the
precision. Rows with scales of their own do not need its range: gradients are cast to e4m3 too.)

Nothing is differentiated: a product that reads x8 derives as if it read x. A row of zeros gets a
small positive scale; a NaN or an infinity makes every product with its row NaN or infinite, so that
a broken step still shows. Computed in fp32 and rounded once, to nearest, ties to even. Reads 2
bytes an element (16 bits), writes 1; a program holds a whole row, so it is read once.
Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433,
sections 3 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import INTERPRET, engine_for, jit, tl
from sloth.kernels.rows import as_rows, next_power_of_2

FP8 = torch.float8_e4m3fn
# The largest e4m3 number.
LARGEST = 448.0
# Taken for the largest element of a row of smaller ones, so that a scale has a finite reciprocal.
_SMALLEST = 2.0**-100
# A row of 28672 (gate and up of an 8B model, as one gradient) is one tile: 32 elements a thread.
_ELEMENTS_PER_WARP = 1024
_MAX_WARPS = 32


def _fp8_cast_torch(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = as_rows(x).float()
    largest = wide.abs().amax(1).clamp_min(_SMALLEST)
    # A number over a tensor would be its product with a reciprocal, rounded twice.
    gains = torch.full_like(largest, LARGEST) / largest
    x8 = (wide * gains[:, None]).to(FP8)
    return x8 if out is None else out.copy_(x8), largest * (1 / LARGEST)


@jit
def _on_the_grid(y):
    """fp32 numbers of at most 448 rounded to e4m3's, to nearest, ties to even."""
    binade = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # 1.5 * 2^23 steps: sums with it have no room for parts of a step
    shift = tl.maximum(binade, 0.015625) * 0.125 * 12582912.0
    return (y + shift) - shift


@jit
def _fp8_cast_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    out_stride,
    num_cols,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 0), 7.888609052210118e-31)  # 2^-100
    y = x * tl.div_rn(448.0, largest)
    if INTERPRETED:  # whose own conversion drops a carry
        y = _on_the_grid(y)
    tl.store(out_ptr + row * out_stride + cols, y.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, largest * 0.002232142857142857)


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_fp8_cast_kernel": [
        {
            "signature": {
                "x_ptr": "*bf16",
                "out_ptr": "*fp8e4nv",
                "scale_ptr": "*fp32",
                "x_stride": "i32:16",
                "out_stride": "i32:16",
                "num_cols": "i32:16",
            },
            "constexprs": {"BLOCK": block, "INTERPRETED": False},
            "options": {"num_warps": warps},
            # The first GPUs that have the type.
            "capabilities": (89, 90, 100, 120),
        }
        for block, warps in ((4096, 4), (32768, _MAX_WARPS))
    ]
}


def _fp8_cast_triton(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    x_NK = as_rows(x)
    num_rows, num_cols = x_NK.shape
    x8 = torch.empty(num_rows, num_cols, device=x.device, dtype=FP8) if out is None else out
    scales = torch.empty(num_rows, device=x.device, dtype=torch.float32)
    block = next_power_of_2(num_cols)
    if num_rows:
        _fp8_cast_kernel[(num_rows,)](
            x_NK,
            x8,
            scales,
            x_NK.stride(0),
            x8.stride(0),
            num_cols,
            BLOCK=block,
            INTERPRETED=INTERPRET,
            num_warps=min(max(block // _ELEMENTS_PER_WARP, 1), _MAX_WARPS),
        )
    return x8, scales


def fp8_cast(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (x8 [N, K] e4m3, scales [N] fp32), x ~ scales[:, None] * x8.

    `out` [N, K] e4m3 takes x8: inner stride 1, any row stride.
    """
    engine = _fp8_cast_triton if engine_for(x) == "triton" else _fp8_cast_torch
    return engine(x, out)
