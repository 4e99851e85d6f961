"""Stacks of projections: which a block has, who stands where in the scratch of one, and rows with
room behind them.

The wide products want aligned rows: ranks and row strides are multiples of 64 elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Stack name -> paths of its projections inside a block, in stacking order.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# Ranks and row strides are padded to it: K + 64 runs at the speed of K, K + 16 does not.
_ALIGNMENT = 64


class Slot(NamedTuple):
    """Where a member stands: rows of W, and rows of A (columns of B), without the padding."""

    rows: slice
    ranks: slice


@dataclass(frozen=True)
class StackShape:
    """Sizes of a stack; stacks of one shape can share a scratch."""

    num_inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, members: Sequence[Any]) -> StackShape:
        """The sizes of these projections; an adapter counts while it is off, too."""
        return cls(
            members[0].in_features,
            tuple(member.out_features for member in members),
            tuple(0 if m.lora_slot is None else len(m.lora_slot.A) for m in members),
        )

    @property
    def num_outputs(self) -> int:
        """N."""
        return sum(self.outputs)

    @property
    def rank(self) -> int:
        """R, padded."""
        return padded(sum(self.ranks))

    @property
    def slots(self) -> list[Slot]:
        """Each member's place."""
        slots, row, rank = [], 0, 0
        for num_outputs, own in zip(self.outputs, self.ranks, strict=True):
            slots.append(Slot(slice(row, row + num_outputs), slice(rank, rank + own)))
            row, rank = row + num_outputs, rank + own
        return slots

    def scratch(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros [N + R, K + R]: what no member writes stays zero."""
        rows, columns = self.num_outputs + self.rank, self.num_inputs + self.rank
        return torch.zeros(rows, padded(columns), dtype=dtype, device=device)[:, :columns]

    def factors(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros for A [R, K] and sB [N, R] alone, one behind the other."""
        return torch.zeros(
            self.rank * (self.num_inputs + self.num_outputs), dtype=dtype, device=device
        )


def padded(n: int) -> int:
    """The next multiple of 64."""
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def wide_rows(num_rows: int, num_columns: int, like: Tensor) -> Tensor:
    """Room for rows whose stride is aligned, in the dtype of `like`."""
    return like.new_empty(num_rows, padded(num_columns))[:, :num_columns]
