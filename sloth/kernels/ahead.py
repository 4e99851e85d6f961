"""Kernels of a layer compiled side by side before its first step, rather than one by one in it.

A kernel takes a second or so to compile, most of it outside of Python, and a layer has a dozen. So
the first layer of a network is gone through once with launches held back: the host does what it
will do in every step, forward and backward, and each launch names a kernel, with the types of its
arguments, that other threads compile meanwhile. What is computed on the way is garbage and dropped;
the vendor's libraries, whose calls are not held back, load and plan for the shape while they are at
it. What it costs is one more layer of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sloth.kernels.context import BlockContext
from sloth.kernels.engine import launches_held
from sloth.kernels.layer import Wiring, Workspace, prepare

_THREADS = 8
# Rows of a batch above which going through a layer for nothing takes longer than it saves.
_MOST_ROWS = 65536
# What a kernel's code depends on, of a pointer or a number.
_ALIGNMENT = 16

Twin = Callable[[Any, Tensor, BlockContext, Workspace], Tensor]


class CompilingAhead:
    """Compiles each kernel it is told of once, on a few threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(_THREADS)
        self._jobs: dict[Any, Future[None]] = {}

    def __call__(self, kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A launch of the kernel with these arguments will come."""
        is_unaligned = any(isinstance(x, Tensor) and x.data_ptr() % _ALIGNMENT for x in args)
        if is_unaligned or any(isinstance(x, Tensor) for x in keywords.values()):
            return  # it is compiled when it comes
        # Types stand for tensors, which are free to go; they can only by position.
        types = tuple(x.dtype if isinstance(x, Tensor) else x for x in args)
        key = kernel, tuple(map(_kind, types)), tuple(sorted(keywords.items(), key=str))
        if key not in self._jobs:
            self._jobs[key] = self._pool.submit(self._compile, kernel, types, keywords)

    def _compile(self, kernel: Any, types: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        with torch.cuda.device(self._device):
            kernel.warmup(*types, grid=(1,), **keywords)

    def wait(self) -> int:
        """Until all are compiled; how many they were. Raises what a compilation raised."""
        with self._pool:
            for job in self._jobs.values():
                job.result()
        return len(self._jobs)


def _kind(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % _ALIGNMENT == 0
    return value


def compile_ahead(
    twin: Twin,
    block: Any,
    hidden: Tensor,
    context: BlockContext,
    workspace: Workspace,
    wiring: Wiring,
) -> int:
    """Compile what a layer's forward and backward on `hidden` [B, T, D] will launch; how many
    kernels that were. Changes nothing: no gradient, no random state, no tensor that lives on."""
    if hidden.shape[:-1].numel() > _MOST_ROWS:
        return 0
    layer = prepare(block, hidden, context, workspace, wiring)  # what stays unpacked is launched
    wanted = [m for m in layer.matrices if m is not None and m.requires_grad]
    ahead = CompilingAhead(hidden.device)
    with launches_held(ahead), torch.random.fork_rng([hidden.device]):
        own = hidden.detach().requires_grad_()
        out = twin(block, own, context, workspace)
        with torch.autograd.set_multithreading_enabled(False):  # held here, nowhere else
            torch.autograd.grad(out, [own, *wanted], torch.zeros_like(out), allow_unused=True)
    return ahead.wait()
