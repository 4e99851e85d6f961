"""SwiGLU and GeGLU: act(gate) * up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cases import Function, KernelCase, compiled, differentiable, ready
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape
from sloth.kernels.ops.glu import Activation, glu, glu_reference

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


def _liger(activation: Activation) -> Function:
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    function = liger_swiglu if activation == "silu" else liger_geglu
    return lambda gate, up: (function(gate, up),)


def _eager(activation: Activation) -> Function:
    return lambda gate, up: (glu_reference(gate, up, activation),)


def _sloth(activation: Activation) -> Function:
    return lambda gate, up: (glu(gate, up, activation),)


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """gate, up [N, F]: two read, one written; backward reads three and writes two."""
    size = (num_tokens, shape.ffn)
    gate, up, dy = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    one = gate.numel() * gate.element_size()
    for activation in ACTIVATIONS:
        yield from differentiable(
            f"glu {activation} {num_tokens}x{shape.ffn}",
            (gate, up),
            (True, True),
            (dy,),
            {
                "eager": ready(_eager(activation)),
                "torch.compile": compiled(_eager(activation)),
                "Liger": partial(_liger, activation),
                "sloth": ready(_sloth(activation)),
            },
            _eager(activation),
            {"num_bytes": 3 * one},
            {"num_bytes": 5 * one},
        )
