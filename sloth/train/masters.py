"""fp32 masters of 16-bit parameters: what the optimizer sees and a checkpoint keeps.

    backward:  master.grad += fp32(parameter.grad), at once per parameter, which then lets go of it
    step:      the optimizer moves the master;  parameter <- round(master)

A bf16 number of size 1 has steps of 2^-8, and an update of lr 1e-4 is rounded away: training in
bf16 alone stands still. The master keeps what rounding loses (Micikevicius et al. 2018, section
3.1, https://arxiv.org/abs/1710.03740), and micro-batches add up in fp32 as well, so a step's
gradient does not depend on how its rows are split. Costs 4 bytes for the master and 4 for its
gradient in place of 2. Parameters of 32 or 64 bits, LoRA's among them, are their own masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Masters:
    """`by_name`: what to optimize, clip and save, under the parameters' names."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.by_name = {name: _master(p) for name, p in self.parameters.items()}
        self._pairs = [
            (parameter, self.by_name[name])
            for name, parameter in self.parameters.items()
            if parameter is not self.by_name[name]
        ]

    @property
    def count(self) -> int:
        """How many numbers have a master of their own."""
        return sum(master.numel() for _, master in self._pairs)

    @contextmanager
    def collecting_gradients(self) -> Iterator[None]:
        """Inside, gradients of 16-bit parameters arrive at their masters in fp32."""
        handles = []
        for parameter, master in self._pairs:

            def collect(parameter: Tensor, master: nn.Parameter = master) -> None:
                assert parameter.grad is not None
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

            handles.append(parameter.register_post_accumulate_grad_hook(collect))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters that the network computes with."""
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def drop_gradients(self) -> None:
        """Forget what backward left, on both sides."""
        for tensor in (*self.parameters.values(), *self.by_name.values()):
            tensor.grad = None


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in SIXTEEN_BITS:
        return parameter
    return nn.Parameter(parameter.detach().float())
