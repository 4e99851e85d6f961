"""A frozen output head and its cross-entropy, forward and backward as one.

Operations are those of the trained rows alone: 2 D V forward and 2 D V for the hidden states'
gradient. Three cases: all rows trained, half of them, a fifth.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Function, KernelCase, Outputs, compiled, ready, whole_step
from benchmarks.common import DEVICE
from benchmarks.data import IGNORED
from benchmarks.roofline import ModelShape
from sloth.kernels.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

TRAINED_SHARES = (1.0, 0.5, 0.2)
# Rows whose fp32 logits the truth holds at a time: 0.5 GiB at V = 128256.
_TRUTH_ROWS = 1024


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    return (linear_cross_entropy_reference(hidden, weight, labels),)


def _sloth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    return (linear_cross_entropy(hidden, weight, labels),)


def _liger() -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: (
        liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED),
    )


def _truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    """Loss and gradient of the hidden states in fp32, a few rows at a time."""
    wide_weight = weight.float()
    num_trained = (labels != IGNORED).sum()
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for start in range(0, len(hidden), _TRUTH_ROWS):
        rows = slice(start, start + _TRUTH_ROWS)
        part = hidden[rows].float().requires_grad_()
        logits = part @ wide_weight.T
        loss = F.cross_entropy(logits, labels[rows], ignore_index=IGNORED, reduction="sum")
        loss = loss / num_trained
        gradients += torch.autograd.grad(loss, part)
        losses.append(loss.detach())
    return torch.stack(losses).sum(), torch.cat(gradients)


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """hidden [N, D], weight [V, D], labels [N]."""
    hidden = torch.randn(num_tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
    weight *= shape.hidden**-0.5
    every_label = torch.randint(shape.vocabulary, (num_tokens,), device=DEVICE)
    order = torch.rand(num_tokens, device=DEVICE)
    for share in TRAINED_SHARES:
        labels = every_label.masked_fill(order > share, IGNORED)
        num_trained = int((labels != IGNORED).sum())
        yield KernelCase(
            f"linear_cross_entropy {num_tokens}x{shape.hidden}x{shape.vocabulary}, "
            f"{share:.0%} trained",
            partial(_truth, hidden, weight, labels),
            whole_step(
                (hidden, weight, labels),
                (True, False, False),
                torch.ones((), device=DEVICE),
                {
                    "eager": ready(_eager),
                    "torch.compile": compiled(_eager),
                    "Liger": _liger,
                    "sloth": ready(_sloth),
                },
            ),
            num_flops=4 * num_trained * shape.head_weights,
        )
