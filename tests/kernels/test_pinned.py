"""Locked host memory: pieces come back, arenas are cut anew, nothing is written too early."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sloth.kernels import pinned
from sloth.kernels.pinned import Piece, PinnedPool, locked_memory
from tests.train.fakes import FakeModel
from tests.train.runs import train
from tests.train.test_oom import SETTINGS

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


def refusing(*_: object) -> int:
    return 2  # cudaErrorMemoryAllocation


@pytest.mark.parametrize("lacks", ["memory", "locks"])
def test_memory_that_cannot_be_had_is_out_of_memory_like_any(lacks, monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=refusing)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    cleared = []
    monkeypatch.setattr(pinned, "_clear_error", lambda: cleared.append(1))
    size = 2**60 if lacks == "memory" else MIB
    with pytest.raises(torch.OutOfMemoryError, match="host memory for what layers keep there"):
        PinnedPool(lambda num_bytes: locked_memory(size)).take(size)
    assert cleared == [1] * (lacks == "locks")


class Offloading(FakeModel):
    """Keeps its activations in locked memory, which holds two rows' and no more."""

    def loss(self, tokens, labels, positions=None, num_trained=None):
        if len(tokens) > 2:
            raise pinned._none_left(MIB, "locks", "2")
        return super().loss(tokens, labels, positions, num_trained)


def test_passes_are_halved_where_no_more_memory_is_locked(tmp_path, capsys):
    train(tmp_path / "run", model=Offloading(), **SETTINGS)
    assert "going on with 2 and more passes" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_failed_lock_leaves_no_error_behind(monkeypatch):
    memory, unlock = locked_memory(MIB)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: memory)  # locked already
        with pytest.raises(torch.OutOfMemoryError, match="locks no further"):
            locked_memory(MIB)
    assert torch.ones(4, device="cuda").mul_(2).sum().item() == 8
    unlock()


@pytest.mark.parametrize("unit", [100 * MIB, 600 * MIB, 2900 * MIB])
def test_layers_of_several_kinds_leave_little_unused(unit):
    locked: list[int] = []

    def allocate(num_bytes: int) -> tuple[Tensor, object]:
        locked.append(num_bytes)
        return torch.empty(1, dtype=torch.uint8).expand(num_bytes), lambda: None

    pool = PinnedPool(allocate)
    sizes = [unit] * 27 + [2 * unit] * 5 + [4 * unit]
    held = [pool.take(size) for size in sizes]
    assert len(held) == len(sizes) and sum(locked) <= sum(sizes) + 3 * 1024 * MIB
