"""The planner: what each fused layer keeps, so that a step is as fast as the memory allows.

Keeping more means computing less twice. From the sizes of a network, a batch shape and a budget the
planner predicts the peak of a step, tensor by tensor (`StepMemory`), and chooses

    per layer     a policy P1..P6 (`kernels.context.POLICIES`); the later layers get the richer
                  ones, since they are freed first
    the MLP       how many rows at a time, where all of them at once would not fit
    what is kept  on the device, or (but for gate and up) waiting in host memory
    embedding     on the device or, where it is not the head too, in host memory
    recording     whether the layers are replayed as CUDA graphs: where the host would be late, or
                  has much to do and memory is left over
    NF4 layers    how many stay unpacked, with memory that is left over
    the head      how many logits at a time, as long as a layer's peak is above its

The steps up from P1 are taken in order of time saved per byte. The prediction counts what the
allocator hands out (`torch.cuda.max_memory_allocated`), with AdamW's two fp32 moments; the context
of the driver is not part of it.
Source: Chen et al. 2016 (recomputation), https://arxiv.org/abs/1604.06174; Korthikanti et al. 2022
(choosing what to recompute), https://arxiv.org/abs/2205.05198.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sloth.constants import GIB
from sloth.kernels.context import POLICIES, Keep
from sloth.kernels.ops.linear_cross_entropy import CHUNK_BYTES
from sloth.train.network_sizes import NetworkSizes
from sloth.train.step_memory import FRAGMENTATION, StepMemory

# Rates that weigh one kind of work against another (H100: TFLOP/s of products and of attention).
_PRODUCT_RATE, _ATTENTION_RATE = 700e12, 450e12
# Bytes/s to and from pinned memory, and the share of a copy's time that layers beside it lose.
_HOST_RATE, _UNHIDDEN = 55e9, 0.08
# What the host needs to launch a layer's two passes: 2 to 5.6 ms measured, by machine. With memory
# to spare layers are recorded where that is at least this share of the device's time.
_HOST_SECONDS, _BURDEN = 5.5e-3, 0.3
# What a recording reserves beyond its tensors (up to 0.093 seen): its memory is a pool of its own.
_RECORDING_SLACK = 0.1
# A token's row looked up by the CPU and sent.
HOST_EMBEDDING_SECONDS = 0.5e-6
# Rows the MLP works on at a time, and how much longer its products take so; all at once up to the
# first.
_TILES = {16384: 0.0, 8192: 0.0, 4096: 0.02, 2048: 0.05}
# What two policies mixed must need of the extra time of steps from the bottom up, to take their
# place: policies that lie far apart leave larger holes between their tensors.
_QUICKER = 0.97
# Of free memory, for what else the process may allocate.
_MARGIN = 0.02


@dataclass(frozen=True)
class Plan:
    """What the layers keep for a batch of one shape, and the peak that follows.

    keeps: one a layer, first to last; none outside the fused level, where autograd keeps what it
    wants. predicted_gib: peak the allocator hands out in a step.
    budget_gib: what the process may reserve, None where nothing was measured or stated (a CPU).
    parts: name -> GiB of the predicted peak. head_chunk_bytes: of logits held at a time.
    claimed_gib: the peak, and what holes between tensors cost beyond the usual share of it; None:
    nothing.
    """

    batch: int
    seq: int
    keeps: tuple[Keep, ...]
    embedding_on_host: bool
    predicted_gib: float
    budget_gib: float | None
    parts: dict[str, float]
    head_chunk_bytes: int | None = None
    claimed_gib: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the budget holds what is predicted, by the measure that plans are chosen by."""
        return self.budget_gib is None or self._claimed <= self.budget_gib * (1 - FRAGMENTATION)

    @property
    def needed_gib(self) -> float:
        """The least budget that this plan fits."""
        return self._claimed / (1 - FRAGMENTATION)

    @property
    def _claimed(self) -> float:
        return self.predicted_gib if self.claimed_gib is None else self.claimed_gib

    def __str__(self) -> str:
        budget = "no budget" if self.budget_gib is None else f"budget {self.budget_gib:.2f} GiB"
        lines = [
            f"{self.batch} x {self.seq} tokens: {self.predicted_gib:.2f} GiB predicted, {budget}",
            *(self._choices() if self.keeps else ["layers        autograd keeps what it wants"]),
        ]
        lines += [f"  {name:<24}{gib:8.2f} GiB" for name, gib in self.parts.items()]
        return "\n".join(lines)

    def _choices(self) -> list[str]:
        names = {replace(keep, tile_tokens=None): name for name, keep in POLICIES.items()}
        counts: dict[str, int] = {}
        for keep in self.keeps:
            bare = replace(keep, tile_tokens=None, offload=False, resident=False, recorded=False)
            counts[names[bare]] = counts.get(names[bare], 0) + 1
        layers = ", ".join(f"{name} x {counts[name]}" for name in sorted(counts))
        first = self.keeps[0]
        kept = "in host memory, but gate and up" if first.offload else "on the device"
        tiles = f"{first.tile_tokens} rows at a time" if first.tile_tokens else "whole"
        return [
            f"layers        {layers}",
            f"MLP           {tiles}",
            f"kept tensors  {kept}",
            f"embedding     {'in host memory' if self.embedding_on_host else 'on the device'}",
            f"unpacked      {sum(keep.resident for keep in self.keeps)} layers stay so",
            f"launches      {'recorded, then replayed' if first.recorded else 'by the host'}",
            f"head          {(self.head_chunk_bytes or 0) >> 20} MiB of logits at a time",
        ]


def require_rows(batch: int, seq: int) -> None:
    """Raise ValueError for a batch of nothing."""
    if batch < 1 or seq < 1:
        raise ValueError(f"a plan needs at least one row and one token, got {batch} x {seq}")


def make_plan(
    sizes: NetworkSizes,
    batch: int,
    seq: int,
    budget_gib: float | None,
    host_gib: float | None = None,
) -> Plan:
    """The fastest plan predicted to fit; the smallest one where none fits (`Plan.fits` says so).

    host_gib: what may wait in host memory, None for no limit.
    """
    require_rows(batch, seq)
    memory = StepMemory(sizes, batch, seq, None if host_gib is None else host_gib * GIB)
    if budget_gib is None:
        keeps = [Keep()] * sizes.num_layers
        return _finished(memory, keeps, False, None)
    budget = budget_gib * GIB * (1 - FRAGMENTATION)
    best: tuple[float, list[Keep], bool] | None = None
    smallest: tuple[float, list[Keep], bool] | None = None
    for on_host in (False,) if sizes.embedding_stays else (False, True):
        for offload, tile in itertools.product((False, True), _tiles(memory)):
            options = _options(tile, offload)
            keeps = [options[0]] * sizes.num_layers
            claimed = memory.claimed(keeps, on_host)
            if smallest is None or claimed < smallest[0]:
                smallest = claimed, keeps, on_host
            chosen: tuple[float, list[Keep]] | None = None
            for keeps in _candidates(memory, options, on_host, budget):
                seconds = sum(extra_seconds(sizes, seq, keep) for keep in keeps)
                if chosen is None or seconds < chosen[0] * _QUICKER:
                    chosen = seconds, keeps
            if chosen is None:
                continue
            seconds = chosen[0] + (HOST_EMBEDDING_SECONDS if on_host else 0.0)
            if best is None or seconds < best[0]:
                best = seconds, chosen[1], on_host
    if best is None:
        assert smallest is not None
        return _finished(memory, smallest[1], smallest[2], budget_gib)
    _, keeps, on_host = best
    if is_host_bound(memory):
        keeps = _recorded(memory, keeps, on_host, budget)
    keeps = _fill_with_residents(memory, keeps, on_host, budget)
    if is_host_bound(memory, _BURDEN):  # with memory that is left over
        keeps = _recorded(memory, keeps, on_host, budget)
    return _finished(memory, keeps, on_host, budget_gib)


def with_residents(sizes: NetworkSizes, plan: Plan, count: int) -> Plan:
    """The plan with only the first `count` layers kept unpacked, predicted anew."""
    keeps = [replace(keep, resident=i < count) for i, keep in enumerate(plan.keeps)]
    if tuple(keeps) == plan.keeps:
        return plan
    memory = StepMemory(sizes, plan.batch, plan.seq)
    return _finished(memory, keeps, plan.embedding_on_host, plan.budget_gib)


def free_budget_gib(
    device_free: int, reserved: int, allocated: int, cap: int | None, own: int = 0
) -> float:
    """Budget from bytes that are free on the device or already reserved by this process.

    allocated: bytes in use, of which `own` are the network's; the others belong to somebody else.
    cap: bytes this process may reserve at most, None for no cap.
    """
    usable = device_free + reserved
    if cap is not None:
        usable = min(usable, cap)
    others = max(allocated - own, 0)
    return max(usable * (1 - _MARGIN) - others, min(own, allocated)) / GIB


def device_budget_gib(device: torch.device, own_bytes: int = 0) -> float | None:
    """What a network may reserve on a GPU, the `own_bytes` it already holds included; None on a
    CPU."""
    if device.type != "cuda":
        return None
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    cap = int(fraction * total) if fraction < 1 else None
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return free_budget_gib(free, reserved, allocated, cap, own_bytes)


def _finished(memory: StepMemory, keeps: list[Keep], on_host: bool, budget: float | None) -> Plan:
    parts, peak = memory.parts(keeps, on_host), memory.peak(keeps, on_host)
    claimed = memory.claimed(keeps, on_host)
    # Memory for it may not lie in one piece unless there is some to spare.
    spare = math.inf
    if budget is not None:
        spare = budget * GIB * (1 - FRAGMENTATION) - claimed
    chunk = min(memory.head_chunk(keeps), max(spare, CHUNK_BYTES))
    return Plan(
        memory.batch,
        memory.seq,
        tuple(keeps),
        on_host,
        peak / GIB,
        budget,
        {name: value / GIB for name, value in parts.items()},
        int(chunk),
        claimed / GIB,
    )


def _tiles(memory: StepMemory) -> list[int | None]:
    """Rows the MLP may work on at a time, None for all at once."""
    whole: list[int | None] = [None] if memory.rows <= max(_TILES) else []
    return whole + [tile for tile in _TILES if tile < memory.rows]


def _options(tile: int | None, offload: bool) -> list[Keep]:
    """The policies, from the least kept to the most; the products of an MLP are kept whole."""
    return [
        replace(keep, tile_tokens=None if keep.gate else tile, offload=offload)
        for keep in POLICIES.values()
    ]


def _candidates(
    memory: StepMemory, options: list[Keep], on_host: bool, budget: float
) -> Iterator[list[Keep]]:
    """Choices for all layers that fit the budget, one of them near the quickest.

    From the bottom up in the best steps, and two policies mixed, each two of them. The latter see
    to it that more memory costs no time: what a smaller budget holds, a larger one is offered too.
    """
    num_layers, seq = memory.sizes.num_layers, memory.seq
    keeps = [options[0]] * num_layers
    if memory.claimed(keeps, on_host) <= budget:
        yield _upgraded(memory, keeps, options, on_host, budget)
    seconds = [extra_seconds(memory.sizes, seq, option) for option in options]
    quickest = math.inf
    for upper in reversed(range(len(options))):
        whole = [options[upper]] * num_layers
        if memory.claimed(whole, on_host) <= budget:
            yield whole
            quickest = min(quickest, seconds[upper] * num_layers)
            continue
        for lower in range(upper):
            keeps = [options[lower]] * num_layers
            # No layer is quicker than at the upper one.
            if seconds[upper] * num_layers >= quickest or memory.claimed(keeps, on_host) > budget:
                continue
            count = _most(memory, keeps, options[upper], num_layers, on_host, budget)
            yield _raised(keeps, options[upper], count)


def _upgraded(
    memory: StepMemory, keeps: list[Keep], options: list[Keep], on_host: bool, budget: float
) -> list[Keep]:
    """Policies raised, last layers first, while the peak stays within the budget."""
    base = keeps[0]
    for target in _worthwhile(memory, options):
        count = _most(memory, keeps, target, len(keeps), on_host, budget)
        keeps = _raised(keeps, target, count)
        if count < len(keeps):
            break
    # Layers that could not take a whole step up may take a part of it.
    for target in reversed(options[1:]):
        rest = sum(keep == base for keep in keeps)
        lower, upper = keeps[:rest], keeps[rest:]
        count = _most(memory, keeps, target, rest, on_host, budget)
        keeps = _raised(lower, target, count) + upper
    return keeps


def _most(
    memory: StepMemory,
    keeps: list[Keep],
    target: Keep,
    num_layers: int,
    on_host: bool,
    budget: float,
) -> int:
    """How many of the first `num_layers`, their last ones first, can be raised to `target`."""
    low, high = 0, num_layers
    while low < high:
        count = (low + high + 1) // 2
        trial = _raised(keeps[:num_layers], target, count) + keeps[num_layers:]
        if memory.claimed(trial, on_host) <= budget:
            low = count
        else:
            high = count - 1
    return low


def _raised(keeps: Sequence[Keep], target: Keep, count: int) -> list[Keep]:
    return [*keeps[: len(keeps) - count], *[target] * count]


def _worthwhile(memory: StepMemory, options: list[Keep]) -> list[Keep]:
    """Options above the first on the upper hull of (bytes, time saved): best steps first."""
    points = [(memory.kept_bytes(o), -extra_seconds(memory.sizes, memory.seq, o)) for o in options]
    hull, at = [], 0
    while at < len(options) - 1:
        slopes = [
            (points[i][1] - points[at][1]) / max(points[i][0] - points[at][0], 1)
            for i in range(at + 1, len(options))
        ]
        at += 1 + max(range(len(slopes)), key=lambda i: (slopes[i], i))
        hull.append(options[at])
    return hull


def extra_seconds(sizes: NetworkSizes, seq: int, keep: Keep) -> float:
    """Time a token of one layer costs beyond computing everything once."""
    products = 0.0
    if not keep.qkv:
        products += 2.0 * sizes.hidden * sizes.qkv
    if not keep.hidden:
        products += 2.0 * sizes.queries * sizes.hidden
    products += 2.0 * sizes.hidden * sizes.ffn * ((not keep.gate) + (not keep.up))
    attention = 0.0 if keep.attention else 2.0 * seq * sizes.queries
    copies = 2.0 * StepMemory(sizes, 1, 1).movable_width(keep) * sizes.element * keep.offload
    mlp = 12.0 * sizes.hidden * sizes.ffn  # three products, forward and backward
    products += mlp * _TILES.get(keep.tile_tokens or 0, 0.0)
    replay = products / _PRODUCT_RATE + attention / _ATTENTION_RATE
    return replay + _UNHIDDEN * copies / _HOST_RATE


def is_host_bound(memory: StepMemory, share: float = 1.0) -> bool:
    """Whether the host needs at least this share of the device's time to launch a layer."""
    weights = sum(outputs * inputs for outputs, inputs in memory.sizes.stack_sizes)
    return share * 4.0 * weights * memory.rows / _PRODUCT_RATE < _HOST_SECONDS


def _recorded(memory: StepMemory, keeps: list[Keep], on_host: bool, budget: float) -> list[Keep]:
    """The layers replayed as CUDA graphs, where they may be and that fits with room to spare: a
    recording that runs out of memory cannot be tried again."""
    if keeps[0].offload or any(memory.sizes.dora):
        return keeps
    trial = [replace(keep, recorded=True) for keep in keeps]
    fits = memory.claimed(trial, on_host) * (1 + _RECORDING_SLACK) <= budget
    return trial if fits else keeps


def _fill_with_residents(
    memory: StepMemory, keeps: list[Keep], on_host: bool, budget: float
) -> list[Keep]:
    """As many layers kept unpacked as the rest of the budget holds, where that saves anything."""
    if not memory.sizes.quantized or memory.sizes.fp8:  # products in 8 bits read nothing unpacked
        return keeps
    if keeps[0].recorded:
        budget /= 1 + _RECORDING_SLACK
    best = keeps
    for count in range(1, len(keeps) + 1):
        trial = [replace(keep, resident=i < count) for i, keep in enumerate(keeps)]
        if memory.claimed(trial, on_host) > budget:
            break
        best = trial
    return best
