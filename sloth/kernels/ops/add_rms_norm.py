"""Residual add and RMSNorm in one pass: hidden = delta + residual; y = rms_norm(hidden).

Shapes: N rows, D model. delta, residual, hidden, y [..., D]; weight [D]; rstd [N].

A block's attention output `delta` joins the residual stream, and the next norm reads the sum.
Fused, the sum is written once and not read back: reads delta and residual, writes hidden and y.

Forward:   hidden = delta + residual, rounded to its dtype first (Hugging Face adds in that dtype)
           y = rms_norm(hidden, weight)
Backward:  hidden has two users, the norm and the residual stream that goes on, so
           d(delta) = d(residual) = dhidden + d(rms_norm)/d(hidden)^T dy
The derivative of the norm is `rms_norm.py`'s; dhidden is added in fp32 before the one rounding.

Saved: hidden, weight and rstd; neither delta nor residual. Casts and accumulation: `rms_norm.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.function import Function
from sloth.kernels.ops.rms_norm import (
    _rms_norm_fwd_torch,
    normalize_row,
    normed_dtype,
    rms_norm_bwd,
    rms_norm_reference,
)
from sloth.kernels.rows import as_rows, next_power_of_2, warps_for


def add_rms_norm_reference(
    delta: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Eager add, then RMSNorm, in Hugging Face's order of casts -> (y, hidden)."""
    hidden = residual + delta
    return rms_norm_reference(hidden, weight, eps, offset), hidden


def _add_rms_norm_fwd_torch(
    delta: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = delta + residual
    y, rstd = _rms_norm_fwd_torch(hidden, weight, eps, offset, out)
    return y, hidden, rstd


@jit
def _add_rms_norm_fwd_kernel(
    delta_ptr,
    residual_ptr,
    weight_ptr,
    hidden_ptr,
    y_ptr,
    rstd_ptr,
    delta_stride,
    residual_stride,
    hidden_stride,
    y_stride,
    num_cols,
    eps,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    delta = tl.load(delta_ptr + row * delta_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    hidden = (delta.to(tl.float32) + residual.to(tl.float32)).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * hidden_stride + cols, hidden, mask=mask)
    x = hidden.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / num_cols + eps)
    y = normalize_row(x, w, rstd, hidden.dtype, OFFSET)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_add_rms_norm_fwd_kernel": [
        {
            "signature": {
                "delta_ptr": "*bf16",
                "residual_ptr": "*bf16",
                "weight_ptr": "*bf16",
                "hidden_ptr": "*bf16",
                "y_ptr": "*bf16",
                "rstd_ptr": "*fp32",
                "delta_stride": "i32:16",
                "residual_stride": "i32:16",
                "hidden_stride": "i32:16",
                "y_stride": "i32:16",
                "num_cols": "i32:16",
                "eps": "fp32",
            },
            "constexprs": {"OFFSET": 0.0, "BLOCK_D": 8192},
            "options": {"num_warps": warps_for(8192)},
        }
    ]
}


def _add_rms_norm_fwd_triton(
    delta: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    delta_ND, residual_ND, weight = as_rows(delta), as_rows(residual), weight.contiguous()
    num_rows, num_cols = delta_ND.shape
    hidden_dtype = torch.promote_types(delta.dtype, residual.dtype)
    y_dtype = normed_dtype(hidden_dtype, weight.dtype, offset)
    hidden = torch.empty(delta.shape, device=delta.device, dtype=hidden_dtype)
    y = torch.empty(delta.shape, device=delta.device, dtype=y_dtype) if out is None else out
    rstd = torch.empty(num_rows, device=delta.device, dtype=torch.float32)
    block = next_power_of_2(num_cols)
    if num_rows:
        _add_rms_norm_fwd_kernel[(num_rows,)](
            delta_ND,
            residual_ND,
            weight,
            hidden,
            y,
            rstd,
            delta_ND.stride(0),
            residual_ND.stride(0),
            num_cols,
            num_cols if out is None else out.stride(0),
            num_cols,
            eps,
            OFFSET=float(offset),
            BLOCK_D=block,
            num_warps=warps_for(block),
        )
    return y, hidden, rstd


def add_rms_norm_fwd(
    delta: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """delta, residual [..., D], weight [D] -> (y [..., D], hidden [..., D], rstd [N]).

    `out` [N, D] takes y: inner stride 1, any row stride.
    """
    if delta.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: delta {tuple(delta.shape)} and residual {tuple(residual.shape)} differ"
        )
    triton_engine = engine_for(delta) == "triton"
    engine = _add_rms_norm_fwd_triton if triton_engine else _add_rms_norm_fwd_torch
    return engine(delta, residual, weight, eps, offset, out)


def add_rms_norm_bwd(
    dy: Tensor,
    dhidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> (dx [..., D], dweight [D] or None); dx is the gradient of delta and of residual alike.

    `dhidden` None says that nothing but the norm used hidden. `out` [N, D] takes dx.
    """
    return rms_norm_bwd(dy, hidden, weight, rstd, offset, need_dweight, dhidden, out)


class AddRMSNormFunction(Function):
    """Saves hidden, weight and rstd."""

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y, hidden, rstd = add_rms_norm_fwd(delta, residual, weight, eps, offset)
        ctx.save_for_backward(hidden, weight, rstd)
        ctx.offset = offset
        ctx.input_dtypes = delta.dtype, residual.dtype
        return y, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rstd = ctx.saved_tensors
        need_ddelta, need_dresidual, need_dweight = ctx.needs_input_grad[:3]
        dx, dweight = add_rms_norm_bwd(dy, dhidden, hidden, weight, rstd, ctx.offset, need_dweight)
        ddelta_dtype, dresidual_dtype = ctx.input_dtypes
        ddelta = dx.to(ddelta_dtype) if need_ddelta else None
        dresidual = dx.to(dresidual_dtype) if need_dresidual else None
        return ddelta, dresidual, dweight, None, None


def add_rms_norm(
    delta: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(delta + residual), delta + residual), both [..., D], in one pass over memory.

    delta, residual [..., D] of one shape, weight [D]; dtypes and `offset` as in `rms_norm`.
    Raises ValueError for shapes that differ.
    """
    return AddRMSNormFunction.apply(delta, residual, weight, eps, offset)
