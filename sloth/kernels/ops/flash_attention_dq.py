"""dQ of `flash_attention.py`, and d = rowsum(dO * O), by tiles of queries; formulas in
`flash_attention_bwd.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import jit, tl
from sloth.kernels.flash_tiles import compile_entries, constants
from sloth.kernels.ops.flash_attention import (
    _LOG2E,
    bent_scores,
    dscores,
    empty_like_heads,
    key_ranges,
    load_tile,
    seen_keys,
    store_tile,
)


@jit
def _add_dq(
    dq,
    q,
    dout,
    lse,
    delta,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Take the keys from `start` to `stop` into dQ / s. lse: L times log2(e)."""
    for begin in range(start, stop, BLOCK_K):
        cols = (begin + tl.arange(0, BLOCK_K)).to(tl.int32)
        k = load_tile(k_head, cols, k_stride, num_tokens, dims, HEAD_DIM, MASKED)
        v = load_tile(v_head, cols, v_stride, num_tokens, dims, HEAD_DIM, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        scores, bent = bent_scores(products, scale, SOFTCAP)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            weights = tl.where(seen_keys(rows, cols, first, WINDOW), weights, 0.0)
        ds = dscores(weights, dweights, delta[:, None], bent)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    return dq


@jit
def _flash_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
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
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    num_tokens,
    num_heads,
    groups,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64)
    b, h = pair // num_heads, pair % num_heads
    rows = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
    inside = rows < num_tokens
    dims = tl.arange(0, BLOCK_E)
    dout_head = dout_ptr + b * dout_stride_b + h * dout_stride_h
    dout = load_tile(dout_head, rows, dout_stride_t, num_tokens, dims, HEAD_DIM, True)
    out_head = out_ptr + b * out_stride_b + h * out_stride_h
    out = load_tile(out_head, rows, out_stride_t, num_tokens, dims, HEAD_DIM, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + pair * num_tokens + rows, delta, mask=inside)
    q_head = q_ptr + b * q_stride_b + h * q_stride_h
    q = load_tile(q_head, rows, q_stride_t, num_tokens, dims, HEAD_DIM, True)
    lse = tl.load(lse_ptr + pair * num_tokens + rows, mask=inside, other=0.0) * _LOG2E
    k_head = k_ptr + b * k_stride_b + (h // groups) * k_stride_h
    v_head = v_ptr + b * v_stride_b + (h // groups) * v_stride_h
    first = tl.zeros((BLOCK_Q,), tl.int32)
    if HAS_DOCUMENTS:
        first = tl.load(first_ptr + b * num_tokens + rows, mask=inside, other=0)
    edges = key_ranges(
        first_ptr + b * num_tokens,
        tile * BLOCK_Q,
        num_tokens,
        WINDOW,
        HAS_DOCUMENTS,
        BLOCK_Q,
        BLOCK_K,
    )
    dq = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for stretch in tl.static_range(3):
        if stretch != 0 or HAS_DOCUMENTS or WINDOW is not None:
            dq = _add_dq(
                dq,
                q,
                dout,
                lse,
                delta,
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
                HEAD_DIM,
                BLOCK_K,
            )
    dq_head = dq_ptr + b * dq_stride_b + h * dq_stride_h
    store_tile(dq_head, dq * scale, rows, dq_stride_t, num_tokens, dims, HEAD_DIM)


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_flash_dq_kernel": compile_entries(
        "dq", ("q", "k", "v", "out", "dout", "dq"), ("lse", "delta"), ("first",)
    )
}


def query_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dQ [B, H, T, E], d [B, H, T] fp32); first [B, T] int32 as the forward takes it."""
    batch, heads, num_tokens, _ = q.shape
    dq, delta = empty_like_heads(q), torch.empty_like(lse)
    meta = constants("dq", q, window, softcap, first is not None)
    _flash_dq_kernel[(batch * heads, -(-num_tokens // meta["BLOCK_Q"]))](
        *(q, k, v, out, dout, dq, lse, delta, lse if first is None else first),
        *(stride for x in (q, k, v, out, dout, dq) for stride in x.stride()[:3]),
        *(num_tokens, heads, heads // k.shape[1], scale),
        **meta,
    )
    return dq, delta
