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

Saved: q, k, v, O and what the back end needs to rebuild P (L, 4 bytes a row). The back end is
chosen by one function, never by trying: `math` below is the derivation itself and serves fp64 and
odd cases; the others are the framework's flash kernels, called directly so that a twin owns what is
saved. `math` and the reference hold [T, S] scores, the others only L. Scores, softmax and sums are
fp32 or wider everywhere.
Source: Dao et al. 2022 (FlashAttention), https://arxiv.org/abs/2205.14135, section 3, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["math", "cpu_flash", "cudnn", "flash", "efficient"]
Saved = tuple[Tensor | None, ...]

_aten = torch.ops.aten
# Alignment of an attention bias's rows for the memory-efficient kernel, in elements.
_BIAS_ALIGNMENT = 16
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionLayout:
    """Who sees whom beyond causal order.

    query_documents [B, T], key_documents [B, S]: document index of each token, both None for one
    document a row. window: keys a query sees, itself included; None for all.
    """

    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    window: int | None = None
    _masks: dict[Any, Tensor | None] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError(
                "AttentionLayout: give the documents of queries and of keys, or neither"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"AttentionLayout: window {self.window} would hide a token from itself"
            )

    def is_plain(self, num_queries: int, num_keys: int) -> bool:
        """Whether top-left causal order (T == S), or no mask at all (T == 1), says it all."""
        one_document = self.query_documents is None
        window_is_wide = self.window is None or self.window >= num_keys
        return one_document and window_is_wide and num_queries in (1, num_keys)

    def dense_mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """bool [B or 1, 1, T, S], True where seen; None where `is_plain`.

        Made once per layout and shared by its layers.
        """
        key = (num_queries, num_keys)
        if key not in self._masks:
            plain = self.is_plain(*key)
            self._masks[key] = None if plain else self._build_mask(num_queries, num_keys, device)
        return self._masks[key]

    def bias(self, q_BHTE: Tensor, k_BKSE: Tensor) -> Tensor | None:
        """`dense_mask` as an additive bias, 0 or -inf, [B, H, T, S] in q's dtype; cached like it.

        Rows lie a multiple of 16 elements apart, which the memory-efficient CUDA kernel asks for.
        """
        (batch, heads, num_queries, _), num_keys = q_BHTE.shape, k_BKSE.shape[2]
        key = (num_queries, num_keys, q_BHTE.dtype)
        if key not in self._masks:
            mask = self.dense_mask(num_queries, num_keys, q_BHTE.device)
            self._masks[key] = None if mask is None else _additive(mask, q_BHTE.dtype)
        bias = self._masks[key]
        return None if bias is None else bias.expand(batch, heads, -1, -1)

    def _build_mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        keys = torch.arange(num_keys, device=device)[None]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (queries - keys < self.window)
        seen = seen[None, None]
        if self.query_documents is not None and self.key_documents is not None:
            same = self.query_documents[:, :, None] == self.key_documents[:, None, :]
            seen = seen & same[:, None]
        return seen


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    num_keys = mask.shape[-1]
    padded = -(-num_keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    bias = torch.full((*mask.shape[:-1], padded), -torch.inf, dtype=dtype, device=mask.device)
    bias[..., :num_keys].masked_fill_(mask, 0.0)
    return bias[..., :num_keys]


def attention_reference(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, scale: float, layout: AttentionLayout
) -> Tensor:
    """Eager attention in Hugging Face's order: scores, additive mask, fp32 softmax, cast, V."""
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE = repeat(k_BKSE, "b k s e -> b (k g) s e", g=groups)
    v_BHSE = repeat(v_BKSE, "b k s e -> b (k g) s e", g=groups)
    scores = torch.matmul(q_BHTE, k_BHSE.transpose(2, 3)) * scale
    seen = _seen(layout, q_BHTE, k_BKSE)
    if seen is not None:
        nothing = torch.zeros(seen.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + nothing.masked_fill(~seen, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
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


def choose_backend(q: Tensor, k: Tensor, layout: AttentionLayout) -> Backend:
    """The back end for these tensors: q [B, H, T, E], k [B, K, S, E].

    cuDNN is the fastest on Hopper for 16-bit plain causal attention (529 against FlashAttention-2's
    289 TFLOP/s forward at 4x2048, 32/8 heads of 128, H100), but its backward is not deterministic.
    Masks and fp32 go to the memory-efficient kernel; fp64 and what no kernel takes to the formula.
    """
    num_queries, head_dim = q.shape[2:]
    if q.dtype == torch.float64 or (q.is_cuda and head_dim % 8 != 0):
        return "math"
    if not q.is_cuda:
        return "cpu_flash"
    if q.dtype in _HALF and num_queries > 1 and layout.is_plain(num_queries, k.shape[2]):
        hopper = torch.cuda.get_device_capability(q.device)[0] >= 9
        if hopper and head_dim <= 128 and not torch.are_deterministic_algorithms_enabled():
            return "cudnn"
        if head_dim <= 256:
            return "flash"
    return "efficient"


def _math_weights(q_BHTE: Tensor, k_BKSE: Tensor, scale: float, layout: AttentionLayout) -> Tensor:
    """P as [B, K, G, T, S] in fp32 or wider: G query heads share one kv head."""
    wide = torch.promote_types(q_BHTE.dtype, torch.float32)
    q = rearrange(q_BHTE.to(wide), "b (k g) t e -> b k g t e", k=k_BKSE.shape[1])
    scores = torch.einsum("bkgte,bkse->bkgts", q, k_BKSE.to(wide)) * scale
    seen = _seen(layout, q_BHTE, k_BKSE)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    return torch.softmax(scores, dim=-1)


def _math_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: AttentionLayout
) -> tuple[Tensor, Saved]:
    weights = _math_weights(q, k, scale, layout)
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
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _math_weights(q, k, scale, layout)
    wide, kv_heads = weights.dtype, k.shape[1]

    def grouped(x: Tensor) -> Tensor:
        return rearrange(x.to(wide), "b (k g) t e -> b k g t e", k=kv_heads)

    do, o, q_wide = grouped(dout), grouped(out), grouped(q)
    dv = torch.einsum("bkgts,bkgte->bkse", weights, do)
    dweights = torch.einsum("bkgte,bkse->bkgts", do, v.to(wide))
    dscores = weights * (dweights - (do * o).sum(-1, keepdim=True)) * scale
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


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: AttentionLayout
) -> tuple[Tensor, Saved]:
    """(out [B, H, T, E], what `attention_bwd` needs beside q, k, v and out)."""
    backend, causal = choose_backend(q, k, layout), _is_causal(q, k, layout)
    if backend == "math":
        return _math_fwd(q, k, v, scale, layout)
    q, k, v = _dense(q), _dense(k), _dense(v)
    if backend == "cudnn":
        out, lse, cum_q, cum_k, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, (lse, cum_q, cum_k, seed, offset)
    k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
    if backend == "cpu_flash":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=layout.bias(q, k), scale=scale
        )
        return out, (lse,)
    if backend == "flash":
        out, lse, cum_q, cum_k, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, (lse, cum_q, cum_k, seed, offset)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v."""
    backend, causal = choose_backend(q, k, layout), _is_causal(q, k, layout)
    if backend == "math":
        return _math_bwd(dout, q, k, v, out, scale, layout)
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
    k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
    if backend == "cpu_flash":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, saved[0], 0.0, causal, attn_mask=layout.bias(q, k), scale=scale
        )
    elif backend == "flash":
        lse, cum_q, cum_k, seed, offset = saved
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            *(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset),
            scale=scale,
        )
    else:
        lse, seed, offset = saved
        wanted = [True, True, True, False]
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *(dout, q, k, v, layout.bias(q, k), out, lse, seed, offset, 0.0, wanted, causal),
            scale=scale,
        )
    return dq, _summed(dk, kv_heads), _summed(dv, kv_heads)


class AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, out and the back end's own (log-sum-exp, mostly)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, layout: AttentionLayout
    ) -> Tensor:
        out, saved = attention_fwd(q, k, v, scale, layout)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.scale, ctx.layout = scale, layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        grads = attention_bwd(dout, q, k, v, out, tuple(saved), ctx.scale, ctx.layout)
        return *grads, None, None


def attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, scale: float, layout: AttentionLayout
) -> Tensor:
    """Causal attention with a backward of its own.

    q [B, H, T, E], k and v [B, K, S, E] of one dtype, any strides (views of [B, T, H, E] as a rule)
    -> [B, H, T, E]. Differentiable in q, k, v. Raises ValueError for shapes that do not fit.
    """
    (batch, heads, num_queries, head_dim), keys = q_BHTE.shape, k_BKSE.shape
    fits = keys[0] == batch and keys[3] == head_dim and keys == v_BKSE.shape
    if not fits or heads % keys[1] or keys[2] < num_queries:
        raise ValueError(
            f"attention: q {tuple(q_BHTE.shape)}, k {tuple(keys)} and v {tuple(v_BKSE.shape)} "
            "do not fit: expected q [B,H,T,E], k and v [B,K,S,E] with H a multiple of K and S >= T"
        )
    return AttentionFunction.apply(q_BHTE, k_BKSE, v_BKSE, scale, layout)
