"""Packing: which examples share a row, so that little of a batch is padding.

Best-fit decreasing: longest first, each example goes where the least room is left that still holds
it, else into a new row. Rows end up at most 22% more than the fewest possible (Johnson 1974,
https://doi.org/10.1137/0203025), on chats rarely 1%. No example is cut, and the rows are a pure
function of the lengths. What a row means to the model (positions, attention, loss) is unchanged by
its neighbours; batches.py lays the rows out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """rows: the examples of each, by index. fill: tokens over the room for them."""

    rows: list[list[int]]
    fill: float


def pack(lengths: Sequence[int], capacity: int) -> Packing:
    """Rows of at most `capacity` tokens. Raises ValueError for an example longer than that."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some row has room for r tokens more
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, a row at most {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - length
        if left:
            if not by_room.setdefault(left, []):
                rooms |= 1 << left
            by_room[left].append(row)
    return Packing(rows, sum(lengths) / max(len(rows) * capacity, 1))
