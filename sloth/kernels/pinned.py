"""Page-locked host memory in pieces that are used again.

A copy runs beside the device's work only from memory that the system has locked, and locking costs
0.3 s a GiB, so it is kept. Memory is taken in arenas of a few equal pieces, of one where a piece is
large: layers that keep more than others have arenas of their own, and what these have to spare
serves nobody else. A batch of another length asks for pieces of another size: it takes slightly
larger ones, or an arena none of whose pieces is in use is cut anew; one that is too small to be cut
goes back to the system first. So what is held follows what the largest batch needs, however many
lengths there were.

Arenas are registered with the driver at their exact size: torch's own pinned allocator rounds up to
a power of two, which turns 92 GiB into 128.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# Pieces of an arena, fewer where that would make it larger than this, and its least size: small
# layers share one.
_PIECES, _MAX_SHARED_BYTES, _MIN_ARENA_BYTES = 4, 2**30, 2**28
# How much larger than asked for a piece may be.
_SLACK = 1.25


class Piece:
    """Bytes of an arena. last_use: the CUDA event after which they may be written, None for now."""

    def __init__(self, memory: Tensor, arena: _Arena, last_use: Any) -> None:
        self.memory, self.arena, self.last_use = memory, arena, last_use


class _Arena:
    """Locked memory, cut into equal pieces; unlocked when the last of these is gone.

    free: memory and last use of the pieces that nobody has.
    """

    def __init__(self, memory: Tensor, unlock: Callable[[], None]) -> None:
        self.memory = memory
        # Before the memory is freed: its next owner could not lock it again.
        weakref.finalize(self, unlock).atexit = False
        self.size, self.count = 0, 0
        self.free: list[tuple[Tensor, Any]] = []

    @property
    def is_idle(self) -> bool:
        """Whether no piece is in use."""
        return len(self.free) == self.count

    def cut(self, size: int) -> None:
        """Into pieces of `size`; none may be in use."""
        self.settle()
        self.size, self.count = size, len(self.memory) // size
        self.free = [(piece, None) for piece in self.memory[: self.count * size].split(size)]

    def take(self) -> Piece:
        """A piece; there must be a free one."""
        memory, last_use = self.free.pop()
        return Piece(memory, self, last_use)

    def settle(self) -> None:
        """Wait for the copies that still read or write it."""
        for _, last_use in self.free:
            if last_use is not None:
                last_use.synchronize()


# bytes -> (memory of that size, what unlocks it)
Allocate = Callable[[int], tuple[Tensor, Callable[[], None]]]


def locked_memory(num_bytes: int) -> tuple[Tensor, Callable[[], None]]:
    """Host memory registered with the CUDA driver, and what ends that.

    Raises torch.OutOfMemoryError where the system has none left, or locks no more of it: fewer rows
    need less of it, as they do of the device's.
    """
    try:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise _none_left(num_bytes, "has", str(error)) from error
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    status = runtime.cudaHostRegister(address, num_bytes, 0)
    if int(status) != 0:
        _clear_error()
        raise _none_left(num_bytes, "locks", str(status))

    def unlock() -> None:
        torch.cuda.synchronize()  # copies that nobody waits for any more
        torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))

    return memory, unlock


def _none_left(num_bytes: int, verb: str, why: str) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"the system {verb} no further {num_bytes / 2**30:.2f} GiB of host memory for what layers "
        f"keep there ({why}). Fewer or shorter rows in a pass need less of it"
    )


def _clear_error() -> None:
    """The driver keeps the error of a failed call for whoever asks next, which is a launch that
    has nothing to do with it: let it be this one."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)


class PinnedPool:
    """Hands out pieces of locked memory and takes them back."""

    def __init__(self, allocate: Allocate = locked_memory) -> None:
        self._allocate = allocate
        self._arenas: list[_Arena] = []

    @property
    def num_bytes(self) -> int:
        """Locked at this time."""
        return sum(len(arena.memory) for arena in self._arenas)

    def take(self, size: int) -> Piece:
        """A piece of at least `size` bytes. Raises torch.OutOfMemoryError."""
        arena = self._with_free_piece(size) or self._cut_anew(size)
        if arena is None:
            self.clear()
            count = min(max(_MAX_SHARED_BYTES // size, 1), _PIECES)
            arena = _Arena(*self._allocate(max(count * size, _MIN_ARENA_BYTES)))
            self._arenas.append(arena)
            arena.cut(size)
        return arena.take()

    def give_back(self, piece: Piece, last_use: Any) -> None:
        """Take a piece back, to be written again after `last_use`."""
        piece.arena.free.append((piece.memory, last_use))

    def clear(self) -> None:
        """Give idle arenas back to the system."""
        for arena in self._arenas:
            if arena.is_idle:
                arena.settle()
        self._arenas = [arena for arena in self._arenas if not arena.is_idle]

    def _with_free_piece(self, size: int) -> _Arena | None:
        fits = (a for a in self._arenas if a.free and size <= a.size <= _SLACK * size)
        return next(fits, None)

    def _cut_anew(self, size: int) -> _Arena | None:
        large = [a for a in self._arenas if a.is_idle and len(a.memory) >= size]
        arena = min(large, key=lambda a: len(a.memory), default=None)
        if arena is not None:
            arena.cut(size)
        return arena
