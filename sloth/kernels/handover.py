"""The gradient one layer hands to the layer before it, with room behind it for that one's tail.

A backward wants dY in rows with room for V = dY sB behind them (`stacked.py`). The layer that forms
dY, as its dX, can leave that room, and nothing needs to be copied: 67 MB each way at 8192 x 4096 in
16 bits. Autograd carries the tensor from one to the other, or another one (a hook, a sum with a
second use), so what arrives is looked at: only a gradient that lies where the last one was written,
with its strides and in memory of its size, has the room.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sloth.kernels.rows import as_rows
from sloth.kernels.stacked import LoraStack


class Handover:
    """Of the layers of one network."""

    def __init__(self) -> None:
        self._place: tuple[Any, ...] | None = None
        self._num_columns = 0

    def hand_on(self, wide: Tensor, num_columns: int, shape: Any) -> Tensor:
        """The first columns of `wide` [n, columns and more] as a gradient of this shape."""
        dx = wide[:, :num_columns].view(shape)
        self._place, self._num_columns = _place_of(dx), wide.shape[1]
        return dx

    def arrived(self, dy: Tensor, stack: LoraStack) -> Tensor | None:
        """dy with its room [n, N + R] for this stack; None where it has none."""
        place, self._place = self._place, None
        if place != _place_of(dy) or self._num_columns < stack.N + stack.R:
            return None
        rows = as_rows(dy)
        return rows.as_strided((len(rows), stack.N + stack.R), rows.stride())


def _place_of(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.untyped_storage().nbytes()
