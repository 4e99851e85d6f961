"""RMSNorm on every head of q and k, then RoPE, in one launch (Qwen 3, Gemma 3).

Shapes: B batch, T tokens, H query heads, K kv heads, E head dim. q [B,T,H,E], k [B,T,K,E]; weights
[E]; cos, sin [B or 1, T, E] as in `rope.py`.

With R the rotation of a position (`rope.py`), w' = w + offset, per head:
Forward:   r = rsqrt(mean_E(x^2) + eps);   n = x r;   y = R (n w')
Backward:  g = R^T dy * w';   dx = r (g - n mean_E(g n))

The backward needs x before the norm: from y it would have to divide by w', which fails near zero.
Saved: q and k as projected; r and n are made again. The norms' weights are frozen. Computed in
fp32, or the input's dtype where wider, and rounded once. Any strides are read in place, with unit
inner stride; bytes moved: forward reads and writes q and k once, backward reads two and writes one.
Source: Henry et al. 2020 (query-key normalization), https://arxiv.org/abs/2010.04245; Zhang and
Sennrich 2019; Su et al. 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.function import Function
from sloth.kernels.ops.rms_norm import Norm, rms_norm_reference
from sloth.kernels.ops.rope import rope_bwd, rope_fwd, rope_reference
from sloth.kernels.rows import compute_dtype, next_power_of_2, warps_for

# Elements of one half-head tile of a program; fewer than RoPE's, as the backward holds four.
_TILE = 512

Pair = tuple[Tensor, Tensor]


# Over the head dim, of q and of k.
Norms = tuple[Norm, Norm]


def qk_norm_rope_reference(q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor) -> Pair:
    """Eager norm, then RoPE, in Hugging Face's order of casts."""
    q, k = (
        rms_norm_reference(x, norm.weight, norm.eps, norm.offset)
        for x, norm in zip((q, k), norms, strict=True)
    )
    return rope_reference(q, k, cos, sin)


def _normed(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """n, r and w' in the compute dtype."""
    wide = x.to(compute_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return wide * rstd, rstd, norm.weight.to(wide.dtype) + norm.offset


def _forward_torch(q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor) -> Pair:
    wide = []
    for x, norm in zip((q, k), norms, strict=True):
        n, _, weight = _normed(x, norm)
        wide.append(n * weight)
    q_out, k_out = rope_fwd(wide[0], wide[1], cos, sin)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def _backward_torch(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor, outs: Pair
) -> Pair:
    wide = compute_dtype(q.dtype)
    turned = rope_bwd(dq.to(wide), dk.to(wide), cos, sin)
    for g, x, norm, out in zip(turned, (q, k), norms, outs, strict=True):
        n, rstd, weight = _normed(x, norm)
        g = g * weight
        out.copy_(rstd * (g - n * (g * n).mean(-1, keepdim=True)))
    return outs


@jit
def _norm_rope_tile(
    x_ptr,
    dy_ptr,
    y_ptr,
    weight_ptr,
    heads,
    num_heads,
    x_stride_h,
    dy_stride_h,
    y_stride_h,
    pairs,
    half,
    c,
    s,
    eps,
    OFFSET: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """[BLOCK_H, BLOCK_E] pairs of one token: norm and rotate x, or take dy back to dx."""
    mask = (heads < num_heads)[:, None] & (pairs < half)[None, :]
    x_at = x_ptr + heads[:, None] * x_stride_h + pairs[None, :]
    x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + half, mask=mask, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + pairs, mask=pairs < half, other=0.0).to(tl.float32) + OFFSET
    w2 = tl.load(weight_ptr + half + pairs, mask=pairs < half, other=0.0).to(tl.float32) + OFFSET
    size = 2 * half
    rstd = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / size + eps)[:, None]
    n1 = x1 * rstd
    n2 = x2 * rstd
    if BACKWARD:
        dy_at = dy_ptr + heads[:, None] * dy_stride_h + pairs[None, :]
        dy1 = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_at + half, mask=mask, other=0.0).to(tl.float32)
        g1 = (dy1 * c + dy2 * s) * w1[None, :]
        g2 = (dy2 * c - dy1 * s) * w2[None, :]
        mean = ((tl.sum(g1 * n1, 1) + tl.sum(g2 * n2, 1)) / size)[:, None]
        y1 = rstd * (g1 - n1 * mean)
        y2 = rstd * (g2 - n2 * mean)
    else:
        n1 = n1 * w1[None, :]
        n2 = n2 * w2[None, :]
        y1 = n1 * c - n2 * s
        y2 = n2 * c + n1 * s
    y_at = y_ptr + heads[:, None] * y_stride_h + pairs[None, :]
    tl.store(y_at, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_at + half, y2.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    dq_ptr,
    dk_ptr,
    q_out_ptr,
    k_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    q_out_stride_b,
    q_out_stride_t,
    q_out_stride_h,
    k_out_stride_b,
    k_out_stride_t,
    k_out_stride_h,
    cos_stride_b,
    cos_stride_t,
    sin_stride_b,
    sin_stride_t,
    num_tokens,
    num_q_heads,
    num_k_heads,
    half,
    q_eps,
    k_eps,
    Q_OFFSET: tl.constexpr,
    K_OFFSET: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    b = row // num_tokens
    t = row % num_tokens
    pairs = tl.arange(0, BLOCK_E)
    pair_mask = pairs < half
    cos_at = cos_ptr + b * cos_stride_b + t * cos_stride_t + pairs
    sin_at = sin_ptr + b * sin_stride_b + t * sin_stride_t + pairs
    c = tl.load(cos_at, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_at, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    num_q_tiles = tl.cdiv(num_q_heads, BLOCK_H)
    if tile < num_q_tiles:
        _norm_rope_tile(
            q_ptr + b * q_stride_b + t * q_stride_t,
            dq_ptr + b * dq_stride_b + t * dq_stride_t,
            q_out_ptr + b * q_out_stride_b + t * q_out_stride_t,
            q_weight_ptr,
            tile * BLOCK_H + tl.arange(0, BLOCK_H),
            num_q_heads,
            q_stride_h,
            dq_stride_h,
            q_out_stride_h,
            pairs,
            half,
            c,
            s,
            q_eps,
            Q_OFFSET,
            BACKWARD,
        )
    else:
        _norm_rope_tile(
            k_ptr + b * k_stride_b + t * k_stride_t,
            dk_ptr + b * dk_stride_b + t * dk_stride_t,
            k_out_ptr + b * k_out_stride_b + t * k_out_stride_t,
            k_weight_ptr,
            (tile - num_q_tiles) * BLOCK_H + tl.arange(0, BLOCK_H),
            num_k_heads,
            k_stride_h,
            dk_stride_h,
            k_out_stride_h,
            pairs,
            half,
            c,
            s,
            k_eps,
            K_OFFSET,
            BACKWARD,
        )


_TENSORS = ("q", "k", "dq", "dk", "q_out", "k_out")
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_qk_norm_rope_kernel": [
        {
            "signature": {
                **{f"{name}_ptr": "*bf16" for name in (*_TENSORS, "q_weight", "k_weight")},
                **{f"{name}_ptr": "*bf16" for name in ("cos", "sin")},
                **{f"{name}_stride_{dim}": "i32:16" for name in _TENSORS for dim in "bth"},
                **{f"{name}_stride_{dim}": "i32:16" for name in ("cos", "sin") for dim in "bt"},
                **{name: "i32" for name in ("num_tokens", "num_q_heads", "num_k_heads")},
                **{"half": "i32:16", "q_eps": "fp32", "k_eps": "fp32"},
            },
            "constexprs": {
                **{"Q_OFFSET": 1.0, "K_OFFSET": 1.0, "BACKWARD": backward},
                **{"BLOCK_H": 4, "BLOCK_E": 128},
            },
            "options": {"num_warps": warps_for(4 * _TILE)},
        }
        for backward in (False, True)
    ]
}


def _launch(
    tensors: tuple[Pair, Pair, Pair], norms: Norms, cos: Tensor, sin: Tensor, backward: bool
) -> None:
    (q, k), (dq, dk), (q_out, k_out) = tensors
    batch, num_tokens, num_q_heads, head_dim = q.shape
    num_k_heads, half = k.shape[2], head_dim // 2
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    block_e = next_power_of_2(half)
    block_h = min(max(_TILE // block_e, 1), next_power_of_2(max(num_q_heads, num_k_heads)))
    num_tiles = -(-num_q_heads // block_h) - (-num_k_heads // block_h)
    if not batch * num_tokens:
        return
    flat = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, dq, dk, q_out, k_out)]
    _qk_norm_rope_kernel[(batch * num_tokens, num_tiles)](
        *flat,
        norms[0].weight,
        norms[1].weight,
        cos,
        sin,
        *(stride for x in flat for stride in x.stride()[:3]),
        *cos.stride()[:2],
        *sin.stride()[:2],
        num_tokens,
        num_q_heads,
        num_k_heads,
        half,
        norms[0].eps,
        norms[1].eps,
        Q_OFFSET=float(norms[0].offset),
        K_OFFSET=float(norms[1].offset),
        BACKWARD=backward,
        BLOCK_H=block_h,
        BLOCK_E=block_e,
        num_warps=warps_for(4 * block_h * block_e),
    )


def qk_norm_rope_fwd(q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor) -> Pair:
    """q [B,T,H,E], k [B,T,K,E] of any strides -> normed and rotated, contiguous."""
    if engine_for(q) == "torch":
        return _forward_torch(q, k, norms, cos, sin)
    outs = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    _launch(((q, k), (q, k), outs), norms, cos, sin, backward=False)
    return outs


def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor, outs: Pair
) -> Pair:
    """Gradients of the rotated heads, and q, k as projected -> theirs, into `outs` [B,T,heads,E].

    outs: unit inner stride, any others.
    """
    if engine_for(q) == "torch":
        return _backward_torch(dq, dk, q, k, norms, cos, sin, outs)
    _launch(((q, k), (dq, dk), outs), norms, cos, sin, backward=True)
    return outs


class QKNormRopeFunction(Function):
    """Saves q and k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor) -> Pair:
        ctx.save_for_backward(q, k)
        ctx.norms, ctx.cos, ctx.sin = norms, cos, sin
        return qk_norm_rope_fwd(q, k, norms, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k = ctx.saved_tensors
        outs = (torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(k))
        outs = qk_norm_rope_bwd(dq, dk, q, k, ctx.norms, ctx.cos, ctx.sin, outs)
        needs = ctx.needs_input_grad
        return outs[0] if needs[0] else None, outs[1] if needs[1] else None, None, None, None


def qk_norm_rope(q: Tensor, k: Tensor, norms: Norms, cos: Tensor, sin: Tensor) -> Pair:
    """Norm every head of q and k, then rotate them, with a hand-derived backward.

    q [B,T,H,E], k [B,T,K,E] of one dtype; norms: of q and of k, frozen; cos, sin [B or 1,T,E],
    halves equal -> (q, k) contiguous. Differentiable in q and k.
    """
    return QKNormRopeFunction.apply(q, k, norms, cos, sin)
