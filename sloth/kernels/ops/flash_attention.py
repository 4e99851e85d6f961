"""Attention on a GPU with what the framework's kernels lack, at head dims up to 256: a softcap, and
in fp32 windows and documents without a mask of size T x T.

Shapes: q, O [B, H, T, E]; k, v [B, K, T, E]; any strides with unit inner stride; H a multiple of K.
Query i sees key j iff j <= i, i - j < window, and j is not before the first token of i's document.

    S = s Q K^T;   C = c tanh(S / c);   P = softmax(C);   O = P V;   L = log-sum-exp of each row
    dV = P^T dO;   dC = P * (dO V^T - d),  d = rowsum(dO * O);   dS = dC * (1 - (C / c)^2)
    dQ = s dS K;   dK = s dS^T Q

Forward: a program owns a tile of queries and walks the tiles of keys it sees, with a running
maximum and sum. Backward: one kernel owns a tile of keys and walks the queries that see it, of all
the heads that share the keys, so that dK and dV are summed in one program; another owns a tile of
queries. P is rebuilt from L, and nothing of size T x T exists. No atomics: two runs agree bitwise.
Key tiles before a query tile's first document or window are not visited, nor are query tiles behind
a key tile's last document or window.

Saved: L (fp32, natural logarithm). Products take the inputs' dtype and sum in fp32; scores, softmax
and d are fp32. Operations: 4 B H T^2 E / 2 forward, 2.5 times that backward, and 2.8 times as the
two kernels both rebuild P.
Source: Dao 2023 (FlashAttention-2), https://arxiv.org/abs/2307.08691; Gemma Team 2024 (softcap),
https://arxiv.org/abs/2408.00118, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import jit, tl
from sloth.kernels.rows import next_power_of_2

# Queries and keys of a tile, by head dim: what fits the 99 KiB of the smaller GPUs, where the
# backward holds four tiles.
_TILES = {64: (64, 64), 128: (64, 32), 256: (32, 32)}
_FP32_TILES = {64: (64, 64), 128: (32, 32), 256: (16, 16)}
_WARPS, _STAGES = 4, 1


@jit
def _scores(
    q,
    k,
    rows,
    cols,
    first,
    num_tokens,
    scale,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """C of a tile [rows, cols] in fp32, -inf where not seen, and its slope dC / dS."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if SOFTCAP is not None:
        bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / SOFTCAP))
        scores = SOFTCAP * bent
        slope = 1.0 - bent * bent
    seen = (cols[None, :] <= rows[:, None]) & (cols[None, :] >= first[:, None])
    seen = seen & (rows[:, None] < num_tokens)
    if WINDOW is not None:
        seen = seen & (rows[:, None] - cols[None, :] < WINDOW)
    return tl.where(seen, scores, -float("inf")), slope


@jit
def _tile(ptr, rows, stride, num_tokens, cols, HEAD_DIM: tl.constexpr):
    """[rows, head dim] of one head, zeros beyond its ends."""
    mask = (rows < num_tokens)[:, None] & (cols < HEAD_DIM)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@jit
def _store(ptr, x, rows, stride, num_tokens, cols, HEAD_DIM: tl.constexpr):
    mask = (rows < num_tokens)[:, None] & (cols < HEAD_DIM)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


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
    k_head = k_ptr + b * k_stride_b + (h // groups) * k_stride_h
    v_head = v_ptr + b * v_stride_b + (h // groups) * v_stride_h
    first = tl.zeros((BLOCK_Q,), tl.int32)
    start = tile * 0
    if HAS_DOCUMENTS:
        at = first_ptr + b * num_tokens + rows
        first = tl.load(at, mask=rows < num_tokens, other=0)
        start = tl.load(first_ptr + b * num_tokens + tile * BLOCK_Q).to(tl.int64)
    if WINDOW is not None:
        start = tl.maximum(start, tile * BLOCK_Q - WINDOW + 1)
    start = (start // BLOCK_K) * BLOCK_K
    stop = tl.minimum((tile + 1) * BLOCK_Q, num_tokens)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for begin in range(start, stop, BLOCK_K):
        cols = (begin + tl.arange(0, BLOCK_K)).to(tl.int32)
        k = _tile(k_head, cols, k_stride_t, num_tokens, dims, HEAD_DIM)
        v = _tile(v_head, cols, v_stride_t, num_tokens, dims, HEAD_DIM)
        scores, _ = _scores(q, k, rows, cols, first, num_tokens, scale, WINDOW, SOFTCAP)
        bigger = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet keeps exp(-inf - -inf) away from nan.
        anchor = tl.where(bigger == -float("inf"), 0.0, bigger)
        weights = tl.exp(scores - anchor[:, None])
        rescale = tl.exp(largest - anchor)
        total = total * rescale + tl.sum(weights, 1)
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        acc = acc * rescale[:, None] + part
        largest = bigger
    safe = tl.where(total == 0.0, 1.0, total)
    out_head = out_ptr + b * out_stride_b + h * out_stride_h
    _store(out_head, acc / safe[:, None], rows, out_stride_t, num_tokens, dims, HEAD_DIM)
    lse = tl.where(total == 0.0, 0.0, largest + tl.log(safe))
    tl.store(lse_ptr + pair * num_tokens + rows, lse, mask=rows < num_tokens)


_STRIDED = ("q", "k", "v", "out")


def _signature(names: tuple[str, ...], strided: tuple[str, ...]) -> dict[str, str]:
    return {
        **{f"{name}_ptr": "*bf16" for name in names},
        **{"lse_ptr": "*fp32", "first_ptr": "*i32"},
        **{f"{name}_stride_{dim}": "i32:16" for name in strided for dim in "bht"},
        **{name: "i32" for name in ("num_tokens", "num_heads", "groups")},
        "scale": "fp32",
    }


def compile_entries(signature: dict[str, str]) -> list[dict[str, Any]]:
    """The most demanding launches of a kernel, for a compile test; in fp32 on the least memory."""
    entries = []
    for head_dim in (128, 256):
        for dtype, which in ((torch.bfloat16, {}), (torch.float32, {"capabilities": (86,)})):
            block_q, block_k = _tile_sizes(head_dim, dtype)
            pointer = "*fp32" if dtype == torch.float32 else "*bf16"
            entries.append(
                {
                    "signature": {k: pointer if v == "*bf16" else v for k, v in signature.items()},
                    "constexprs": {
                        **{"WINDOW": 4096, "SOFTCAP": 50.0, "HAS_DOCUMENTS": True},
                        **{"HEAD_DIM": head_dim, "BLOCK_E": head_dim},
                        **{"BLOCK_Q": block_q, "BLOCK_K": block_k},
                    },
                    "options": OPTIONS,
                    **which,
                }
            )
    return entries


def _tile_sizes(block_e: int, dtype: torch.dtype) -> tuple[int, int]:
    return (_FP32_TILES if dtype == torch.float32 else _TILES)[block_e]


OPTIONS = {"num_warps": _WARPS, "num_stages": _STAGES}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_flash_fwd_kernel": compile_entries(_signature(_STRIDED, _STRIDED))
}


def constants(
    q: Tensor, window: int | None, softcap: float | None, first: Tensor | None
) -> dict[str, Any]:
    """Constexprs and options of a launch for queries q [B, H, T, E]."""
    head_dim = q.shape[-1]
    block_e = max(next_power_of_2(head_dim), 64)
    block_q, block_k = _tile_sizes(block_e, q.dtype)
    return {
        **{"WINDOW": window, "SOFTCAP": softcap, "HAS_DOCUMENTS": first is not None},
        **{"HEAD_DIM": head_dim, "BLOCK_E": block_e, "BLOCK_Q": block_q, "BLOCK_K": block_k},
        **OPTIONS,
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
    meta = constants(q, window, softcap, first)
    if q.numel():
        _flash_fwd_kernel[(-(-num_tokens // meta["BLOCK_Q"]), batch * heads)](
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
