"""Gated activation of a feed-forward block: y = act(gate) * up (SwiGLU and GeGLU).

Shapes: N rows, F ffn. gate, up, y [..., F].

Both activations are the input times a sigmoid, which gives them one derivation:
           act(g) = g * p,   p = sigmoid(z(g))
           silu       z = g                                 z' = 1
           gelu_tanh  z = 2 sqrt(2/pi) (g + 0.044715 g^3)   z' = 2 sqrt(2/pi) (1 + 3 * 0.044715 g^2)
(0.5 (1 + tanh(u)) = sigmoid(2u), so the tanh form of GELU needs an exponential and no tanh.)

Forward:   y = g * p * up
Backward:  act'(g) = p + g * p * q * z',   q = 1 - p = sigmoid(-z)
           dgate = dy * up * act'(g);   dup = dy * g * p
q is computed as a sigmoid of its own: 1 - p would keep only p's rounding error once p is near 1.

Saved: gate and up; p is recomputed. Computed in fp32, or the input's dtype where wider, and rounded
once; the reference rounds act(gate) before the product, as HF does. Bytes moved: forward reads two
and writes one [N, F], backward reads three and writes two. gate and up may be the halves of one
stacked buffer: any row stride is read in place.
Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2; Hendrycks and Gimpel 2016,
"Gaussian Error Linear Units", section 2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.function import Function
from sloth.kernels.rows import as_rows, compute_dtype, next_power_of_2, warps_for

Activation = Literal["silu", "gelu_tanh"]
Gradients = tuple[Tensor, Tensor]
# Where a backward puts dgate and dup, and y again if a third is given.
Outs = tuple[Tensor, ...] | None

_TWO_SQRT_2_OVER_PI = 1.5957691216057308
_CUBIC = 0.044715

# Columns of one program: four fp32 tiles at 8 elements a thread in the backward.
_BLOCK = 1024


def glu_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Eager act(gate) * up in the activation dtype. gate, up [..., F] -> [..., F]."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh") * up


def _gate_and_slope(gate: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """p and act'(gate)."""
    if activation == "silu":
        p = torch.sigmoid(gate)
        return p, p + gate * p * torch.sigmoid(-gate)
    square = gate * gate
    z = _TWO_SQRT_2_OVER_PI * gate * (1 + _CUBIC * square)
    z_slope = _TWO_SQRT_2_OVER_PI * (1 + 3 * _CUBIC * square)
    p = torch.sigmoid(z)
    return p, p + gate * p * torch.sigmoid(-z) * z_slope


def _glu_fwd_torch(gate: Tensor, up: Tensor, activation: Activation, out: Tensor | None) -> Tensor:
    wide = compute_dtype(gate.dtype)
    y = glu_reference(gate.to(wide), up.to(wide), activation).to(gate.dtype)
    return y if out is None else out.copy_(y)


def _glu_bwd_torch(
    dy: Tensor, gate: Tensor, up: Tensor, activation: Activation, outs: Outs
) -> Gradients:
    wide = compute_dtype(gate.dtype)
    g, u, wide_dy = gate.to(wide), up.to(wide), dy.to(wide)
    p, slope = _gate_and_slope(g, activation)
    results = (wide_dy * u * slope, wide_dy * g * p, g * p * u)
    if outs is None:
        return results[0].to(gate.dtype), results[1].to(up.dtype)
    for out, result in zip(outs, results, strict=False):
        out.copy_(result)
    return outs[0], outs[1]


@jit
def gate_and_slope_tile(g, GELU: tl.constexpr):
    """p and act'(g) of an fp32 tile."""
    if GELU:
        square = g * g
        z = 1.5957691216057308 * g * (1.0 + 0.044715 * square)
        z_slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        z = g
        z_slope = 1.0
    # one exponential, of a negative number, gives both sigmoids without overflow
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    p = tl.where(z >= 0, larger, smaller)
    q = tl.where(z >= 0, smaller, larger)
    return p, p + g * p * q * z_slope


@jit
def _glu_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    y_stride,
    num_cols,
    GELU: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < num_cols
    g = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    p, _ = gate_and_slope_tile(g, GELU)
    tl.store(y_ptr + row * y_stride + cols, (g * p * up).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _glu_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    y_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    y_stride,
    num_cols,
    NEED_Y: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < num_cols
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    p, slope = gate_and_slope_tile(g, GELU)
    dgate = (dy * up * slope).to(dgate_ptr.dtype.element_ty)
    dup = (dy * g * p).to(dup_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row * dgate_stride + cols, dgate, mask=mask)
    tl.store(dup_ptr + row * dup_stride + cols, dup, mask=mask)
    if NEED_Y:
        y = (g * p * up).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * y_stride + cols, y, mask=mask)


def _compile_entry(pointers: str, strides: str, gelu: bool, **flags: bool) -> dict[str, Any]:
    return {
        "signature": {
            **{f"{name}_ptr": "*bf16" for name in pointers.split()},
            **{f"{name}_stride": "i32:16" for name in strides.split()},
            "num_cols": "i32:16",
        },
        "constexprs": {"GELU": gelu, "BLOCK_F": _BLOCK, **flags},
        "options": {"num_warps": warps_for(2 * _BLOCK)},
    }


_BACKWARD = "dy gate up dgate dup y"
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_glu_fwd_kernel": [_compile_entry("gate up y", "gate up y", gelu=False)],
    "_glu_bwd_kernel": [_compile_entry(_BACKWARD, _BACKWARD, gelu=True, NEED_Y=True)],
}


def _grid(num_rows: int, num_cols: int) -> tuple[tuple[int, int], int]:
    block = min(next_power_of_2(num_cols), _BLOCK)
    return (num_rows, -(-num_cols // block)), block


def _glu_fwd_triton(gate: Tensor, up: Tensor, activation: Activation, out: Tensor | None) -> Tensor:
    gate_NF, up_NF = as_rows(gate), as_rows(up)
    num_rows, num_cols = gate_NF.shape
    y = torch.empty(gate.shape, device=gate.device, dtype=gate.dtype) if out is None else out
    grid, block = _grid(num_rows, num_cols)
    if num_rows:
        _glu_fwd_kernel[grid](
            gate_NF,
            up_NF,
            y,
            gate_NF.stride(0),
            up_NF.stride(0),
            num_cols if out is None else out.stride(0),
            num_cols,
            GELU=activation == "gelu_tanh",
            BLOCK_F=block,
            num_warps=warps_for(2 * block),
        )
    return y


def _glu_bwd_triton(
    dy: Tensor, gate: Tensor, up: Tensor, activation: Activation, outs: Outs
) -> Gradients:
    dy_NF, gate_NF, up_NF = as_rows(dy), as_rows(gate), as_rows(up)
    num_rows, num_cols = gate_NF.shape
    need_y = outs is not None and len(outs) == 3
    if outs is None:
        outs = (
            torch.empty(gate.shape, device=gate.device, dtype=gate.dtype),
            torch.empty(up.shape, device=up.device, dtype=up.dtype),
        )
    rows = [as_rows(out) for out in outs]
    y = rows[2] if need_y else dy_NF
    grid, block = _grid(num_rows, num_cols)
    if num_rows:
        _glu_bwd_kernel[grid](
            dy_NF,
            gate_NF,
            up_NF,
            rows[0],
            rows[1],
            y,
            dy_NF.stride(0),
            gate_NF.stride(0),
            up_NF.stride(0),
            rows[0].stride(0),
            rows[1].stride(0),
            y.stride(0),
            num_cols,
            NEED_Y=need_y,
            GELU=activation == "gelu_tanh",
            BLOCK_F=block,
            num_warps=warps_for(2 * block),
        )
    return outs[0], outs[1]


def glu_fwd(gate: Tensor, up: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """gate, up [..., F] -> y [..., F] in their dtype; `out` [N, F] takes it, any row stride."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"glu: activation {activation!r} is neither 'silu' nor 'gelu_tanh'")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"glu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ"
        )
    engine = _glu_fwd_triton if engine_for(gate) == "triton" else _glu_fwd_torch
    return engine(gate, up, activation, out)


def glu_bwd(
    dy: Tensor, gate: Tensor, up: Tensor, activation: Activation, outs: Outs = None
) -> Gradients:
    """dy, gate, up [..., F] -> (dgate, dup).

    outs: tensors [N, F] of any row stride that take dgate and dup, and, if there is a third, y once
    more. They may be gate, up and dy themselves, element for element.
    """
    engine = _glu_bwd_triton if engine_for(gate) == "triton" else _glu_bwd_torch
    return engine(dy, gate, up, activation, outs)


class GLUFunction(Function):
    """Saves gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_fwd(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        need_dgate, need_dup = ctx.needs_input_grad[:2]
        dgate, dup = glu_bwd(dy, gate, up, ctx.activation)
        return dgate if need_dgate else None, dup if need_dup else None, None


def glu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate) * up, with a hand-derived backward.

    gate, up [..., F] of one shape and dtype -> [..., F]. `activation` is "silu" (Llama, Mistral,
    Qwen) or "gelu_tanh" (Gemma). Raises ValueError for another one and for inputs that differ.
    """
    return GLUFunction.apply(gate, up, activation)
