"""Rotary embedding of q and k, which lie as [B, T, heads, E] in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import Function, KernelCase, compiled, differentiable, ready
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape
from sloth.kernels.ops.rope import rope, rope_reference

THETA = 5e5


def tables(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, E] in bf16, as a bf16 model hands them to its layers."""
    exponents = torch.arange(0, head_dim, 2, device=DEVICE) / head_dim
    angles = torch.arange(num_tokens, device=DEVICE)[:, None] * THETA**-exponents
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def _liger() -> Function:
    from liger_kernel.transformers.functional import liger_rope

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """q [1, T, H, E], k [1, T, K, E]: read once, written once, forward and backward alike."""
    q, dq = _random(num_tokens, shape.num_heads, shape.head_dim)
    k, dk = _random(num_tokens, shape.num_kv_heads, shape.head_dim)
    moved = {"num_bytes": float(2 * (q.numel() + k.numel()) * q.element_size())}
    yield from differentiable(
        f"rope {num_tokens}x{shape.num_heads}+{shape.num_kv_heads}x{shape.head_dim}",
        (q, k, *tables(num_tokens, shape.head_dim)),
        (True, True, False, False),
        (dq, dk),
        {
            "eager": ready(rope_reference),
            "torch.compile": compiled(rope_reference),
            "Liger": _liger,
            "sloth": ready(rope),
        },
        rope_reference,
        moved,
        moved,
    )


def _random(num_tokens: int, heads: int, head_dim: int) -> list[Tensor]:
    size = (1, num_tokens, heads, head_dim)
    return [torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
