"""Locked host memory: pieces come back, arenas are cut anew, nothing is written too early."""

from __future__ import annotations

import torch
from torch import Tensor

from sloth.kernels.pinned import Piece, PinnedPool

MIB = 2**20


class Happening:
    """An event that remembers whether it was waited for."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


class System:
    """Hands out memory and counts what is locked."""

    def __init__(self) -> None:
        self.locked: list[int] = []

    def allocate(self, num_bytes: int) -> tuple[Tensor, object]:
        self.locked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8), lambda: self.locked.remove(num_bytes)


def taken(pool: PinnedPool, size: int, count: int) -> list[Piece]:
    pieces = [pool.take(size) for _ in range(count)]
    starts = sorted(piece.memory.data_ptr() for piece in pieces)
    assert all(b - a >= size for a, b in zip(starts, starts[1:], strict=False))
    return pieces


def give_back(pool: PinnedPool, pieces: list[Piece]) -> list[Happening]:
    events = [Happening() for _ in pieces]
    for piece, event in zip(pieces, events, strict=True):
        pool.give_back(piece, event)
    return events


def test_pieces_are_used_again():
    system = System()
    pool = PinnedPool(system.allocate)
    events = give_back(pool, taken(pool, 100 * MIB, 6))
    held = pool.num_bytes
    again = taken(pool, 100 * MIB, 6)
    assert pool.num_bytes == held == sum(system.locked)
    assert {id(piece.last_use) for piece in again} <= {id(event) for event in events} | {id(None)}
    assert any(piece.last_use is not None for piece in again)


def test_batches_of_many_lengths_share_the_memory_of_the_largest():
    system = System()
    pool = PinnedPool(system.allocate)
    sizes = [100, 90, 40, 7, 100, 63, 12]
    for size in sizes:
        give_back(pool, taken(pool, size * MIB, 8))
    assert sum(system.locked) <= 1.25 * 8 * 100 * MIB


def test_growing_lengths_give_smaller_arenas_back():
    system = System()
    pool = PinnedPool(system.allocate)
    for size in (10, 80, 200, 400):
        give_back(pool, taken(pool, size * MIB, 4))
    assert sum(system.locked) <= 2 * 4 * 400 * MIB


def test_memory_is_cut_anew_only_after_its_last_use():
    pool = PinnedPool(System().allocate)
    events = give_back(pool, taken(pool, 100 * MIB, 2))
    pool.take(10 * MIB)
    assert all(event.waited for event in events)


def test_what_is_in_use_stays():
    system = System()
    pool = PinnedPool(system.allocate)
    piece = pool.take(100 * MIB)
    piece.memory.fill_(7)
    pool.clear()
    for size in (3, 50, 300):
        for other in taken(pool, size * MIB, 3):
            other.memory.fill_(1)
    assert (piece.memory == 7).all() and sum(system.locked) == pool.num_bytes


def test_idle_memory_goes_back_to_the_system():
    system = System()
    pool = PinnedPool(system.allocate)
    events = give_back(pool, taken(pool, 100 * MIB, 3))
    pool.clear()
    assert system.locked == [] and pool.num_bytes == 0
    assert all(event.waited for event in events)
