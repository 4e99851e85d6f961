"""Backward of `flash_attention.py`: dQ by tiles of queries, dK and dV by tiles of keys.

The formulas stand there. d = rowsum(dO * O) is formed by torch before, fp32 [B, H, T].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sloth.kernels.engine import jit, tl
from sloth.kernels.ops.flash_attention import (
    _scores,
    _store,
    _tile,
    compile_entries,
    constants,
    empty_like_heads,
)


@jit
def _weights_and_gradient(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    rows,
    cols,
    first,
    num_tokens,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """P and dS of a tile, fp32."""
    scores, slope = _scores(q, k, rows, cols, first, num_tokens, scale, WINDOW, SOFTCAP)
    weights = tl.exp(scores - lse[:, None])
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    return weights, weights * (dweights - delta[:, None]) * slope


@jit
def _flash_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    tile = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // num_heads, pair % num_heads
    rows = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
    dims = tl.arange(0, BLOCK_E)
    q = _tile(q_ptr + b * q_stride_b + h * q_stride_h, rows, q_stride_t, num_tokens, dims, HEAD_DIM)
    dout_head = dout_ptr + b * dout_stride_b + h * dout_stride_h
    dout = _tile(dout_head, rows, dout_stride_t, num_tokens, dims, HEAD_DIM)
    lse = tl.load(lse_ptr + pair * num_tokens + rows, mask=rows < num_tokens, other=0.0)
    delta = tl.load(delta_ptr + pair * num_tokens + rows, mask=rows < num_tokens, other=0.0)
    k_head = k_ptr + b * k_stride_b + (h // groups) * k_stride_h
    v_head = v_ptr + b * v_stride_b + (h // groups) * v_stride_h
    first = tl.zeros((BLOCK_Q,), tl.int32)
    start = tile * 0
    if HAS_DOCUMENTS:
        first = tl.load(first_ptr + b * num_tokens + rows, mask=rows < num_tokens, other=0)
        start = tl.load(first_ptr + b * num_tokens + tile * BLOCK_Q).to(tl.int64)
    if WINDOW is not None:
        start = tl.maximum(start, tile * BLOCK_Q - WINDOW + 1)
    start = (start // BLOCK_K) * BLOCK_K
    stop = tl.minimum((tile + 1) * BLOCK_Q, num_tokens)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for begin in range(start, stop, BLOCK_K):
        cols = (begin + tl.arange(0, BLOCK_K)).to(tl.int32)
        k = _tile(k_head, cols, k_stride_t, num_tokens, dims, HEAD_DIM)
        v = _tile(v_head, cols, v_stride_t, num_tokens, dims, HEAD_DIM)
        _, ds = _weights_and_gradient(
            q, k, v, dout, lse, delta, rows, cols, first, num_tokens, scale, WINDOW, SOFTCAP
        )
        acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq_head = dq_ptr + b * dq_stride_b + h * dq_stride_h
    _store(dq_head, acc * scale, rows, dq_stride_t, num_tokens, dims, HEAD_DIM)


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
    first_ptr,
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
):
    tile = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    num_kv_heads = num_heads // groups
    b, kv = pair // num_kv_heads, pair % num_kv_heads
    cols = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    dims = tl.arange(0, BLOCK_E)
    k_head = k_ptr + b * k_stride_b + kv * k_stride_h
    v_head = v_ptr + b * v_stride_b + kv * v_stride_h
    k = _tile(k_head, cols, k_stride_t, num_tokens, dims, HEAD_DIM)
    v = _tile(v_head, cols, v_stride_t, num_tokens, dims, HEAD_DIM)
    start = (tile * BLOCK_K // BLOCK_Q) * BLOCK_Q
    stop = tile * 0 + num_tokens
    if HAS_DOCUMENTS:
        end = tl.minimum((tile + 1) * BLOCK_K, num_tokens) - 1
        stop = tl.load(last_ptr + b * num_tokens + end).to(tl.int64) + 1
    if WINDOW is not None:
        stop = tl.minimum(stop, (tile + 1) * BLOCK_K + WINDOW - 1)
    dk = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for g in range(0, groups):
        h = kv * groups + g
        q_head = q_ptr + b * q_stride_b + h * q_stride_h
        dout_head = dout_ptr + b * dout_stride_b + h * dout_stride_h
        at_row = (b * num_heads + h) * num_tokens
        for begin in range(start, stop, BLOCK_Q):
            rows = (begin + tl.arange(0, BLOCK_Q)).to(tl.int32)
            q = _tile(q_head, rows, q_stride_t, num_tokens, dims, HEAD_DIM)
            dout = _tile(dout_head, rows, dout_stride_t, num_tokens, dims, HEAD_DIM)
            inside = rows < num_tokens
            lse = tl.load(lse_ptr + at_row + rows, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + at_row + rows, mask=inside, other=0.0)
            first = tl.zeros((BLOCK_Q,), tl.int32)
            if HAS_DOCUMENTS:
                first = tl.load(first_ptr + b * num_tokens + rows, mask=inside, other=0)
            weights, ds = _weights_and_gradient(
                q, k, v, dout, lse, delta, rows, cols, first, num_tokens, scale, WINDOW, SOFTCAP
            )
            dv += tl.dot(tl.trans(weights).to(dout.dtype), dout, input_precision="ieee")
            dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    dk_head = dk_ptr + b * dk_stride_b + kv * dk_stride_h
    dv_head = dv_ptr + b * dv_stride_b + kv * dv_stride_h
    _store(dk_head, dk * scale, cols, dk_stride_t, num_tokens, dims, HEAD_DIM)
    _store(dv_head, dv, cols, dv_stride_t, num_tokens, dims, HEAD_DIM)


def _signature(strided: str, bounds: str) -> dict[str, str]:
    names = strided.split()
    return {
        **{f"{name}_ptr": "*bf16" for name in names},
        **{"lse_ptr": "*fp32", "delta_ptr": "*fp32"},
        **{f"{name}_ptr": "*i32" for name in bounds.split()},
        **{f"{name}_stride_{dim}": "i32:16" for name in names for dim in "bht"},
        **{name: "i32" for name in ("num_tokens", "num_heads", "groups")},
        "scale": "fp32",
    }


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_flash_dq_kernel": compile_entries(_signature("q k v dout dq", "first")),
    "_flash_dkv_kernel": compile_entries(_signature("q k v dout dk dv", "first last")),
}


def flash_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v; out and lse as the forward gave them.

    last [B, T] int32: where each token's document ends.
    """
    batch, heads, num_tokens, _ = q.shape
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dq, dk, dv = empty_like_heads(q), empty_like_heads(k), empty_like_heads(v)
    if not q.numel():
        return dq, dk, dv
    meta = constants(q, window, softcap, first)
    bounds = (lse, lse) if first is None or last is None else (first, last)
    sizes = (num_tokens, heads, groups, scale)
    _flash_dq_kernel[(-(-num_tokens // meta["BLOCK_Q"]), batch * heads)](
        *(q, k, v, dout, dq, lse, delta, bounds[0]),
        *(stride for x in (q, k, v, dout, dq) for stride in x.stride()[:3]),
        *sizes,
        **meta,
    )
    _flash_dkv_kernel[(-(-num_tokens // meta["BLOCK_K"]), batch * kv_heads)](
        *(q, k, v, dout, dk, dv, lse, delta, *bounds),
        *(stride for x in (q, k, v, dout, dk, dv) for stride in x.stride()[:3]),
        *sizes,
        **meta,
    )
    return dq, dk, dv
