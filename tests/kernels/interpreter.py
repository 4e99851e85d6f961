"""Cases that the interpreter runs, by name, and how two engines are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sloth.kernels.engine import forced_engine
from tests import tolerance
from tests.kernels.common import Op, nan_poisoned_empty, outputs_and_gradients

Case = Callable[[torch.dtype], None]
CASES: dict[str, Case] = {}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def case(function: Case) -> Case:
    """Register a case under its function's name."""
    CASES[function.__name__] = function
    return function


def compare(op: Op, inputs: Sequence[Tensor], needs: Sequence[bool] | None = None) -> None:
    """Outputs and gradients of the two engines agree, each element written."""
    with forced_engine("triton"), nan_poisoned_empty():
        actual = outputs_and_gradients(op, inputs, needs)
    with forced_engine("torch"):
        expected = outputs_and_gradients(op, inputs, needs)
    for ours, theirs in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance.same_maths(theirs.dtype))
