"""Causal attention: O = softmax(s Q K^T + mask) V; grouped heads, windows, packed documents.

Shapes: q, O [B, H, T, E]; k, v [B, K, S, E]; H a multiple of K (query head h reads kv head
h * K / H). Queries are the last T of S positions (S > T when decoding with a cache). Key j is seen
by query i iff j <= i + S - T, i + S - T - j < window, and both belong to one document. The document
of query i is that of key i + S - T and a window is at least 1, so a query always sees itself: no
row is fully masked.

Forward:   P = softmax(s Q K^T);   O = P V;   L = log-sum-exp of each row
Backward:  dV = P^T dO;   dP = dO V^T;   dS = P * (dP - rowsum(dO * O))
           dQ = s dS K;   dK = s dS^T Q
The row sum stands for P's own derivative: rowsum(dP * P) = rowsum(dO * O).
With softcap c (Gemma 2) the softmax sees C = c tanh(s Q K^T / c), so that dS gains the factor
dC / d(s Q K^T) = 1 - (C / c)^2.

Saved: q, k, v, O and what the back end needs to rebuild P (L, 4 bytes a row). The back end is
chosen by one function, never by trying: `math` below is the derivation itself and serves fp64 and
odd cases; the others are the framework's flash kernels, called directly so that a twin owns what is
saved. `math` and the reference hold [T, S] scores, the others only L. Scores, softmax and sums are
fp32 or wider everywhere.
Source: Dao et al. 2022 (FlashAttention), https://arxiv.org/abs/2205.14135, section 3, appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels.function import Function
from sloth.kernels.ops.attention_backend import choose_backend
from sloth.kernels.ops.attention_layout import AttentionLayout
from sloth.kernels.ops.decode_attention import decode_attention
from sloth.kernels.ops.flash_attention import flash_attention_fwd
from sloth.kernels.ops.flash_attention_bwd import flash_attention_bwd
from sloth.kernels.rows import compute_dtype

Saved = tuple[Tensor | None, ...]

_aten = torch.ops.aten


def attention_reference(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    scale: float,
    layout: AttentionLayout,
    softcap: float | None = None,
) -> Tensor:
    """Eager attention in Hugging Face's order: scores, cap, mask, fp32 softmax, cast, V.

    Keys and values lie head by head, as its cache leaves them, which is on unless switched off:
    products of few rows round as their operands lie.
    """
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE = repeat(k_BKSE, "b k s e -> b (k g) s e", g=groups).contiguous()
    v_BHSE = repeat(v_BKSE, "b k s e -> b (k g) s e", g=groups).contiguous()
    scores = torch.matmul(q_BHTE, k_BHSE.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = _seen(layout, q_BHTE, k_BKSE)
    if seen is not None:
        nothing = torch.zeros(seen.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + nothing.masked_fill(~seen, torch.finfo(scores.dtype).min)
    wide = compute_dtype(scores.dtype)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q_BHTE.dtype)
    return torch.matmul(weights, v_BHSE)


def _seen(layout: AttentionLayout, q: Tensor, k: Tensor) -> Tensor | None:
    """The full mask, causal order included; None only for a single query that sees every key."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = layout.dense_mask(num_queries, num_keys, q.device)
    if mask is None and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril()[
            None, None
        ]
    return mask


def _math_weights(
    q_BHTE: Tensor, k_BKSE: Tensor, scale: float, layout: AttentionLayout, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """P [B, K, G, T, S] in fp32 or wider, G query heads sharing a kv head; and the cap's slope."""
    wide = compute_dtype(q_BHTE.dtype)
    q = rearrange(q_BHTE.to(wide), "b (k g) t e -> b k g t e", k=k_BKSE.shape[1])
    scores = torch.einsum("bkgte,bkse->bkgts", q, k_BKSE.to(wide)) * scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent.square()
    seen = _seen(layout, q_BHTE, k_BKSE)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    return torch.softmax(scores, dim=-1), slope


def _math_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: AttentionLayout, softcap: float | None
) -> tuple[Tensor, Saved]:
    weights, _ = _math_weights(q, k, scale, layout, softcap)
    out = torch.einsum("bkgts,bkse->bkgte", weights, v.to(weights.dtype))
    return rearrange(out, "b k g t e -> b (k g) t e").to(q.dtype), ()


def _math_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    layout: AttentionLayout,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, slope = _math_weights(q, k, scale, layout, softcap)
    wide, kv_heads = weights.dtype, k.shape[1]

    def grouped(x: Tensor) -> Tensor:
        return rearrange(x.to(wide), "b (k g) t e -> b k g t e", k=kv_heads)

    do, o, q_wide = grouped(dout), grouped(out), grouped(q)
    dv = torch.einsum("bkgts,bkgte->bkse", weights, do)
    dweights = torch.einsum("bkgte,bkse->bkgts", do, v.to(wide))
    dscores = weights * (dweights - (do * o).sum(-1, keepdim=True)) * scale
    if slope is not None:
        dscores = dscores * slope
    dq = torch.einsum("bkgts,bkse->bkgte", dscores, k.to(wide))
    dk = torch.einsum("bkgts,bkgte->bkse", dscores, q_wide)
    dq = rearrange(dq, "b k g t e -> b (k g) t e")
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _expanded(x_BKSE: Tensor, num_heads: int) -> Tensor:
    """kv heads repeated for each query head, for kernels that want equal head counts."""
    groups = num_heads // x_BKSE.shape[1]
    return x_BKSE if groups == 1 else x_BKSE.repeat_interleave(groups, dim=1)


def _summed(dx_BHSE: Tensor, kv_heads: int) -> Tensor:
    """Gradients of repeated heads back onto the kv heads, summed in fp32 and rounded once."""
    if dx_BHSE.shape[1] == kv_heads:
        return dx_BHSE
    return rearrange(dx_BHSE, "b (k g) s e -> b k g s e", k=kv_heads).sum(2)


def _dense(x: Tensor) -> Tensor:
    """`x` with unit inner stride, which every kernel asks for; q, k, v of a model have it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_layout_of(dout: Tensor, out: Tensor) -> Tensor:
    """`dout` with the strides of `out`, copied only if it has others.

    torch caches cuDNN plans by shape and leaves the strides of dO out of the key, so that a second
    layout runs the plan of the first and gives wrong gradients (seen with torch 2.11 on an H200).
    """
    return dout if dout.stride() == out.stride() else torch.empty_like(out).copy_(dout)


def _is_causal(q: Tensor, k: Tensor, layout: AttentionLayout) -> bool:
    """The kernels' own causal flag: top-left, so only for T == S; one query needs no mask."""
    return q.shape[2] > 1 and layout.is_plain(q.shape[2], k.shape[2])


def _flash_arguments(
    q: Tensor, k: Tensor, layout: AttentionLayout
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(cumulative lengths and longest of queries and keys, window) as the kernel takes them."""
    window = {}
    if layout.window is not None:
        window = {"window_size_left": layout.window - 1, "window_size_right": 0}
    bounds = layout.bounds
    if bounds is None:
        return (None, None, q.shape[2], k.shape[2]), window
    return (bounds.cumulative, bounds.cumulative, bounds.longest, bounds.longest), window


def _tokens_first(x_BHTE: Tensor, layout: AttentionLayout) -> Tensor:
    """[B, T, H, E]; with documents [B T, H, E], since each is a row of its own."""
    x_BTHE = x_BHTE.transpose(1, 2)
    return x_BTHE if layout.bounds is None else x_BTHE.flatten(0, 1)


def _heads_first(x: Tensor, batch: int) -> Tensor:
    """Back to [B, H, T, E]."""
    return (x if x.dim() == 4 else x.unflatten(0, (batch, -1))).transpose(1, 2)


def _flash_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: AttentionLayout
) -> tuple[Tensor, Saved]:
    """FlashAttention-2, kv heads shared as they are; causal order counts from the last key."""
    lengths, window = _flash_arguments(q, k, layout)
    tensors = (_tokens_first(x, layout) for x in (q, k, v))
    out, lse, seed, offset, _ = _aten._flash_attention_forward(
        *tensors, *lengths, 0.0, True, False, scale=scale, **window
    )
    return _heads_first(out, len(q)), (lse, seed, offset)


def _flash_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: Saved,
    scale: float,
    layout: AttentionLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, window = _flash_arguments(q, k, layout)
    lse, seed, offset = saved
    tensors = (_tokens_first(x, layout) for x in (dout, q, k, v, out))
    grads = _aten._flash_attention_backward(
        *tensors, lse, *lengths, 0.0, True, seed, offset, scale=scale, **window
    )
    dq, dk, dv = (_heads_first(grad, len(q)) for grad in grads)
    return dq, dk, dv


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: AttentionLayout,
    softcap: float | None = None,
) -> tuple[Tensor, Saved]:
    """(out [B, H, T, E], what `attention_bwd` needs beside q, k, v and out)."""
    backend, causal = choose_backend(q, k, layout, softcap), _is_causal(q, k, layout)
    if backend == "math":
        return _math_fwd(q, k, v, scale, layout, softcap)
    q, k, v = _dense(q), _dense(k), _dense(v)
    if backend == "cudnn":
        out, lse, cum_q, cum_k, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, (lse, cum_q, cum_k, seed, offset)
    if backend == "triton":
        first = None if layout.bounds is None else layout.bounds.first
        out, lse = flash_attention_fwd(q, k, v, scale, softcap, layout.window, first)
        return out, (lse,)
    if backend == "decode":
        assert layout.spans is not None
        return decode_attention(q, k, v, scale, layout.spans, layout.window, softcap), ()
    if backend == "flash":
        return _flash_fwd(q, k, v, scale, layout)
    k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
    if backend == "cpu_flash":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=layout.bias(q, k), scale=scale
        )
        return out, (lse,)
    out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention(
        q, k, v, layout.bias(q, k), True, 0.0, causal, scale=scale
    )
    return out, (lse, seed, offset)


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: Saved,
    scale: float,
    layout: AttentionLayout,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v."""
    backend, causal = choose_backend(q, k, layout, softcap), _is_causal(q, k, layout)
    if backend == "math":
        return _math_bwd(dout, q, k, v, out, scale, layout, softcap)
    assert backend != "decode", "a step of decoding has no backward"
    kv_heads, max_q, max_k = k.shape[1], q.shape[2], k.shape[2]
    dout, q, k, v = _dense(dout), _dense(q), _dense(k), _dense(v)
    if backend == "cudnn":
        lse, cum_q, cum_k, seed, offset = saved
        dout = _in_layout_of(dout, out)
        return _aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, lse, seed, offset, None),
            *(cum_q, cum_k, max_q, max_k, 0.0, causal),
            scale=scale,
        )
    if backend == "triton":
        (lse,), bounds = saved, layout.bounds
        assert lse is not None
        ends = (None, None) if bounds is None else (bounds.first, bounds.last)
        return flash_attention_bwd(dout, q, k, v, out, lse, scale, softcap, layout.window, *ends)
    if backend == "flash":
        return _flash_bwd(dout, q, k, v, out, saved, scale, layout)
    k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
    if backend == "cpu_flash":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, saved[0], 0.0, causal, attn_mask=layout.bias(q, k), scale=scale
        )
    else:
        lse, seed, offset = saved
        wanted = [True, True, True, False]
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *(dout, q, k, v, layout.bias(q, k), out, lse, seed, offset, 0.0, wanted, causal),
            scale=scale,
        )
    return dq, _summed(dk, kv_heads), _summed(dv, kv_heads)


class AttentionFunction(Function):
    """Saves q, k, v, out and the back end's own (log-sum-exp, mostly)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        layout: AttentionLayout,
        softcap: float | None,
    ) -> Tensor:
        out, saved = attention_fwd(q, k, v, scale, layout, softcap)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.how = scale, layout, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        grads = attention_bwd(dout, q, k, v, out, tuple(saved), *ctx.how)
        return *grads, None, None, None


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    scale: float,
    layout: AttentionLayout,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention with a backward of its own.

    q [B, H, T, E], k and v [B, K, S, E] of one dtype, any strides (views of [B, T, H, E] as a rule)
    -> [B, H, T, E]. softcap: c, for scores bent to c tanh(scores / c). Differentiable in q, k, v.
    Raises ValueError for shapes that do not fit.
    """
    (batch, heads, num_queries, head_dim), keys = q_BHTE.shape, k_BKSE.shape
    fits = keys[0] == batch and keys[3] == head_dim and keys == v_BKSE.shape
    if not fits or heads % keys[1] or keys[2] < num_queries:
        raise ValueError(
            f"attention: q {tuple(q_BHTE.shape)}, k {tuple(keys)} and v {tuple(v_BKSE.shape)} "
            "do not fit: expected q [B,H,T,E], k and v [B,K,S,E] with H a multiple of K and S >= T"
        )
    return AttentionFunction.apply(q_BHTE, k_BKSE, v_BKSE, scale, layout, softcap)
