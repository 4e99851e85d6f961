"""LoRA linear: y = x W^T + b + s * (x' A^T) B^T, with W dense or NF4 and x' = x or dropout(x).

Shapes: N rows (all leading dimensions), I in, O out, R rank. x [..., I]; W [O, I]; A [R, I];
B [O, R].

Forward:   u = x' A^T               (kept: N x R)
           y = x W^T + b + s u B^T
Backward:  v = s dy B               (N x R)
           dx = dy W + mask * (v A)
           dA = v^T x'      dB = s dy^T u      dW = dy^T x      db = sum_N dy
A frozen W needs no x; only A does, so a twin may rebuild x instead of saving it.

Saved: x (only where A or W is trained), u, A, B and W as stored: NF4 codes are unpacked again in
the backward, so a dense copy never lives from forward to backward. LoRA weights are fp32 while x
may be 16-bit: the products run in x's dtype, every sum over rows (dA, dB, dW) in fp32 and stored in
the dtype of its weight. The reference computes LoRA in A's dtype, as PEFT does.

With a magnitude (DoRA, `dora.py`) y, before b, and dy are multiplied by gains; y is kept and gives
the magnitude's gradient.

Both engines are the vendor's matrix product, which no kernel of ours beats at these shapes (cuBLAS
reaches 690-760 TFLOP/s on an H100), so the only Triton here is the NF4 dequantisation in `nf4.py`,
and for one row without a gradient, a step of decoding, the product with the codes themselves
(`nf4_matvec.py`).
Source: Hu et al. 2021 (LoRA), https://arxiv.org/abs/2106.09685, section 4.1; Dettmers et al. 2023
(QLoRA), https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sloth.kernels.function import Function
from sloth.kernels.ops import dora, nf4_matvec
from sloth.kernels.ops.dora import Magnitude
from sloth.kernels.ops.nf4 import NF4Weight, nf4_dequantize
from sloth.kernels.rows import as_rows, sum_over_rows

Base = Tensor | NF4Weight


@dataclass(frozen=True)
class LoraOperands:
    """A [R, in], B [out, R], the factor s on their product, the dropout on A's input; DoRA's
    magnitude of the rows, or None."""

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Magnitude | None = None


class LoraLinearGrads(NamedTuple):
    """Gradients of one call; None where not needed."""

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dA: Tensor | None
    dB: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward is asked for; the rest come back as None, uncomputed."""

    dx: bool
    dweight: bool
    dbias: bool
    dA: bool
    dB: bool


def dense_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] of a base in `dtype`: itself, or its dequantised codes."""
    return nf4_dequantize(base, dtype) if isinstance(base, NF4Weight) else base.to(dtype)


def draw_dropout_mask(x: Tensor, lora: LoraOperands | None, training: bool) -> Tensor | None:
    """Mask like x holding 0 or 1 / (1 - p); None where nothing is dropped."""
    if lora is None or lora.dropout == 0.0 or not training:
        return None
    keep = 1.0 - lora.dropout
    return torch.empty_like(x).bernoulli_(keep).div_(keep)


def lora_linear_reference(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    lora: LoraOperands | None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Eager LoRA linear in PEFT's order: LoRA in the dtype of A, one cast at the end.

    With a magnitude the norms come from the whole matrix W + s B A, and get no gradient.
    """
    weight = dense_weight(base, x.dtype)
    if lora is None:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight, bias if lora.magnitude is None else None)
    dropped = x if dropout_mask is None else x * dropout_mask
    low = F.linear(dropped.to(lora.A.dtype), lora.A)
    y = y + F.linear(low, lora.B) * lora.scale
    if lora.magnitude is not None:
        norms = lora.magnitude.norms
        if norms is None:
            whole = weight.to(lora.A.dtype) + lora.scale * (lora.B @ lora.A)
            norms = whole.detach().norm(dim=1)
        y = y * dora.gains_of(lora.magnitude.m, norms)
        y = y if bias is None else y + bias
    return y.to(x.dtype)


def adapted_row_norms(base: Base, lora: LoraOperands, dtype: torch.dtype) -> Tensor:
    """DoRA's n [O]: the row norms of W + s B A in `dtype`, or the ones held fixed."""
    assert lora.magnitude is not None
    if lora.magnitude.norms is not None:
        return lora.magnitude.norms
    assert lora.magnitude.squared is not None
    weight, A = dense_weight(base, dtype).detach(), lora.A.detach().to(dtype)
    sB = (lora.scale * lora.B.detach()).to(dtype)
    return dora.adapted_norms(weight, A, sB, lora.magnitude.squared)


def row_gains(base: Base, lora: LoraOperands | None, dtype: torch.dtype) -> Tensor | None:
    """Gains [O] of the rows of an adapted matrix that computes in `dtype`; None without DoRA."""
    if lora is None or lora.magnitude is None:
        return None
    return dora.gains_of(lora.magnitude.m, adapted_row_norms(base, lora, dtype))


def lora_linear_fwd(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    lora: LoraOperands | None,
    dropout_mask: Tensor | None = None,
    gains: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [..., O], u = x' A^T [..., R] or None), both in x's dtype.

    gains: those of `row_gains`, where lora has a magnitude.
    """
    dtype, leading, x_NI = x.dtype, x.shape[:-1], _rows(x)
    early = None if bias is None or gains is not None else bias.to(dtype)  # gains come before it
    y_NO = F.linear(x_NI, dense_weight(base, dtype), early)
    if lora is None:
        return y_NO.view(*leading, y_NO.shape[1]), None
    dropped = x_NI if dropout_mask is None else x_NI * _rows(dropout_mask)
    low_NR = dropped @ lora.A.to(dtype).T
    y_NO.addmm_(low_NR, lora.B.to(dtype).T, alpha=lora.scale)
    if gains is not None:
        y_NO.mul_(gains)
        if bias is not None:
            y_NO.add_(bias)
    return y_NO.view(*leading, y_NO.shape[1]), low_NR.view(*leading, low_NR.shape[1])


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    base: Base,
    lora: LoraOperands | None,
    low: Tensor | None,
    dropout_mask: Tensor | None,
    needs: Needs,
    gains: Tensor | None = None,
) -> LoraLinearGrads:
    """Gradients of `lora_linear_fwd`; `low` is its second result.

    x is read for dA and dweight only, and may be None without them.
    """
    dtype, dy_NO = dy.dtype, _rows(dy)
    x_NI = None if x is None else _rows(x)
    mask = None if dropout_mask is None else _rows(dropout_mask)
    dx = dweight = dbias = dA = dB = None
    if needs.dbias:
        dbias = dy_NO.sum(0)
    if gains is not None:
        dy_NO = torch.mul(dy_NO, gains, out=torch.empty_like(dy_NO))
    if needs.dx:
        dx = dy_NO @ dense_weight(base, dtype)
    if needs.dweight:
        assert x_NI is not None and isinstance(base, Tensor)
        dweight = sum_over_rows(dy_NO, x_NI, base.dtype)
    if lora is not None and (needs.dx or needs.dA):
        v_NR = (dy_NO @ lora.B.to(dtype)) * lora.scale
        if dx is not None:
            if mask is None:
                dx.addmm_(v_NR, lora.A.to(dtype))
            else:
                dx.addcmul_(v_NR @ lora.A.to(dtype), mask)
        if needs.dA:
            assert x_NI is not None
            dA = sum_over_rows(v_NR, x_NI if mask is None else x_NI * mask, lora.A.dtype)
    if lora is not None and needs.dB:
        assert low is not None
        dB = sum_over_rows(dy_NO, _rows(low), lora.B.dtype) * lora.scale
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return LoraLinearGrads(dx, dweight, dbias, dA, dB)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [N, D]."""
    return x.reshape(-1, x.shape[-1])


class LoraLinearFunction(Function):
    """Saves x and y where read, A, B, u, m, gains, mask and W as stored; NF4 codes ride on the
    context."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Base,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        m: Tensor | None,
        gains: Tensor | None,
        scale: float,
        dropout_mask: Tensor | None,
    ) -> Tensor:
        lora = None if A is None or B is None else LoraOperands(A, B, scale)
        y, low = lora_linear_fwd(x, base, bias, lora, dropout_mask, gains)
        _, need_dweight, _, need_dA, _, need_dm = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_dweight or need_dA else None,
            base if isinstance(base, Tensor) else None,
            *(A, B, low, dropout_mask, gains),
            *((y, bias, m) if need_dm else (None, None, None)),
        )
        ctx.codes = None if isinstance(base, Tensor) else base
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, low, dropout_mask, gains, y, bias, m = ctx.saved_tensors
        base = weight if ctx.codes is None else ctx.codes
        lora = None if A is None else LoraOperands(A, B, ctx.scale)
        needs = Needs(*ctx.needs_input_grad[:5])
        grads = lora_linear_bwd(dy, x, base, lora, low, dropout_mask, needs, gains)
        dm = None
        if ctx.needs_input_grad[5]:
            dm = dora.magnitude_gradient(as_rows(dy), as_rows(y), bias, m)
        return *grads, dm, None, None, None


def lora_linear(
    x: Tensor,
    base: Base,
    bias: Tensor | None = None,
    lora: LoraOperands | None = None,
    training: bool = False,
) -> Tensor:
    """x W^T + b + s dropout(x) A^T B^T, with a hand-derived backward.

    x [..., I], base [O, I] dense or NF4, bias [O], LoRA operands A [R, I] and B [O, R] -> [..., O]
    in x's dtype. Differentiable in x, a dense base, bias, A, B and a magnitude; with one, the rows
    of W + s B A are scaled to it. `training` draws the dropout mask.
    """
    mask = draw_dropout_mask(x, lora, training)
    one_row = x.numel() == x.shape[-1] and mask is None and not torch.is_grad_enabled()
    if one_row and isinstance(base, NF4Weight) and nf4_matvec.serves(base, x.dtype):
        A, B, scale = (None, None, 1.0) if lora is None else (lora.A, lora.B, lora.scale)
        gains = row_gains(base, lora, x.dtype)
        return nf4_matvec.nf4_matvec(x, base, bias, A, B, scale, gains)
    if lora is None:
        return LoraLinearFunction.apply(x, base, bias, None, None, None, None, 1.0, mask)
    gains = row_gains(base, lora, x.dtype)
    m = None if lora.magnitude is None else lora.magnitude.m
    gains = None if gains is None else gains.detach()
    return LoraLinearFunction.apply(x, base, bias, lora.A, lora.B, m, gains, lora.scale, mask)
