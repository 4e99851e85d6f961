"""RMSNorm, alone and with the residual's addition; the weight is frozen, as under LoRA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import Function, KernelCase, compiled, differentiable, ready
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape
from sloth.kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_reference
from sloth.kernels.ops.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5


def _norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm_reference(x, weight, EPS),)


def _add_norm(delta: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_rms_norm_reference(delta, residual, weight, EPS)


def _liger_norm() -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight: (liger_rms_norm(x, weight, EPS),)


def _liger_add_norm() -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda delta, residual, weight: liger_fused_add_rms_norm(delta, residual, weight, EPS)


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """x [N, D]: reads x, writes y; backward reads dy and x, writes dx. The sum is written too."""
    size = (num_tokens, shape.hidden)
    x, residual, dy, dsum = (
        torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)
    )
    weight = torch.randn(shape.hidden, device=DEVICE).mul_(0.1).add_(1).to(torch.bfloat16)
    one = x.numel() * x.element_size()
    yield from differentiable(
        f"rms_norm {num_tokens}x{shape.hidden}",
        (x, weight),
        (True, False),
        (dy,),
        {
            "eager": ready(_norm),
            "torch.compile": compiled(_norm),
            "Liger": _liger_norm,
            "sloth": ready(lambda x, weight: (rms_norm(x, weight, EPS),)),
        },
        _norm,
        {"num_bytes": 2 * one},
        {"num_bytes": 3 * one},
    )
    yield from differentiable(
        f"add_rms_norm {num_tokens}x{shape.hidden}",
        (x, residual, weight),
        (True, True, False),
        (dy, dsum),
        {
            "eager": ready(_add_norm),
            "torch.compile": compiled(_add_norm),
            "Liger": _liger_add_norm,
            "sloth": ready(lambda d, residual, weight: add_rms_norm(d, residual, weight, EPS)),
        },
        _add_norm,
        {"num_bytes": 4 * one},
        # One gradient serves both inputs; a contender that writes it twice spends more.
        {"num_bytes": 4 * one},
    )
