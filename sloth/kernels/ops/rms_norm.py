"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * (weight + offset).

Shapes: N rows (all leading dimensions), D model. x, y [..., D]; weight [D]; rstd [N].

Forward:   r = rsqrt(mean_D(x^2) + eps);   n = x * r;   y = n * (w + offset)
Backward:  g = dy * (w + offset)
           dx = r * (g - n * mean_D(g * n))        from dr/dx = -r^3 x / D
           dw = sum_N(dy * n)

Two families, told apart by `offset`, differ in where they round (it decides bf16 equality):
- offset 0 (Llama, Mistral, Qwen; HF `LlamaRMSNorm`): n is cast to x's dtype, then times weight.
- offset 1 (Gemma; HF `GemmaRMSNorm`): n * (1 + w) in fp32, then one cast. Stored w is near 0.

Saved: x, weight and r (fp32, 4 bytes a row), so that n costs one multiplication to rebuild.
Accumulation: fp32, or the input's dtype where that is wider. Bytes moved: forward reads x and
writes y; backward reads dy and x and writes dx. `dw` is deterministic: each program sums its own
rows into a partial row, and torch adds the partials in a fixed order; no atomics.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 3.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.function import Function
from sloth.kernels.rows import as_rows, compute_dtype, next_power_of_2, warps_for

# Programs (and partial rows) of a backward that needs dweight. A constant rather than the GPU's
# multiprocessor count, so that the order of summation is the same on every GPU.
_DWEIGHT_PROGRAMS = 256


class Norm(Protocol):
    """An RMSNorm module, as ops and twins read it."""

    weight: Tensor
    eps: float
    offset: float


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Eager RMSNorm in Hugging Face's order of casts. x [..., D], weight [D] -> [..., D]."""
    x_wide = x.to(compute_dtype(x.dtype))
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset == 0:
        return weight * normed.to(x.dtype)
    return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)


def normed_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype, offset: float) -> torch.dtype:
    """Dtype of y: as the reference promotes, so an fp32 weight widens y only where offset is 0."""
    return torch.promote_types(x_dtype, weight_dtype) if offset == 0 else x_dtype


def _rms_norm_fwd_torch(
    x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_wide = x.to(compute_dtype(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    normed = x_wide * rstd
    if offset == 0:
        y = normed.to(x.dtype) * weight
    else:
        y = (normed * (weight.to(normed.dtype) + offset)).to(x.dtype)
    return y if out is None else out.copy_(y), rstd.flatten()


def _rms_norm_bwd_torch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
    dresidual: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    wide = rstd.dtype
    rstd = rstd.view(*x.shape[:-1], 1)
    normed = x.to(wide) * rstd
    dy = dy.to(wide)
    g = dy * (weight.to(wide) + offset)
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + dresidual.to(wide)
    dweight = None
    if need_dweight:
        dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
    dx = dx.to(x.dtype)
    return dx if out is None else out.copy_(dx), dweight


@jit
def normalize_row(x, w, rstd, x_dtype: tl.constexpr, OFFSET: tl.constexpr):
    """One fp32 row times its rstd and its weight, rounded where the family rounds."""
    if OFFSET == 0:
        return (x * rstd).to(x_dtype).to(tl.float32) * w
    return x * rstd * (w + OFFSET)


@jit
def _rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    x_stride,
    y_stride,
    num_cols,
    eps,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    x_raw = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x = x_raw.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / num_cols + eps)
    y = normalize_row(x, w, rstd, x_raw.dtype, OFFSET)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dy_stride,
    x_stride,
    dresidual_stride,
    dx_stride,
    num_rows,
    num_cols,
    OFFSET: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + OFFSET
    dweight = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = x * rstd
        g = dy * w
        dx = rstd * (g - normed * (tl.sum(g * normed, 0) / num_cols))
        if HAS_DRESIDUAL:
            offsets = row * dresidual_stride + cols
            dx += tl.load(dresidual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DWEIGHT:
            dweight += dy * normed
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + program * num_cols + cols, dweight, mask=mask)


def _compile_signatures() -> dict[str, list[dict[str, Any]]]:
    forward = {
        "x_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "y_ptr": "*bf16",
        "rstd_ptr": "*fp32",
        "x_stride": "i32:16",
        "y_stride": "i32:16",
        "num_cols": "i32:16",
        "eps": "fp32",
    }
    backward = {
        "dy_ptr": "*bf16",
        "x_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "rstd_ptr": "*fp32",
        "dresidual_ptr": "*bf16",
        "dx_ptr": "*bf16",
        "dweight_ptr": "*fp32",
        "dy_stride": "i32:16",
        "x_stride": "i32:16",
        "dresidual_stride": "i32:16",
        "dx_stride": "i32:16",
        "num_rows": "i32",
        "num_cols": "i32:16",
    }
    flags = {"HAS_DRESIDUAL": True, "NEED_DWEIGHT": True}
    options = {"num_warps": warps_for(8192)}
    return {
        "_rms_norm_fwd_kernel": [
            {
                "signature": forward,
                "constexprs": {"OFFSET": 0.0, "BLOCK_D": 8192},
                "options": options,
            }
        ],
        "_rms_norm_bwd_kernel": [
            {
                "signature": backward,
                "constexprs": {"OFFSET": 1.0, "BLOCK_D": 8192, **flags},
                "options": options,
            }
        ],
    }


COMPILE_SIGNATURES = _compile_signatures()


def _rms_norm_fwd_triton(
    x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_ND, weight = as_rows(x), weight.contiguous()
    num_rows, num_cols = x_ND.shape
    y_dtype = normed_dtype(x.dtype, weight.dtype, offset)
    y = torch.empty(x.shape, device=x.device, dtype=y_dtype) if out is None else out
    rstd = torch.empty(num_rows, device=x.device, dtype=torch.float32)
    block = next_power_of_2(num_cols)
    if num_rows:
        _rms_norm_fwd_kernel[(num_rows,)](
            x_ND,
            weight,
            y,
            rstd,
            x_ND.stride(0),
            num_cols if out is None else out.stride(0),
            num_cols,
            eps,
            OFFSET=float(offset),
            BLOCK_D=block,
            num_warps=warps_for(block),
        )
    return y, rstd


def _rms_norm_bwd_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
    dresidual: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dy_ND, x_ND, weight = as_rows(dy), as_rows(x), weight.contiguous()
    dresidual_ND = dy_ND if dresidual is None else as_rows(dresidual)
    num_rows, num_cols = x_ND.shape
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype) if out is None else out
    num_programs = min(num_rows, _DWEIGHT_PROGRAMS) if need_dweight else num_rows
    partial_shape = (num_programs, num_cols) if need_dweight else (1,)
    partial = torch.empty(partial_shape, device=x.device, dtype=torch.float32)
    block = next_power_of_2(num_cols)
    if num_rows:
        _rms_norm_bwd_kernel[(num_programs,)](
            dy_ND,
            x_ND,
            weight,
            rstd,
            dresidual_ND,
            dx,
            partial,
            dy_ND.stride(0),
            x_ND.stride(0),
            dresidual_ND.stride(0),
            num_cols if out is None else out.stride(0),
            num_rows,
            num_cols,
            OFFSET=float(offset),
            HAS_DRESIDUAL=dresidual is not None,
            NEED_DWEIGHT=need_dweight,
            BLOCK_D=block,
            num_warps=warps_for(block),
        )
    return dx, partial.sum(0).to(weight.dtype) if need_dweight else None


def rms_norm_fwd(
    x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [D] -> (y [..., D], rstd [N] in the accumulation dtype).

    `out` [N, D] takes y: inner stride 1, any row stride.
    """
    engine = _rms_norm_fwd_triton if engine_for(x) == "triton" else _rms_norm_fwd_torch
    return engine(x, weight, eps, offset, out)


def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
    dresidual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dy, x [..., D], rstd [N] -> (dx [..., D], dweight [D] or None).

    `dresidual` [..., D] is a gradient that reaches x by another path; it is added before dx is
    rounded (`add_rms_norm` uses it). `out` [N, D] takes dx.
    """
    engine = _rms_norm_bwd_triton if engine_for(x) == "triton" else _rms_norm_bwd_torch
    return engine(dy, x, weight, rstd, offset, need_dweight, dresidual, out)


class RMSNormFunction(Function):
    """Saves x, weight and rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, rstd = rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        dx, dweight = rms_norm_bwd(dy, x, weight, rstd, ctx.offset, need_dweight)
        return dx if need_dx else None, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm over the last dimension, with a hand-derived backward.

    x [..., D] fp16, bf16, fp32 or fp64, weight [D] -> y [..., D] in x's dtype (offset 0 with a
    wider weight: in the weight's, as the reference promotes). `offset` is added to the weight: 0,
    or 1 for Gemma, and it selects where the result is rounded (module docstring).
    """
    return RMSNormFunction.apply(x, weight, eps, offset)
