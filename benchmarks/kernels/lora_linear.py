"""A frozen NF4 projection with LoRA, forward and backward as one, r = 16.

The limit is the frozen product alone, on a weight that is already dense: 2 N I O forward and as
much for the input's gradient. What a contender takes beyond it pays for unpacking, LoRA's side
products, and the passes over memory that these cause. LoRA's own operations are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Function, KernelCase, Outputs, Provider, compiled, ready, whole_step
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape
from sloth.kernels.ops.lora_linear import LoraOperands, lora_linear
from sloth.kernels.ops.nf4 import nf4_dequantize, nf4_dequantize_reference
from sloth.quant.nf4 import quantize_nf4

RANK, SCALE = 16, 1.0


def _peft_order(x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Outputs:
    """PEFT's sum under autocast: LoRA's products in bf16, added to the base's output."""
    low = F.linear(x, A.to(x.dtype))
    return (y + F.linear(low, B.to(x.dtype)) * SCALE,)


def _bitsandbytes(dense: Tensor) -> Function:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    return lambda x, A, B: _peft_order(x, A, B, matmul_4bit(x, codes.t(), state))


def _case(name: str, num_tokens: int, outer: int, inner: int) -> KernelCase:
    dense = torch.randn(outer, inner, device=DEVICE).mul_(inner**-0.5).to(torch.bfloat16)
    weight = quantize_nf4(dense)
    x = torch.randn(num_tokens, inner, device=DEVICE, dtype=torch.bfloat16)
    dy = torch.randn(num_tokens, outer, device=DEVICE, dtype=torch.bfloat16)
    A = torch.randn(RANK, inner, device=DEVICE) * inner**-0.5
    B = torch.randn(outer, RANK, device=DEVICE) * RANK**-0.5

    def eager(x: Tensor, A: Tensor, B: Tensor) -> Outputs:
        base = F.linear(x, nf4_dequantize_reference(weight, x.dtype))
        return _peft_order(x, A, B, base)

    def own(x: Tensor, A: Tensor, B: Tensor) -> Outputs:
        return (lora_linear(x, weight, None, LoraOperands(A, B, SCALE)),)

    def truth() -> Outputs:
        leaves = [tensor.float().requires_grad_() for tensor in (x, A, B)]
        (y,) = eager(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.float())

    functions: dict[str, Provider] = {
        "eager": ready(eager),
        "torch.compile": compiled(eager),
        "bitsandbytes + PEFT's order": lambda: _bitsandbytes(dense),
        "sloth": ready(own),
    }
    contenders = whole_step((x, A, B), (True, True, True), dy, functions)
    flops = 4.0 * num_tokens * outer * inner
    return KernelCase(f"lora_linear {name} {num_tokens}", truth, contenders, num_flops=flops)


def _limit(name: str, num_tokens: int, outer: int, inner: int) -> KernelCase:
    """The frozen product, forward and the input's gradient, on a dense weight."""
    size = (num_tokens, inner)
    x = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    dy = torch.randn(num_tokens, outer, device=DEVICE, dtype=torch.bfloat16)
    dense = torch.randn(outer, inner, device=DEVICE).mul_(inner**-0.5)
    weight = nf4_dequantize(quantize_nf4(dense.to(torch.bfloat16)), torch.bfloat16)
    wide = weight.float()
    return KernelCase(
        f"frozen product {name} {num_tokens}",
        lambda: (x.float() @ wide.T, dy.float() @ wide),
        {"cuBLAS (the limit)": lambda: lambda: (x @ weight.T, dy @ weight)},
        num_flops=4.0 * num_tokens * outer * inner,
    )


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """q, k, o, gate and down of a layer (v is k's size, up is gate's)."""
    for projection, (outer, inner) in shape.linears.items():
        if projection in ("v_proj", "up_proj"):
            continue
        name = f"{projection} {outer}x{inner}"
        yield _limit(name, num_tokens, outer, inner)
        yield _case(name, num_tokens, outer, inner)
