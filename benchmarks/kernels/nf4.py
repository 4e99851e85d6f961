"""NF4 codes with double quantization to bf16: one matrix at a time, and the seven of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cases import KernelCase, Outputs, compiled
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape, nf4_bytes
from sloth.kernels.ops.batch import NF4Batch, NF4Part
from sloth.kernels.ops.nf4 import NF4Weight, nf4_dequantize, nf4_dequantize_reference
from sloth.quant.nf4 import quantize_nf4

Run = Callable[[], Outputs]


def _bitsandbytes(denses: list[Tensor]) -> Run:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed = [
        quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
        for dense in denses
    ]
    return lambda: tuple(dequantize_4bit(codes, state) for codes, state in packed)


def _compiled(weights: list[NF4Weight]) -> Run:
    function = compiled(lambda *ws: tuple(nf4_dequantize_reference(w, torch.bfloat16) for w in ws))
    unpack = function()
    return lambda: unpack(*weights)


def _batch(weights: list[NF4Weight]) -> Run:
    outs = tuple(torch.empty(w.shape, dtype=torch.bfloat16, device=DEVICE) for w in weights)
    batch = NF4Batch([NF4Part(w, out) for w, out in zip(weights, outs, strict=True)])

    def run() -> Outputs:
        batch.run()
        return outs

    return run


def _case(name: str, sizes: list[tuple[int, int]]) -> KernelCase:
    denses = [torch.randn(size, device=DEVICE).mul_(0.02).to(torch.bfloat16) for size in sizes]
    weights = [quantize_nf4(dense) for dense in denses]

    def each(unpack: Callable[[NF4Weight, torch.dtype], Tensor], dtype: torch.dtype) -> Outputs:
        return tuple(unpack(w, dtype) for w in weights)

    return KernelCase(
        f"nf4 {name}",
        lambda: each(nf4_dequantize_reference, torch.float32),
        {
            "eager": lambda: lambda: each(nf4_dequantize_reference, torch.bfloat16),
            "torch.compile": lambda: _compiled(weights),
            "bitsandbytes": lambda: _bitsandbytes(denses),
            "sloth": lambda: lambda: each(nf4_dequantize, torch.bfloat16),
            "sloth, one launch": lambda: _batch(weights),
        },
        num_bytes=nf4_bytes(sum(out * inner for out, inner in sizes)),
    )


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """Every distinct matrix of a layer, gate and up as one, and all seven; tokens play no part."""
    sizes = list(shape.linears.values())
    stacked = (2 * shape.ffn, shape.hidden)
    for size in sorted({*sizes, stacked}):
        yield _case(f"{size[0]}x{size[1]}", [size])
    yield _case("all of a layer", sizes)
