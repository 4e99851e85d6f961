"""Rotary position embedding of q and k in one launch, half-rotation layout (as HF stores it).

Shapes: B batch, T tokens, H query heads, K kv heads, E head dim. q [B,T,H,E], k [B,T,K,E];
cos, sin [B or 1, T, E], with their two halves equal and already times the attention factor (yarn).

With x = (x1, x2) the halves of a head, c and s the (equal) halves of cos and sin:
Forward:   y1 = x1 * c - x2 * s          y2 = x2 * c + x1 * s     (x * cos + rotate_half(x) * sin)
Backward:  the map is linear in x, so dx is its transpose applied to dy:
           dx1 = dy1 * c + dy2 * s       dx2 = dy2 * c - dy1 * s     = the forward map with -sin
The transpose, not the inverse: with an attention factor a != 1 the map is a times a rotation, and
both directions must carry a.

Saved: cos and sin only (shared by every layer). cos and sin get no gradient. Computed in fp32, or
the input's dtype where wider, and rounded once; the reference rounds cos, sin and each product to
q's dtype, as HF does. Any strides are accepted, so a view of a stacked qkv buffer is read in place;
outputs are contiguous. Bytes moved: q and k read once and written once; a program rotates a share
of q's heads and of k's of one token, with the tables read once.
Source: Su et al. 2021, "RoFormer", section 3.4.2 (pairs i and i + E/2 as in GPT-NeoX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.function import Function
from sloth.kernels.rows import compute_dtype, next_power_of_2

# Elements of a half-head tile of q in a program: with head dim 128 that is 32 heads.
_TILE = 2048
_WARPS = 8

Outs = tuple[Tensor, Tensor] | None


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Eager RoPE in the activation dtype, in Hugging Face's order. q [B,T,H,E], k [B,T,K,E]."""
    cos = cos.to(q.dtype).unsqueeze(2)
    sin = sin.to(q.dtype).unsqueeze(2)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rope_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float, outs: Outs
) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(q.dtype)
    half = q.shape[-1] // 2
    c = cos[..., :half].to(wide).unsqueeze(2)
    s = sign * sin[..., :half].to(wide).unsqueeze(2)

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.to(wide).chunk(2, dim=-1)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)

    if outs is None:
        return rotate(q), rotate(k)
    return outs[0].copy_(rotate(q)), outs[1].copy_(rotate(k))


@jit
def _rotate_tile(
    x_ptr, y_ptr, heads, num_heads, x_stride_h, x_stride_e, pairs, half, pair_mask, c, s
):
    """Rotate [BLOCK_H, BLOCK_E] pairs of one token; x_ptr and y_ptr point at that token."""
    mask = (heads < num_heads)[:, None] & pair_mask[None, :]
    x_at = x_ptr + heads[:, None] * x_stride_h + pairs[None, :] * x_stride_e
    x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + half * x_stride_e, mask=mask, other=0.0).to(tl.float32)
    y_at = y_ptr + heads[:, None] * (2 * half) + pairs[None, :]
    tl.store(y_at, (x1 * c - x2 * s).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_at + half, (x2 * c + x1 * s).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_e,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_e,
    cos_stride_b,
    cos_stride_t,
    cos_stride_e,
    sin_stride_b,
    sin_stride_t,
    sin_stride_e,
    q_out_stride,
    k_out_stride,
    num_tokens,
    num_q_heads,
    num_k_heads,
    half,
    SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    batch = row // num_tokens
    token = row % num_tokens
    pairs = tl.arange(0, BLOCK_E)
    pair_mask = pairs < half
    cos_at = cos_ptr + batch * cos_stride_b + token * cos_stride_t + pairs * cos_stride_e
    sin_at = sin_ptr + batch * sin_stride_b + token * sin_stride_t + pairs * sin_stride_e
    c = tl.load(cos_at, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    s = SIGN * tl.load(sin_at, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    q_heads = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    x_ptr = q_ptr + batch * q_stride_b + token * q_stride_t
    y_ptr = q_out_ptr + row * q_out_stride
    _rotate_tile(
        x_ptr, y_ptr, q_heads, num_q_heads, q_stride_h, q_stride_e, pairs, half, pair_mask, c, s
    )
    k_heads = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    x_ptr = k_ptr + batch * k_stride_b + token * k_stride_t
    y_ptr = k_out_ptr + row * k_out_stride
    _rotate_tile(
        x_ptr, y_ptr, k_heads, num_k_heads, k_stride_h, k_stride_e, pairs, half, pair_mask, c, s
    )


_POINTERS = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
# inner strides are passed as 1 by contiguous heads, which Triton turns into a constant
_STRIDES = tuple(f"{x}_stride_{dim}" for x in "qk" for dim in "bth") + tuple(
    f"{x}_stride_{dim}" for x in ("cos", "sin") for dim in "bt"
)
_STRIDES += ("q_out_stride", "k_out_stride")
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_rope_kernel": [
        {
            "signature": {
                **{name: "*bf16" for name in _POINTERS},
                **{name: "i32:16" for name in _STRIDES},
                "num_tokens": "i32",
                "num_q_heads": "i32",
                "num_k_heads": "i32",
                "half": "i32:16",
            },
            "constexprs": {
                **{f"{x}_stride_e": 1 for x in ("q", "k", "cos", "sin")},
                "SIGN": 1.0,
                "BLOCK_Q": 32,
                "BLOCK_K": 8,
                "BLOCK_E": 64,
            },
            "options": {"num_warps": _WARPS},
        }
    ]
}


def _rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float, outs: Outs
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, num_q_heads, head_dim = q.shape
    num_k_heads, half = k.shape[2], head_dim // 2
    # a table shared by the batch is read through a stride of 0
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    if outs is None:
        q_out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        k_out = torch.empty(k.shape, device=k.device, dtype=k.dtype)
    else:
        q_out, k_out = outs
    block_e = next_power_of_2(half)
    block_q = min(max(_TILE // block_e, 1), next_power_of_2(num_q_heads))
    num_tiles = -(-num_q_heads // block_q)
    block_k = next_power_of_2(-(-num_k_heads // num_tiles))
    if batch * num_tokens:
        _rope_kernel[(batch * num_tokens, num_tiles)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *q.stride(),
            *k.stride(),
            *cos.stride(),
            *sin.stride(),
            q_out.stride(1),
            k_out.stride(1),
            num_tokens,
            num_q_heads,
            num_k_heads,
            half,
            SIGN=sign,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_E=block_e,
            num_warps=_WARPS,
        )
    return q_out, k_out


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float, outs: Outs
) -> tuple[Tensor, Tensor]:
    engine = _rope_triton if engine_for(q) == "triton" else _rope_torch
    return engine(q, k, cos, sin, sign, outs)


def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, outs: Outs = None
) -> tuple[Tensor, Tensor]:
    """q [B,T,H,E], k [B,T,K,E], cos and sin [B or 1,T,E] -> rotated (q, k), contiguous.

    outs: two tensors that take them instead, heads contiguous and tokens evenly spaced (stride(0)
    is T stride(1)); they may be q and k themselves.
    """
    num_tokens, head_dim = q.shape[1], q.shape[-1]
    if head_dim % 2 or k.shape[-1] != head_dim or cos.shape[1:] != (num_tokens, head_dim):
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)} and cos {tuple(cos.shape)} do not fit: "
            "expected q [B,T,H,E], k [B,T,K,E], cos and sin [B or 1,T,E] with an even E"
        )
    return _rope(q, k, cos, sin, 1.0, outs)


def rope_bwd(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, outs: Outs = None
) -> tuple[Tensor, Tensor]:
    """Gradients of the rotated q and k -> gradients of q and k: the transposed map."""
    return _rope(dq, dk, cos, sin, -1.0, outs)


class RopeFunction(Function):
    """Saves cos and sin."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope_fwd(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        need_dq, need_dk = ctx.needs_input_grad[:2]
        dq, dk = rope_bwd(dq, dk, cos, sin)
        return dq if need_dq else None, dk if need_dk else None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions, with a hand-derived backward.

    q [B,T,H,E], k [B,T,K,E] of one dtype and any strides; cos, sin [B or 1,T,E] in fp32 or that
    dtype, halves equal -> (q, k) contiguous. Raises ValueError for shapes that do not fit.
    """
    return RopeFunction.apply(q, k, cos, sin)
