"""Causal attention with grouped heads: one long document, rows of 2048, and packed short ones; of
models that have them, with a window and a softcap.

Operations count the keys that are seen, so that a masked kernel gets no credit for what it skips:
4 H E a query and visible key forward, 2.5 times that backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Function, KernelCase, Outputs, Provider, differentiable, ready
from benchmarks.common import DEVICE
from benchmarks.data import packed_batch
from benchmarks.roofline import ModelShape, visible_keys
from sloth.kernels.ops.attention import attention
from sloth.kernels.ops.attention_layout import AttentionLayout, document_bounds

ROW_TOKENS = 2048


def _sdpa(backend: SDPBackend | None, mask: Tensor | None) -> Function:
    """torch's attention, by its own choice of kernel or by one of them alone."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        if mask is None:
            return (scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)
        # With a mask no fused kernel of torch takes fewer kv heads; transformers repeats them too.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return (scaled_dot_product_attention(q, k, v, mask),)

    def run_on_one(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        assert backend is not None
        with sdpa_kernel(backend):
            return run(q, k, v)

    return run if backend is None else run_on_one


def _flex(documents: Tensor, window: int, softcap: float | None) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window) & (documents[b, i] == documents[b, j])

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    batch, length = documents.shape
    mask = create_block_mask(seen, batch, None, length, length, device=str(DEVICE))
    cap = {} if softcap is None else {"score_mod": capped}
    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: (flex(q, k, v, block_mask=mask, enable_gqa=True, **cap),)


def _truth(documents: Tensor, window: int, softcap: float | None) -> Function:
    """fp32 by the formula, a head at a time; its scores are made again in the backward."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        order = torch.arange(q.shape[1], device=q.device)
        distance = order[:, None] - order
        seen = (distance >= 0) & (distance < window)
        seen = seen & (documents[:, :, None] == documents[:, None, :])
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        groups = q.shape[1] // k.shape[1]
        heads = [
            checkpoint(attend, q[:, h], k[:, h // groups], v[:, h // groups], use_reentrant=False)
            for h in range(q.shape[1])
        ]
        return (torch.stack(heads, 1),)

    return run


def _case(
    shape: ModelShape, name: str, positions: Tensor, lengths: list[int], window: int | None
) -> Iterator[KernelCase]:
    """positions [B, T] restart at 0 with every document; lengths are those of the documents."""
    batch, length = positions.shape
    documents = (positions == 0).cumsum(-1)
    layout = AttentionLayout.of(document_bounds(positions, DEVICE), window)
    mask = layout.dense_mask(length, length, DEVICE)
    widest, softcap = window or length, shape.softcap
    query = (batch, length, shape.num_heads, shape.head_dim)
    key = (batch, length, shape.num_kv_heads, shape.head_dim)
    q, k, v, dout = (
        torch.randn(size, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for size in (query, key, key, query)
    )
    scale = shape.head_dim**-0.5
    contenders: dict[str, Provider] = {}
    if softcap is None:
        contenders["sdpa"] = ready(_sdpa(None, mask))
        if mask is None:
            contenders["cuDNN sdpa"] = ready(_sdpa(SDPBackend.CUDNN_ATTENTION, None))
            contenders["flash sdpa"] = ready(_sdpa(SDPBackend.FLASH_ATTENTION, None))
    contenders["FlexAttention"] = partial(_flex, documents, widest, softcap)
    contenders["sloth"] = ready(lambda q, k, v: (attention(q, k, v, scale, layout, softcap),))
    flops = sum(4 * shape.q_dim * visible_keys(n, window) * n for n in lengths)
    heads = f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}"
    name += f" window {window}" if window else ""
    name += f" cap {softcap:g}" if softcap else ""
    yield from differentiable(
        f"attention {name} {heads}",
        (q, k, v),
        (True, True, True),
        (dout,),
        contenders,
        _truth(documents, widest, softcap),
        {"num_flops": flops},
        {"num_flops": 2.5 * flops},
    )


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """Rows of 2048 tokens, then one row of them all, plain, windowed and packed."""
    rows = num_tokens // ROW_TOKENS
    if rows > 1:
        plain = torch.arange(ROW_TOKENS, device=DEVICE).expand(rows, -1)
        lengths = [ROW_TOKENS] * rows
        yield from _case(shape, f"{rows}x{ROW_TOKENS}", plain, lengths, None)
    one = torch.arange(num_tokens, device=DEVICE)[None]
    yield from _case(shape, f"1x{num_tokens}", one, [num_tokens], None)
    for window in sorted({w for w in shape.windows if w is not None and w < num_tokens}):
        yield from _case(shape, f"1x{num_tokens}", one, [num_tokens], window)
    pack = packed_batch(shape.vocabulary, 1, num_tokens, seed=0)
    assert pack.positions is not None
    positions = pack.positions.to(DEVICE)
    yield from _case(shape, f"1x{num_tokens} packed", positions, pack.lengths, None)
