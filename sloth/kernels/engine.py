"""Which engine runs an op: plain torch, or Triton on a GPU. Decided by the tensor, never by
try/except.

Triton exists on Linux only, so it is imported here once; op files take `triton`, `tl` and `jit`
from this module and still import where it is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sloth.errors import KernelUnavailable

HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None

Engine = Literal["torch", "triton"]

# Triton reads this when a kernel is defined, so it cannot change later.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a float dtype, for kernels that read addresses from a table."""
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
    return getattr(tl, names[dtype])


_forced: Engine | None = None


# (kernel, positional arguments, keyword arguments) of a launch that is not to happen.
Held = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


class _Holding(threading.local):
    """Who is told of this thread's launches in their place: None, they happen."""

    held: Held | None = None


_holding = _Holding()
# What varies from batch to batch and changes no code: no kernel is compiled anew for it.
_VARYING = ("num_rows", "num_tokens")


def jit(function: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is not installed.

    Launches of a function whose name ends in `_kernel` can be held back (`launches_held`).
    """
    if not HAS_TRITON:
        return function
    varying = [name for name in inspect.signature(function).parameters if name in _VARYING]
    if INTERPRET or not function.__name__.endswith("_kernel"):
        return triton.jit(function)
    return _Kernel(function, do_not_specialize=varying)


if HAS_TRITON:

    class _Kernel(triton.JITFunction):
        """A kernel, launched as ever, unless launches are held."""

        def __getitem__(self, grid: Any) -> Callable[..., object]:
            def launch(*args: Any, **keywords: Any) -> object:
                held = _holding.held
                if held is not None:
                    return held(self, args, keywords)
                return self.run(*args, grid=grid, warmup=False, **keywords)

            return launch


@contextmanager
def launches_held(held: Held) -> Iterator[None]:
    """Inside, this thread launches no kernel of ours: `held` is told of it instead.

    Other threads, who may run a model of their own, launch theirs. So does autograd's, unless its
    backward is made in this one (`torch.autograd.set_multithreading_enabled`).
    """
    before, _holding.held = _holding.held, held
    try:
        yield
    finally:
        _holding.held = before


def engine_for(x: Tensor) -> Engine:
    """Engine that computes an op on `x`: Triton for 16 and 32-bit floats on CUDA, else torch."""
    if _forced is not None:
        return _forced
    return "triton" if HAS_TRITON and x.is_cuda and x.dtype in _TRITON_DTYPES else "torch"


@contextmanager
def forced_engine(engine: Engine) -> Iterator[None]:
    """Run every op inside on one engine, whatever the tensor; for tests and benchmarks."""
    global _forced
    if engine == "triton" and not HAS_TRITON:
        raise KernelUnavailable("the triton engine was asked for, but triton is not installed")
    before, _forced = _forced, engine
    try:
        yield
    finally:
        _forced = before
