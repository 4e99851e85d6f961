"""Layer inputs that wait in host memory between forward and backward.

A copy to pinned memory runs on a stream of its own beside the layers, and so does the way back, one
layer ahead. A device tensor is let go only once the compute stream has been told to wait for its
copy, two layers later: the host runs far ahead of the device, so leaving that to the allocator
would keep every input alive until the copies catch up.

Traffic: 2 D bytes a token and layer each way; at 55 GB/s and 4096 wide that hides behind any layer
of more than 0.15 us a token. Pinned memory is taken a power of two at a time, since the allocator
rounds up to one, and handed out in equal pieces.
Source: idea as in torchtune's activation offloading, https://github.com/pytorch/torchtune.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

# Inputs whose copies may be under way before the compute stream waits for one.
_DEPTH = 2
_MIN_ARENA_BYTES = 2**28


# Pinned bytes, and the event after which their last reader is done.
Piece = tuple[Tensor, torch.cuda.Event | None]


class Stashed:
    """One tensor in host memory, until it is garbage."""

    def __init__(
        self, stash: HostStash, piece: Tensor, like: Tensor, before: Stashed | None
    ) -> None:
        self.stash, self.piece = stash, piece
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.before = before
        self.stored = torch.cuda.Event()
        self.loaded: torch.cuda.Event | None = None
        self.tensor: Tensor | None = None

    def host(self) -> Tensor:
        """The copy in host memory."""
        count = self.shape.numel()
        return self.piece[: count * self.dtype.itemsize].view(self.dtype).view(self.shape)

    def __del__(self) -> None:
        self.stash.release(self.piece, self.loaded)


class HostStash:
    """Pinned memory, two copy streams and what is under way, for one network on one device."""

    def __init__(self) -> None:
        self._free: dict[int, list[Piece]] = {}
        self._leaving: deque[tuple[Tensor, Stashed]] = deque()
        self._last: Stashed | None = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def put(self, x: Tensor) -> Stashed:
        """Copy x [N, D] to the host, beside what the device does next."""
        out, _ = self._copy_streams(x.device)
        compute = torch.cuda.current_stream(x.device)
        piece, read = self._piece(x.nbytes)
        stashed = Stashed(self, piece, x, self._last)
        out.wait_stream(compute)
        if read is not None:
            out.wait_event(read)
        with torch.cuda.stream(out):
            stashed.host().copy_(x, non_blocking=True)
            stashed.stored.record(out)
        self._leaving.append((x, stashed))
        while len(self._leaving) > _DEPTH:
            compute.wait_event(self._leaving.popleft()[1].stored)
        self._last = stashed
        return stashed

    def take(self, stashed: Stashed) -> Tensor:
        """The tensor, back on the device; the one before it starts on its way too."""
        compute = torch.cuda.current_stream(stashed.device)
        while self._leaving:
            compute.wait_event(self._leaving.popleft()[1].stored)
        self._last = None
        self._fetch(stashed)
        tensor, loaded, before = stashed.tensor, stashed.loaded, stashed.before
        assert tensor is not None and loaded is not None
        stashed.tensor = stashed.before = None
        compute.wait_event(loaded)
        if before is not None:
            self._fetch(before)
        return tensor

    def release(self, piece: Tensor, read: torch.cuda.Event | None) -> None:
        """Take a piece back once nobody needs it; `read` is its last reader's event."""
        self._free.setdefault(piece.numel(), []).append((piece, read))

    def _fetch(self, stashed: Stashed) -> None:
        if stashed.tensor is not None:
            return
        _, back = self._copy_streams(stashed.device)
        # Memory comes from the compute stream: what used it before has to be over.
        stashed.tensor = torch.empty(stashed.shape, dtype=stashed.dtype, device=stashed.device)
        back.wait_stream(torch.cuda.current_stream(stashed.device))
        back.wait_event(stashed.stored)
        with torch.cuda.stream(back):
            stashed.tensor.copy_(stashed.host(), non_blocking=True)
            stashed.loaded = torch.cuda.Event()
            stashed.loaded.record(back)

    def _copy_streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams

    def _piece(self, num_bytes: int) -> Piece:
        size = -(-num_bytes // 512) * 512
        if not self._free.get(size):
            arena_bytes = max(_MIN_ARENA_BYTES, 1 << (size - 1).bit_length())
            arena = torch.empty(arena_bytes, dtype=torch.uint8, pin_memory=True)
            pieces = arena[: arena_bytes // size * size].split(size)
            self._free.setdefault(size, []).extend((piece, None) for piece in pieces)
        return self._free[size].pop()
