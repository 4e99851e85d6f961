"""What every hand-written autograd Function here derives from: it computes in its operands' dtypes.

A derivation names the dtype of every product and every sum, and writes into memory of that dtype.
`torch.autocast` would exchange some of these products' operands for 16-bit copies and leave the
rest as it is; so neither direction sees it, wherever it was switched on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast would change what is computed on `device`; it does not know meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class Function(torch.autograd.Function):
    """An autograd Function whose `forward` and `backward` run with autocast off.

    The first operand of both, after the context, is a tensor on the device that computes.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in ("forward", "backward"):
            if name in cls.__dict__:
                setattr(cls, name, staticmethod(_without_autocast(getattr(cls, name))))


def _without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compute)
    def run(ctx: Any, first: torch.Tensor, *rest: Any) -> Any:
        device = first.device
        if not is_autocast_on(device):  # as a rule; a step comes here some hundred times
            return compute(ctx, first, *rest)
        with torch.autocast(device.type, enabled=False):
            return compute(ctx, first, *rest)

    return run
