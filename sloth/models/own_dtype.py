"""A network's own dtype is what it computes in, also where `torch.autocast` is on.

The Functions of the kernel levels see to themselves (`sloth.kernels.function`); this does it for
what stands between them: rotary tables, DoRA's gains, the head. The reference level is plain torch
code, as Hugging Face's is, and follows autocast as that does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

from sloth.kernels.dispatch import REFERENCE
from sloth.kernels.function import is_autocast_on

P = ParamSpec("P")
Result = TypeVar("Result")


def in_own_dtype(method: Callable[P, Result]) -> Callable[P, Result]:
    """A decoder's method that runs with autocast off, unless at the reference level."""

    @wraps(method)
    def run(*args: P.args, **keywords: P.kwargs) -> Result:
        network = cast(Any, args[0])
        device: torch.device = network.device
        if network.ops is REFERENCE or not is_autocast_on(device):
            return method(*args, **keywords)
        with torch.autocast(device.type, enabled=False):
            return method(*args, **keywords)

    return run
