"""Attention on a GPU with what the framework's kernels lack, at head dims up to 256: a softcap, and
in fp32 windows and documents without a mask of size T x T.

Shapes: q, O [B, H, T, E]; k, v [B, K, T, E]; any strides with unit inner stride; H a multiple of K.
Query i sees key j iff j <= i, i - j < window, and j is not before the first token of i's document.

    S = s Q K^T;   C = c tanh(S / c);   P = softmax(C);   O = P V;   L = log-sum-exp of each row

Forward: a program owns a tile of queries and walks the tiles of keys it sees, with a running sum,
and a running maximum where nothing bounds the scores. A softcap does: e^C neither overflows fp32
nor bf16 for c up to 64, so that the maximum and what it costs are left out. The mask is applied on
tiles that it crosses alone; those before a query tile's first document or window are not visited.
tanh(x) = 1 - 2 / (1 + e^2x), which is exact to fp32 and costs two of the special function unit.

Saved: L (fp32, natural logarithm). Products take the inputs' dtype and sum in fp32; scores and
softmax are fp32. Operations: 4 B H T^2 E / 2. The backward is in `flash_attention_bwd.py`.
Source: Dao 2023 (FlashAttention-2), https://arxiv.org/abs/2307.08691; Gemma Team 2024 (softcap),
https://arxiv.org/abs/2408.00118, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import HAS_TRITON, jit, tl
from sloth.kernels.flash_tiles import compile_entries, constants

_LOG2E: Any = tl.constexpr(1.4426950408889634) if HAS_TRITON else None


@jit
def bent_scores(products, scale, SOFTCAP: tl.constexpr):
    """(log2(e) C, C / c) of a tile of Q K^T in fp32; the latter is 0 where nothing is bent."""
    if SOFTCAP is None:
        bent = tl.zeros(products.shape, tl.float32)
        scores = products * (scale * _LOG2E)
    else:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(products * (scale * (2.0 * _LOG2E / SOFTCAP))))
        scores = bent * (SOFTCAP * _LOG2E)
    return scores, bent


@jit
def dscores(weights, dweights, delta, bent):
    """dS / s from P, dO V^T and what the softcap bent."""
    return weights * (dweights - delta) * (1.0 - bent * bent)


@jit
def load_tile(ptr, rows, stride, num_tokens, dims, HEAD_DIM: tl.constexpr, CHECKED: tl.constexpr):
    """[rows, head dim] of one head; rows beyond the last token are zeros if CHECKED."""
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM == dims.shape[0]:
        if CHECKED:
            return tl.load(at, mask=(rows < num_tokens)[:, None], other=0.0)
        return tl.load(at)
    return tl.load(at, mask=(rows < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@jit
def store_tile(ptr, x, rows, stride, num_tokens, dims, HEAD_DIM: tl.constexpr):
    mask = (rows < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def key_ranges(
    first_ptr,
    start_row,
    num_tokens,
    WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(start, whole from, whole to, stop): the keys that a tile of queries sees, in three
    stretches. Tiles of keys in the middle one are seen by every query: only the others need a mask,
    and the first is empty without window and documents. All but `stop` are multiples of BLOCK_K.

    first_ptr: where the document of each of the row's tokens begins.
    """
    last_row = tl.minimum(start_row + BLOCK_Q, num_tokens) - 1
    start = start_row * 0
    whole = start
    if HAS_DOCUMENTS:
        start = tl.load(first_ptr + start_row).to(tl.int64)
        whole = tl.load(first_ptr + last_row).to(tl.int64)
    if WINDOW is not None:
        start = tl.maximum(start, start_row - WINDOW + 1)
        whole = tl.maximum(whole, last_row - WINDOW + 1)
    start = (start // BLOCK_K) * BLOCK_K
    whole = tl.cdiv(whole, BLOCK_K) * BLOCK_K
    whole_stop = tl.maximum(((start_row + 1) // BLOCK_K) * BLOCK_K, start)
    whole = tl.minimum(whole, whole_stop)
    return start, whole, whole_stop, last_row + 1


@jit
def seen_keys(rows, cols, first, WINDOW: tl.constexpr):
    """[rows, cols]: which keys the queries see; first: where each query's document begins."""
    seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= first[:, None])
    if WINDOW is not None:
        seen = seen & (rows[:, None] - cols[None, :] < WINDOW)
    return seen


@jit
def _attend(
    acc,
    total,
    largest,
    q,
    k_head,
    v_head,
    k_stride,
    v_stride,
    rows,
    dims,
    first,
    start,
    stop,
    num_tokens,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Take the keys from `start` to `stop` into the running sums."""
    for begin in range(start, stop, BLOCK_K):
        cols = (begin + tl.arange(0, BLOCK_K)).to(tl.int32)
        k = load_tile(k_head, cols, k_stride, num_tokens, dims, HEAD_DIM, MASKED)
        scores, _ = bent_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
        if MASKED:
            scores = tl.where(seen_keys(rows, cols, first, WINDOW), scores, -float("inf"))
        v = load_tile(v_head, cols, v_stride, num_tokens, dims, HEAD_DIM, MASKED)
        if BOUNDED:
            weights = tl.exp2(scores)
        else:
            bigger = tl.maximum(largest, tl.max(scores, 1))
            # A row that has seen nothing yet keeps -inf - -inf away from nan.
            anchor = tl.where(bigger == -float("inf"), 0.0, bigger)
            weights = tl.exp2(scores - anchor[:, None])
            rescale = tl.exp2(largest - anchor)
            total = total * rescale
            acc = acc * rescale[:, None]
            largest = bigger
        total += tl.sum(weights, 1)
        acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, total, largest


@jit
def _flash_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    first_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    num_tokens,
    num_heads,
    groups,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The last tiles see the most keys: they go first, so that short ones fill the end.
    tile = tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64)
    b, h = pair // num_heads, pair % num_heads
    rows = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
    dims = tl.arange(0, BLOCK_E)
    q_head = q_ptr + b * q_stride_b + h * q_stride_h
    q = load_tile(q_head, rows, q_stride_t, num_tokens, dims, HEAD_DIM, True)
    k_head = k_ptr + b * k_stride_b + (h // groups) * k_stride_h
    v_head = v_ptr + b * v_stride_b + (h // groups) * v_stride_h
    first = tl.zeros((BLOCK_Q,), tl.int32)
    if HAS_DOCUMENTS:
        first = tl.load(first_ptr + b * num_tokens + rows, mask=rows < num_tokens, other=0)
    edges = key_ranges(
        first_ptr + b * num_tokens,
        tile * BLOCK_Q,
        num_tokens,
        WINDOW,
        HAS_DOCUMENTS,
        BLOCK_Q,
        BLOCK_K,
    )
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for stretch in tl.static_range(3):
        if stretch != 0 or HAS_DOCUMENTS or WINDOW is not None:
            acc, total, largest = _attend(
                acc,
                total,
                largest,
                q,
                k_head,
                v_head,
                k_stride_t,
                v_stride_t,
                rows,
                dims,
                first,
                edges[stretch],
                edges[stretch + 1],
                num_tokens,
                scale,
                stretch != 1,
                WINDOW,
                SOFTCAP,
                BOUNDED,
                HEAD_DIM,
                BLOCK_K,
            )
    safe = tl.where(total == 0.0, 1.0, total)
    out_head = out_ptr + b * out_stride_b + h * out_stride_h
    store_tile(out_head, acc / safe[:, None], rows, out_stride_t, num_tokens, dims, HEAD_DIM)
    if not BOUNDED:
        total = tl.where(total == 0.0, 0.0, largest + tl.log2(safe))
    else:
        total = tl.log2(safe)
    tl.store(lse_ptr + pair * num_tokens + rows, total / _LOG2E, mask=rows < num_tokens)


_STRIDED = ("q", "k", "v", "out")
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_flash_fwd_kernel": compile_entries("fwd", _STRIDED, ("lse",), ("first",))
}


def empty_like_heads(x_BHTE: Tensor) -> Tensor:
    """Room for a tensor [B, H, T, E] that lies as [B, T, H, E] in memory."""
    batch, heads, num_tokens, head_dim = x_BHTE.shape
    out = torch.empty(batch, num_tokens, heads, head_dim, dtype=x_BHTE.dtype, device=x_BHTE.device)
    return out.transpose(1, 2)


def flash_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(O [B, H, T, E], L [B, H, T] fp32). first [B, T] int32: where each token's document begins.

    q [B, H, T, E], k and v [B, K, T, E] in fp16, bf16 or fp32 with E at most 256.
    """
    batch, heads, num_tokens, _ = q.shape
    out = empty_like_heads(q)
    lse = torch.empty(batch, heads, num_tokens, dtype=torch.float32, device=q.device)
    meta = constants("fwd", q, window, softcap, first is not None)
    if q.numel():
        _flash_fwd_kernel[(batch * heads, -(-num_tokens // meta["BLOCK_Q"]))](
            q,
            k,
            v,
            out,
            lse,
            lse if first is None else first,
            *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
            num_tokens,
            heads,
            heads // k.shape[1],
            scale,
            **meta,
        )
    return out, lse
