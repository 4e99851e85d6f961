"""A stack's input after its norm, in a backward: written where it is multiplied again, else not."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sloth.kernels.ops.rms_norm import Norm, rms_norm_fwd
from sloth.kernels.ops.thin_products import norm_sum, sums_norms
from sloth.kernels.rows import sum_over_rows


class Input(Protocol):
    """A stack, as far as its input goes."""

    K: int

    def new_input(self, num_rows: int) -> Tensor:
        """Room for rows of K columns, and perhaps a tail."""


def normed_input(stack: Input, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) [n, D + R] with its tail still to be filled, and its rstd."""
    wide = stack.new_input(len(x))
    _, rstd = rms_norm_fwd(x, norm.weight, norm.eps, norm.offset, out=wide[:, : stack.K])
    return wide, rstd


class Normed:
    """norm(x) of some rows [n, D]; rstd [n] is that of the forward."""

    def __init__(self, stack: Input, norm: Norm, x: Tensor, rstd: Tensor) -> None:
        self._stack, self._norm, self._x, self._rstd = stack, norm, x, rstd
        self._wide: Tensor | None = None

    @property
    def wide(self) -> Tensor:
        """[n, D + R], its tail still to be filled; made on first use."""
        if self._wide is None:
            self._wide, _ = normed_input(self._stack, self._norm, self._x)
        return self._wide

    def sum_with(self, v: Tensor, num_ranks: int, dtype: torch.dtype) -> Tensor:
        """V^T norm(x) [R or less, D] of v [n, R], whose columns from num_ranks on are zeros."""
        norm = self._norm
        if self._wide is None and sums_norms(self._x, num_ranks):
            return norm_sum(self._x, norm.weight, self._rstd, norm.offset, v, num_ranks)
        return sum_over_rows(v, self.wide[:, : self._stack.K], dtype)
