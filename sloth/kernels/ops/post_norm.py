"""Residual sum behind a norm, and the norm that reads it: the seam between Gemma 2's halves.

Shapes: N rows, D model. branch, residual, hidden, y [..., D]; weights [D]; rstds [N].

Forward:   hidden = residual + norm(branch)
           y = next_norm(hidden)                  where a next norm is given
Backward:  each norm's own (`rms_norm.py`), from its input and its rstd; the sum passes dhidden on.

Two norms and a sum of their own make seven passes over [N, D], here it is four; without the next
norm five become three. Rounding is theirs: norm(branch) to its dtype before the sum, hidden to its
dtype before the next norm reads it. Accumulation: fp32, or the input's dtype where wider.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.ops.rms_norm import Norm, normalize_row, rms_norm_fwd
from sloth.kernels.rows import as_rows, next_power_of_2, warps_for

# A product rounded to 16 bits and then added is one instruction that rounds once, unless forbidden.
_OPTIONS = {"enable_fp_fusion": False}


class PostNormed(NamedTuple):
    """hidden [N, D], rstd [N] of the norm behind the branch and of the next one, None without."""

    hidden: Tensor
    rstd: Tensor
    next_rstd: Tensor | None


@jit
def _post_norm_fwd_kernel(
    branch_ptr,
    residual_ptr,
    weight_ptr,
    next_weight_ptr,
    hidden_ptr,
    y_ptr,
    rstd_ptr,
    next_rstd_ptr,
    branch_stride,
    residual_stride,
    hidden_stride,
    y_stride,
    num_cols,
    eps,
    next_eps,
    OFFSET: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    branch = tl.load(branch_ptr + row * branch_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x = branch.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / num_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    normed = normalize_row(x, w, rstd, branch.dtype, OFFSET).to(branch.dtype)
    hidden = (residual.to(tl.float32) + normed.to(tl.float32)).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * hidden_stride + cols, hidden, mask=mask)
    if HAS_NEXT:
        w = tl.load(next_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x = hidden.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / num_cols + next_eps)
        y = normalize_row(x, w, rstd, hidden.dtype, OFFSET)
        tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(next_rstd_ptr + row, rstd)


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_post_norm_fwd_kernel": [
        {
            "signature": {
                **dict.fromkeys(("branch_ptr", "residual_ptr", "hidden_ptr", "y_ptr"), "*bf16"),
                **dict.fromkeys(("weight_ptr", "next_weight_ptr"), "*bf16"),
                **dict.fromkeys(("rstd_ptr", "next_rstd_ptr"), "*fp32"),
                **dict.fromkeys(("branch_stride", "residual_stride"), "i32:16"),
                **dict.fromkeys(("hidden_stride", "y_stride", "num_cols"), "i32:16"),
                **dict.fromkeys(("eps", "next_eps"), "fp32"),
            },
            "constexprs": {"OFFSET": 1.0, "HAS_NEXT": True, "BLOCK_D": 8192},
            "options": {"num_warps": warps_for(8192), **_OPTIONS},
        }
    ]
}


def _post_norm_fwd_torch(
    branch: Tensor, residual: Tensor, norm: Norm, next_norm: Norm | None, out: Tensor | None
) -> PostNormed:
    normed, rstd = rms_norm_fwd(branch, norm.weight, norm.eps, norm.offset)
    hidden = normed.add_(residual)
    if next_norm is None:
        return PostNormed(hidden, rstd, None)
    _, next_rstd = rms_norm_fwd(hidden, next_norm.weight, next_norm.eps, next_norm.offset, out=out)
    return PostNormed(hidden, rstd, next_rstd)


def _post_norm_fwd_triton(
    branch: Tensor, residual: Tensor, norm: Norm, next_norm: Norm | None, out: Tensor | None
) -> PostNormed:
    branch, residual = as_rows(branch), as_rows(residual)
    num_rows, num_cols = branch.shape
    hidden = torch.empty(branch.shape, device=branch.device, dtype=branch.dtype)
    rstd, next_rstd = torch.empty(2, num_rows, device=branch.device, dtype=torch.float32)
    following = norm if next_norm is None else next_norm
    y = hidden if out is None else out
    block = next_power_of_2(num_cols)
    if num_rows:
        _post_norm_fwd_kernel[(num_rows,)](
            *(branch, residual, norm.weight.contiguous(), following.weight.contiguous()),
            *(hidden, y, rstd, next_rstd),
            *(branch.stride(0), residual.stride(0), num_cols, y.stride(0), num_cols),
            *(norm.eps, following.eps),
            OFFSET=float(norm.offset),
            HAS_NEXT=next_norm is not None,
            BLOCK_D=block,
            num_warps=warps_for(block),
            **_OPTIONS,
        )
    return PostNormed(hidden, rstd, None if next_norm is None else next_rstd)


def post_norm_fwd(
    branch: Tensor,
    residual: Tensor,
    norm: Norm,
    next_norm: Norm | None = None,
    out: Tensor | None = None,
) -> PostNormed:
    """branch, residual [N, D] of one dtype -> hidden and rstds; `out` [N, D] takes the next norm's
    output: inner stride 1, any row stride.

    Both norms round alike (their offsets agree).
    """
    assert next_norm is None or (next_norm.offset == norm.offset and out is not None)
    triton_engine = engine_for(branch) == "triton"
    engine = _post_norm_fwd_triton if triton_engine else _post_norm_fwd_torch
    return engine(branch, residual, norm, next_norm, out)
