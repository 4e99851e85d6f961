"""x w^T of two matrices of 8-bit floats, each with a scale for every row.

    y_ij = x_scales_i w_scales_j sum_k x8_ik w8_jk + bias_j

On a GPU it is the vendor's product (`torch._scaled_mm`), which applies both scales and the bias
before it rounds once; Hopper's tensor cores read both matrices along k only, which is why one that
is multiplied from either side is stored twice. Elsewhere the same numbers are widened and
multiplied: equal but for the order and width of the sum.

fast_sum: Hopper adds up a product of 8-bit floats with about 14 bits and, unless this is set, moves
its sums to fp32 every few steps.
Source: NVIDIA, "PTX ISA", wgmma; https://docs.pytorch.org/docs/stable/generated/
torch.nn.functional.scaled_mm.html (row-wise scales).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sloth.kernels.rows import compute_dtype

# Sizes other than the number of rows come in multiples of it (16 bytes).
MULTIPLE = 16
# The first GPUs that multiply 8-bit floats: Ada, Hopper and later.
CAPABILITY = (8, 9)


def fp8_product(
    x8: Tensor,
    x_scales: Tensor,
    w8: Tensor,
    w_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast_sum: bool = False,
) -> Tensor:
    """x8 [M, K] and w8 [N, K] e4m3, scales [M] and [N] fp32, bias [N] -> y [M, N] in `dtype`.

    On a GPU dtype is bf16, x8 and w8 are contiguous, K and N multiples of 16.
    """
    if x8.is_cuda:
        return torch._scaled_mm(
            x8,
            w8.T,
            scale_a=x_scales[:, None],
            scale_b=w_scales[None],
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=fast_sum,
        )
    wide = compute_dtype(dtype)
    y = (x8.to(wide) @ w8.to(wide).T) * x_scales.to(wide)[:, None] * w_scales.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype)
