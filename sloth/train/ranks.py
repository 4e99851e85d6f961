"""Several processes training one model: who reads which rows, sums over all, and failing together.

Started by `sloth train --gpus 2` (or torchrun). The rows of a step are shared out
(rank r of n takes every n-th), each rank adds up its gradients over the trained tokens of the
whole step, and one sum over ranks follows. So batch_size * grad_accum rows make a step whatever
the number of ranks, and the curve is that of one process up to the order of sums.

They meet before any of them reads data or a model, since one that fails there would leave the
others waiting for it. From then on every stretch that can fail runs inside `agree`: its outcome
travels with the numbers that have to be summed anyway, and where one failed, all raise. They start
equal: what identifies the run is compared, and rank 0's weights are everybody's. Only rank 0
writes. Strings travel as bytes, because torch's own exchange of objects unpickles what it is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sloth.errors import RankFailed

# Of gradients in one all-reduce: 512 million fp32 numbers, more than any adapter has. The buffer
# stands beside them, so a full training, which fills its GPU, gives theirs in turns.
FLAT_BYTES = 2**31

# For the others to come: one that failed before it came is known of within a minute.
MEETING_S = 50
# For one exchange; what rank 0 does alone (saving a large model, answering prompts) takes less.
EXCHANGE_S = 3600

T = TypeVar("T")
Number = float | Tensor


class Ranks:
    """This process among `size`. Alone, everything is the identity and nothing is exchanged.

    Used as a context, it meets the others at the start and leaves them at the end, unless the
    program joined a process group of its own before.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._has_met = False

    @classmethod
    def of_process(cls, device: torch.device) -> Ranks:
        """Those that torchrun started, as its environment tells; alone without it.

        Raises ValueError for an environment that tells but a part.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device)
        told = ("RANK",) if dist.is_initialized() else ("RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in told if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={size} says that this is one of several processes, and "
                f"{', '.join(missing)} not which one or where they meet; start them with "
                "torchrun, or unset WORLD_SIZE"
            )
        return cls(device, int(os.environ["RANK"]), size)

    def meet(self) -> None:
        """Join the others. Raises RankFailed for one that does not come within MEETING_S."""
        if self.size == 1 or dist.is_initialized():
            return
        with _exchange(f"not all of {self.size} processes came within {MEETING_S} s"):
            place = dist.PrefixStore(f"sloth {next(_MEETINGS)}", _store(MEETING_S))
            place.set(f"rank {self.rank}", "here")
            everyone = [f"rank {rank}" for rank in range(self.size)]
            place.wait(everyone, timedelta(seconds=MEETING_S))
        longest = timedelta(seconds=EXCHANGE_S)
        place.set_timeout(longest)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with _exchange():
            dist.init_process_group(
                backend, store=place, rank=self.rank, world_size=self.size, timeout=longest
            )
        self._has_met = True

    def leave(self) -> None:
        """Undo `meet`."""
        if self._has_met:
            self._has_met = False
            dist.destroy_process_group()

    def __enter__(self) -> Ranks:
        self.meet()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._has_met:
                with _exchange():
                    dist.barrier()  # gloo may abort where its peer is gone before its good-bye
        finally:
            self.leave()

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> list[T]:
        """The rows that this rank reads."""
        return list(rows[self.rank :: self.size])

    def agree(self, work: Callable[[], Sequence[Number]], count: int = 0) -> list[Number]:
        """Do `work` in every rank; its `count` numbers, summed over ranks.

        Raises what `work` raised, or RankFailed where it was another rank's.
        """
        if self.size == 1:
            return list(work())
        error: BaseException | None = None
        numbers: Sequence[Number] = [0.0] * count
        try:
            numbers = work()
            assert len(numbers) == count
        except BaseException as raised:
            error = raised
        failures = [float(rank == self.rank and error is not None) for rank in range(self.size)]
        values = [*failures, *map(float, numbers)]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        try:
            with _exchange():
                dist.all_reduce(sums)
        except RankFailed:
            if error is not None:  # the cause, where the others' end may be the effect
                raise error from None
            raise
        told = sums.tolist()
        if error is not None:
            raise error
        failed = [rank for rank in range(self.size) if told[rank]]
        if failed:
            raise RankFailed(f"rank {', '.join(map(str, failed))} failed; its output says why")
        return told[self.size :]

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every rank; its result there. Where it fails in one, all raise."""
        results: list[T] = []

        def guarded() -> list[Number]:
            results.append(work())
            return []

        self.agree(guarded)
        return results[0]

    def first(self, work: Callable[..., object], *arguments: object) -> None:
        """Do `work` in rank 0 alone; where it fails, all raise."""

        def guarded() -> list[Number]:
            if self.is_first:
                work(*arguments)
            return []

        self.agree(guarded)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over ranks: one flat all-reduce for each dtype, so one for an adapter, and
        one for each FLAT_BYTES of a full training. A rank that had no row adds nothing.
        """
        if self.size == 1:
            return
        for group in _by_dtype(parameters):
            self._add_flat(group)

    def _add_flat(self, parameters: list[nn.Parameter]) -> None:
        """The gradients, and for each a 1 where a rank has it, in one buffer."""
        sizes = [parameter.numel() for parameter in parameters]
        first, num_held = parameters[0], len(parameters)
        flat = torch.zeros(sum(sizes) + num_held, dtype=first.dtype, device=self.device)
        *parts, present = flat.split([*sizes, num_held])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
        present.copy_(torch.tensor([parameter.grad is not None for parameter in parameters]))
        with _exchange():
            dist.all_reduce(flat)
        for parameter, part, held in zip(parameters, parts, present.tolist(), strict=True):
            summed = part.view_as(parameter).to(parameter.device)
            parameter.grad = summed if held else None

    def require_same(self, values: Mapping[str, object]) -> None:
        """Raise ValueError, naming each of these JSON-like values that is not rank 0's."""
        told = json.loads(self.tell(json.dumps(values)))
        own = json.loads(json.dumps(values))

        def compare() -> None:
            different = [
                f"{name} is {own.get(name)!r}, not {told.get(name)!r}"
                for name in {**told, **own}
                if told.get(name) != own.get(name)
            ]
            if different:
                raise ValueError(
                    f"rank {self.rank} would train another run than rank 0: "
                    f"{'; '.join(different)}. Every process needs the same model, data and settings"
                )

        self.together(compare)

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values, in every rank, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            held = tensor.detach().to(self.device).contiguous()
            with _exchange():
                dist.broadcast(held, 0)
            tensor.detach().copy_(held)

    def tell(self, text: str) -> str:
        """Rank 0's text, in every rank."""
        if self.size == 1:
            return text
        data = list(text.encode()) if self.is_first else []
        length = torch.tensor([len(data)], device=self.device)
        with _exchange():
            dist.broadcast(length, 0)
            held = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
            if self.is_first:
                held = torch.tensor(data, dtype=torch.uint8, device=self.device)
            dist.broadcast(held, 0)
        return bytes(held.tolist()).decode()

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Small tensors of every rank, under `name` for rank 0 and `name.<rank>` for the others."""
        gathered = dict(tensors)
        if self.size == 1:
            return gathered
        for name, tensor in tensors.items():
            parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.size)]
            with _exchange():
                dist.all_gather(parts, tensor.to(self.device))
            gathered |= {f"{name}.{rank}": parts[rank].cpu() for rank in range(1, self.size)}
            gathered[name] = parts[0].cpu()
        return gathered

    def pick(self, gathered: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo `gather`: what was this rank's."""
        suffix = f".{self.rank}" if self.rank else ""
        return {
            name.removesuffix(suffix): tensor
            for name, tensor in gathered.items()
            if (name.endswith(suffix) if suffix else "." not in name)
        }


def _by_dtype(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype, FLAT_BYTES at a time; the same groups in every rank."""
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.dtype, []).append(parameter)
    for held in kinds.values():
        group: list[nn.Parameter] = []
        num_bytes = 0
        for parameter in held:
            num_bytes += parameter.nbytes
            if group and num_bytes > FLAT_BYTES:
                yield group
                group, num_bytes = [], parameter.nbytes
            group.append(parameter)
        yield group


@contextmanager
def _exchange(said: str = "another process of this run is gone") -> Iterator[None]:
    """Inside, an exchange that breaks raises RankFailed: a process that was killed says nothing
    itself, but its connections close.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).strip().split("\n")[0]
        raise RankFailed(f"{said} ({why})") from error


_MEETINGS = count()  # of this process: each has names of its own in the store


@cache
def _store(wait_s: int) -> dist.Store:
    """Where the processes find each other, one for the life of this one."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=wait_s)))
    return store
