"""A stack's products as a fused layer forms them, LoRA folded in: forward, the input's gradient and
LoRA's own gradients, r = 16, beside the plain frozen pair.

Stacks: q|k|v, o, gate|up, down, on dense matrices, so that nothing is unpacked. The limit is the
frozen pair alone, forward and the input's gradient: 4 T N K operations; LoRA's own are not counted.
What a layer takes beyond it is the sum of four rows over the sum of their limits. In a layer some
of the thin products come along in other kernels and cost less than here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import KernelCase, Outputs
from benchmarks.common import DEVICE
from benchmarks.roofline import ModelShape
from sloth.kernels.layer import Workspace, prepare_stack
from sloth.kernels.ops.batch import CopyBatch
from sloth.kernels.stack_shape import GROUPS
from sloth.linear import Linear

RANK, SCALE = 16, 1.0
DTYPE = torch.bfloat16


def _member(outer: int, inner: int) -> Linear:
    """A frozen projection with LoRA, B awake."""
    with torch.device(DEVICE):
        member = Linear(inner, outer).to(DTYPE)
    member.requires_grad_(False)
    torch.nn.init.normal_(member.weight, std=inner**-0.5)
    member.attach_lora(RANK, SCALE, 0.0, DEVICE)
    torch.nn.init.normal_(member.lora_A.weight, std=inner**-0.5)
    torch.nn.init.normal_(member.lora_B.weight, std=RANK**-0.5)
    return member


def _case(name: str, num_tokens: int, sizes: list[tuple[int, int]]) -> KernelCase:
    members = [_member(*size) for size in sizes]
    inner, outer = sizes[0][1], sum(size[0] for size in sizes)
    x = torch.randn(num_tokens, inner, device=DEVICE, dtype=DTYPE)
    dy = torch.randn(num_tokens, outer, device=DEVICE, dtype=DTYPE)

    def own() -> Outputs:
        stack = prepare_stack(name, members, DTYPE, Workspace(), own=False)
        CopyBatch(stack.copies()).run()
        wide_x, wide_dy = stack.new_input(num_tokens), stack.new_output_gradient(num_tokens)
        wide_x[:, :inner], wide_dy[:, :outer] = x, dy
        wanted = [(True, True, False)] * len(members)

        def run() -> Outputs:
            y, low = stack.forward(wide_x)
            stack.spread(wide_dy)
            dx = stack.input_gradient(wide_dy)
            factors = stack.factor_gradients(wide_dy, wide_x, low, None, wanted)
            pairs = [pair for *pair, _ in factors]  # of A and B
            return y, dx, *(factor for pair in pairs for factor in pair if factor is not None)

        return run

    def truth() -> Outputs:
        leaf = x.float().requires_grad_()
        factors = [factor for m in members for factor in m.lora_factors]
        pairs = zip(members, factors[::2], factors[1::2], strict=True)
        y = torch.cat([leaf @ (m.weight.float() + SCALE * B @ A).T for m, A, B in pairs], -1)
        return y.detach(), *torch.autograd.grad(y, [leaf, *factors], dy.float())

    flops = 4.0 * num_tokens * outer * inner
    return KernelCase(f"folded {name} {num_tokens}", truth, {"sloth": own}, num_flops=flops)


def _limit(name: str, num_tokens: int, outer: int, inner: int) -> KernelCase:
    """The frozen pair on the whole stack."""
    x = torch.randn(num_tokens, inner, device=DEVICE, dtype=DTYPE)
    dy = torch.randn(num_tokens, outer, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(outer, inner, device=DEVICE).mul_(inner**-0.5).to(DTYPE)

    def pair() -> tuple[Tensor, Tensor]:
        return x @ weight.T, dy @ weight

    def truth() -> Outputs:
        return x.float() @ weight.float().T, dy.float() @ weight.float()

    flops = 4.0 * num_tokens * outer * inner
    contenders = {"cuBLAS (the limit)": lambda: pair}
    return KernelCase(f"frozen pair {name} {num_tokens}", truth, contenders, num_flops=flops)


def cases(shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """The four stacks of a layer, each after its limit."""
    for name, paths in GROUPS.items():
        sizes = [shape.linears[path.rpartition(".")[2]] for path in paths]
        yield _limit(name, num_tokens, sum(size[0] for size in sizes), sizes[0][1])
        yield _case(name, num_tokens, sizes)
