"""Frozen products in 8-bit floats at the sizes of a layer's stacks, and the casts before them.

A product reads numbers that are cast already, and is checked against the same numbers in fp32: what
the casts lose is no error here. bf16 is the product that it replaces. The bytes of a cast are one
read of 16 bits and one write of 8 an element.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import KernelCase, Outputs, compiled, ready
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape
from sloth.kernels.ops.fp8_cast import FP8, LARGEST, fp8_cast
from sloth.kernels.ops.fp8_product import fp8_product


def _eager_cast(x: Tensor) -> Outputs:
    wide = x.float()
    largest = wide.abs().amax(1)
    gains = torch.full_like(largest, LARGEST) / largest  # one rounding, where LARGEST / x has two
    return (wide * gains[:, None]).to(FP8), largest / LARGEST


def _cast(num_tokens: int, width: int) -> KernelCase:
    x = torch.randn(num_tokens, width, device=DEVICE).to(torch.bfloat16)
    providers = {
        "eager": ready(_eager_cast),
        "torch.compile": compiled(_eager_cast),
        "sloth": ready(fp8_cast),
    }

    def bound(provider):
        def build():
            function = provider()
            return lambda: function(x)

        return build

    return KernelCase(
        f"cast {num_tokens}x{width}",
        lambda: _eager_cast(x),
        {who: bound(provider) for who, provider in providers.items()},
        num_bytes=3.0 * num_tokens * width,
    )


def _product(num_tokens: int, name: str, outputs: int, inputs: int) -> KernelCase:
    (x8, x_scales), (w8, w_scales) = (
        fp8_cast(torch.randn(rows, inputs, device=DEVICE).to(torch.bfloat16))
        for rows in (num_tokens, outputs)
    )
    x, w = x_scales[:, None] * x8.float(), w_scales[:, None] * w8.float()
    x_half, w_half = x.to(torch.bfloat16), w.to(torch.bfloat16)
    operands = (x8, x_scales, w8, w_scales, torch.bfloat16, None)
    return KernelCase(
        f"{name} {num_tokens}x{outputs}x{inputs}",
        lambda: (x @ w.T,),
        {
            "bf16": lambda: lambda: (x_half @ w_half.T,),
            "fp8, fast sums": lambda: lambda: (fp8_product(*operands, True),),
            "fp8, wide sums": lambda: lambda: (fp8_product(*operands, False),),
        },
        num_flops=2.0 * num_tokens * outputs * inputs,
    )


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """Casts of X and dY of every width, then the products of the four stacks, both ways."""
    sizes = shape.linears
    stacks = {
        "qkv": (sum(sizes[f"{p}_proj"][0] for p in "qkv"), shape.hidden),
        "o": sizes["o_proj"],
        "gate_up": (2 * shape.ffn, shape.hidden),
        "down": sizes["down_proj"],
    }
    for width in sorted({width for size in stacks.values() for width in size}):
        yield _cast(num_tokens, width)
    for name, (outputs, inputs) in stacks.items():
        yield _product(num_tokens, name, outputs, inputs)
        yield _product(num_tokens, f"{name} backward", inputs, outputs)
