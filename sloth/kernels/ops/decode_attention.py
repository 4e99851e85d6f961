"""One new query a row against a cache of fixed size, as a step of decoding needs it.

Shapes: q, O [B, H, 1, E]; k, v [B, K, S, E], S slots of which a part is written; any strides with
unit inner stride; H a multiple of K. Row b sees the keys j with first[b] <= j <= last and
last - j < window, where `last` is the slot of the row's own key. first and last live on the device,
so every step is the same launches and may be replayed as a graph.

    O = softmax(s q K^T) V over the keys that are seen;   with a softcap c the scores are
    c tanh(s q K^T / c)

A row alone would keep one multiprocessor per kv head busy, so the slots are split: a program takes
all query heads of one kv head and one span of slots, and leaves a maximum, a sum and a weighted
sum of values; a second kernel joins them. Spans beyond `last` leave at once. Bytes: the written
keys and values, once. Scores and sums are fp32. No backward: nothing is trained while decoding.
Source: Dao et al. 2023 (Flash-Decoding), https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import jit, tl
from sloth.kernels.ops.attention_layout import Spans
from sloth.kernels.rows import next_power_of_2

_SPAN, _TILE = 256, 64
_MIN_HEADS = 16  # rows of the smallest product


@jit
def _decode_span_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    first_ptr,
    last_ptr,
    partial_ptr,
    stats_ptr,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    num_kv_heads,
    num_spans,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    b, head = pair // num_kv_heads, pair % num_kv_heads
    last = tl.load(last_ptr).to(tl.int32)
    first = tl.load(first_ptr + b)
    if WINDOW is not None:
        first = tl.maximum(first, last - WINDOW + 1)
    members = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_E)
    inside = dims < HEAD_DIM
    used = members < GROUP
    heads = head * GROUP + members
    largest = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    begin = tl.maximum(span * SPAN, first // TILE * TILE).to(tl.int32)
    end = tl.minimum((span + 1) * SPAN, last + 1).to(tl.int32)
    if begin < end:
        at = q_ptr + b * q_stride_b + heads[:, None] * q_stride_h + dims[None, :]
        q = tl.load(at, mask=used[:, None] & inside[None, :], other=0.0)
        for start in range(begin, end, TILE):
            slots = start + tl.arange(0, TILE)
            wide = slots.to(tl.int64)[:, None]
            seen = (slots >= first) & (slots <= last)
            both = seen[:, None] & inside[None, :]
            place = b * k_stride_b + head * k_stride_h
            k = tl.load(k_ptr + place + wide * k_stride_s + dims[None, :], mask=both, other=0.0)
            place = b * v_stride_b + head * v_stride_h
            v = tl.load(v_ptr + place + wide * v_stride_s + dims[None, :], mask=both, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP is not None:
                scores = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / SOFTCAP)))
            scores = tl.where(seen[None, :], scores, -float("inf"))
            bigger = tl.maximum(largest, tl.max(scores, 1))
            # A tile that no slot of is seen keeps exp(-inf - -inf) away from nan.
            anchor = tl.where(bigger == -float("inf"), 0.0, bigger)
            weights = tl.exp(scores - anchor[:, None])
            rescale = tl.exp(largest - anchor)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            largest = bigger
    row = (pair * num_spans + span) * GROUP + members
    tl.store(stats_ptr + 2 * row, largest, mask=used)
    tl.store(stats_ptr + 2 * row + 1, total, mask=used)
    at = partial_ptr + row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(at, acc, mask=used[:, None] & inside[None, :])


@jit
def _decode_join_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    out_stride_b,
    out_stride_h,
    num_kv_heads,
    num_spans,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
):
    pair, member = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, head = pair // num_kv_heads, pair % num_kv_heads
    spans = tl.arange(0, BLOCK_SPANS)
    dims = tl.arange(0, BLOCK_E)
    exists = spans < num_spans
    row = (pair * num_spans + spans) * GROUP + member
    largest = tl.load(stats_ptr + 2 * row, mask=exists, other=-float("inf"))
    total = tl.load(stats_ptr + 2 * row + 1, mask=exists, other=0.0)
    weight = tl.exp(largest - tl.max(largest, 0))
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    at = out_ptr + b * out_stride_b + (head * GROUP + member) * out_stride_h + dims
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


_OPTIONS = {"num_warps": 4, "num_stages": 2}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_decode_span_kernel": [
        {
            "signature": {
                **{name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr")},
                **{"first_ptr": "*i32", "last_ptr": "*i64"},
                **{"partial_ptr": "*fp32", "stats_ptr": "*fp32"},
                **{f"q_stride_{dim}": "i32:16" for dim in "bh"},
                **{f"{name}_stride_{dim}": "i32:16" for name in "kv" for dim in "bhs"},
                **{"num_kv_heads": "i32", "num_spans": "i32", "scale": "fp32"},
            },
            "constexprs": {
                **{"WINDOW": 4096, "SOFTCAP": 50.0, "GROUP": 4, "HEAD_DIM": head_dim},
                **{"BLOCK_G": _MIN_HEADS, "BLOCK_E": head_dim, "SPAN": _SPAN, "TILE": _TILE},
            },
            "options": _OPTIONS,
        }
        for head_dim in (128, 256)
    ],
    "_decode_join_kernel": [
        {
            "signature": {
                **{"partial_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": "*bf16"},
                **{"out_stride_b": "i32:16", "out_stride_h": "i32:16"},
                **{"num_kv_heads": "i32", "num_spans": "i32"},
            },
            "constexprs": {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_E": 128, "BLOCK_SPANS": 32},
            "options": {"num_warps": 4},
        }
    ],
}


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    spans: Spans,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """O [B, H, 1, E] of one query a row, by the Triton engine. No gradient.

    q [B, H, 1, E], k and v [B, K, S, E] in fp16, bf16 or fp32.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group, num_spans = heads // kv_heads, -(-slots // _SPAN)
    out = torch.empty_like(q)
    kept = (batch * kv_heads * num_spans * group,)
    partial = torch.empty(*kept, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(*kept, 2, dtype=torch.float32, device=q.device)
    sizes = {"GROUP": group, "HEAD_DIM": head_dim}
    sizes["BLOCK_E"] = max(next_power_of_2(head_dim), 16)
    _decode_span_kernel[(num_spans, batch * kv_heads)](
        *(q, k, v, spans.first, spans.last, partial, stats),
        *(q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3]),
        *(kv_heads, num_spans, scale),
        WINDOW=window,
        SOFTCAP=softcap,
        BLOCK_G=max(next_power_of_2(group), _MIN_HEADS),
        SPAN=_SPAN,
        TILE=_TILE,
        **sizes,
        **_OPTIONS,
    )
    _decode_join_kernel[(batch * kv_heads, group)](
        *(partial, stats, out, out.stride(0), out.stride(1), kv_heads, num_spans),
        BLOCK_SPANS=next_power_of_2(num_spans),
        **sizes,
    )
    return out
