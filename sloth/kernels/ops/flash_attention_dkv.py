"""dK and dV of `flash_attention.py` by tiles of keys; formulas in `flash_attention_bwd.py`.

Both in one program share P. At 256 elements a head their two sums take half of the registers: each
alone, rebuilding P twice, runs at 1.6 times the rate on a Hopper (`flash_tiles.py` says where).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sloth.kernels.engine import jit, tl
from sloth.kernels.flash_tiles import compile_entries, constants, key_parts
from sloth.kernels.ops.flash_attention import (
    _LOG2E,
    bent_scores,
    dscores,
    empty_like_heads,
    load_tile,
    store_tile,
)


@jit
def _query_ranges(
    last_ptr,
    start_col,
    num_tokens,
    WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(start, whole from, whole to, stop): the queries that see a tile of keys, as `key_ranges`.

    last_ptr: where the document of each of the row's tokens ends.
    """
    last_col = tl.minimum(start_col + BLOCK_K, num_tokens) - 1
    start = (start_col // BLOCK_Q) * BLOCK_Q
    stop = start * 0 + num_tokens
    whole_stop = stop
    if HAS_DOCUMENTS:
        stop = tl.load(last_ptr + last_col).to(tl.int64) + 1
        whole_stop = tl.load(last_ptr + start_col).to(tl.int64) + 1
    if WINDOW is not None:
        stop = tl.minimum(stop, last_col + WINDOW)
        whole_stop = tl.minimum(whole_stop, start_col + WINDOW)
    whole = tl.cdiv(start_col + BLOCK_K - 1, BLOCK_Q) * BLOCK_Q
    whole_stop = tl.maximum((whole_stop // BLOCK_Q) * BLOCK_Q, start)
    whole = tl.minimum(whole, whole_stop)
    return start, whole, whole_stop, stop


@jit
def _add_dkv(
    dk,
    dv,
    k,
    v,
    q_head,
    dout_head,
    q_stride,
    dout_stride,
    lse_row,
    delta_row,
    cols,
    dims,
    last,
    start,
    stop,
    num_tokens,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
):
    """Take the queries from `start` to `stop` of one head into dK / s and dV."""
    for begin in range(start, stop, BLOCK_Q):
        rows = (begin + tl.arange(0, BLOCK_Q)).to(tl.int32)
        q = load_tile(q_head, rows, q_stride, num_tokens, dims, HEAD_DIM, MASKED)
        dout = load_tile(dout_head, rows, dout_stride, num_tokens, dims, HEAD_DIM, MASKED)
        if MASKED:
            lse = tl.load(lse_row + rows, mask=rows < num_tokens, other=0.0)
            delta = tl.load(delta_row + rows, mask=rows < num_tokens, other=0.0)
        else:
            lse = tl.load(lse_row + rows)
            delta = tl.load(delta_row + rows)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        scores, bent = bent_scores(products, scale, SOFTCAP)
        weights = tl.exp2(scores - (lse * _LOG2E)[None, :])
        if MASKED:
            seen = (cols[:, None] <= rows[None, :]) & (last[:, None] >= rows[None, :])
            if WINDOW is not None:
                seen = seen & (rows[None, :] - cols[:, None] < WINDOW)
            weights = tl.where(seen, weights, 0.0)
        if NEED_DV:
            dv += tl.dot(weights.to(dout.dtype), dout, input_precision="ieee")
        if NEED_DK:
            dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = dscores(weights, dweights, delta[None, :], bent)
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    return dk, dv


@jit
def _flash_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    last_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
    dk_stride_b,
    dk_stride_h,
    dk_stride_t,
    dv_stride_b,
    dv_stride_h,
    dv_stride_t,
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
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
):
    tile = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64)
    num_kv_heads = num_heads // groups
    b, kv = pair // num_kv_heads, pair % num_kv_heads
    cols = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    dims = tl.arange(0, BLOCK_E)
    k_head = k_ptr + b * k_stride_b + kv * k_stride_h
    v_head = v_ptr + b * v_stride_b + kv * v_stride_h
    k = load_tile(k_head, cols, k_stride_t, num_tokens, dims, HEAD_DIM, True)
    v = load_tile(v_head, cols, v_stride_t, num_tokens, dims, HEAD_DIM, True)
    last = tl.zeros((BLOCK_K,), tl.int32) + num_tokens - 1
    if HAS_DOCUMENTS:
        last = tl.load(last_ptr + b * num_tokens + cols, mask=cols < num_tokens, other=0)
    edges = _query_ranges(
        last_ptr + b * num_tokens,
        tile * BLOCK_K,
        num_tokens,
        WINDOW,
        HAS_DOCUMENTS,
        BLOCK_Q,
        BLOCK_K,
    )
    dk = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for g in range(0, groups):
        h = kv * groups + g
        q_head = q_ptr + b * q_stride_b + h * q_stride_h
        dout_head = dout_ptr + b * dout_stride_b + h * dout_stride_h
        lse_row = lse_ptr + (b * num_heads + h) * num_tokens
        delta_row = delta_ptr + (b * num_heads + h) * num_tokens
        for stretch in tl.static_range(3):
            dk, dv = _add_dkv(
                dk,
                dv,
                k,
                v,
                q_head,
                dout_head,
                q_stride_t,
                dout_stride_t,
                lse_row,
                delta_row,
                cols,
                dims,
                last,
                edges[stretch],
                edges[stretch + 1],
                num_tokens,
                scale,
                stretch != 1,
                WINDOW,
                SOFTCAP,
                HEAD_DIM,
                BLOCK_Q,
                NEED_DK,
                NEED_DV,
            )
    dk_head = dk_ptr + b * dk_stride_b + kv * dk_stride_h
    dv_head = dv_ptr + b * dv_stride_b + kv * dv_stride_h
    if NEED_DK:
        store_tile(dk_head, dk * scale, cols, dk_stride_t, num_tokens, dims, HEAD_DIM)
    if NEED_DV:
        store_tile(dv_head, dv, cols, dv_stride_t, num_tokens, dims, HEAD_DIM)


_STRIDED = ("q", "k", "v", "dout", "dk", "dv")
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_flash_dkv_kernel": [
        entry
        for part in ("dkv", "dk", "dv")
        for entry in compile_entries(part, _STRIDED, ("lse", "delta"), ("last",))
    ]
}


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dK, dV), both [B, K, T, E]; delta: d; last [B, T] int32: where a token's document ends."""
    (batch, heads, num_tokens, _), kv_heads = q.shape, k.shape[1]
    dk, dv = empty_like_heads(k), empty_like_heads(v)
    for part in key_parts(q):
        meta = constants(part, q, window, softcap, last is not None)
        _flash_dkv_kernel[(batch * kv_heads, -(-num_tokens // meta["BLOCK_K"]))](
            *(q, k, v, dout, dk, dv, lse, delta, lse if last is None else last),
            *(stride for x in (q, k, v, dout, dk, dv) for stride in x.stride()[:3]),
            *(num_tokens, heads, heads // kv_heads, scale),
            **meta,
        )
    return dk, dv
