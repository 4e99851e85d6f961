"""The plans of a model that is loaded: `Model.plan`. (Of one that is not: estimating.py.)

`train/memory.py` knows how; this file asks the device for its budget, remembers one plan for each
batch shape, and moves the embedding where the plan wants it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sloth.constants import GIB
from sloth.errors import BudgetTooSmall
from sloth.kernels.context import POLICIES, Keep
from sloth.machine import free_host_gib, processes_here
from sloth.models.decoder import Decoder
from sloth.train.full_memory import full_plan
from sloth.train.memory import Plan, device_budget_gib, make_plan, require_rows, with_residents
from sloth.train.network_sizes import NetworkSizes

if TYPE_CHECKING:
    from sloth.model import Model
    from sloth.train.config import Optimizer

# Of the host's free memory, what a plan may pin.
_HOST_SHARE = 0.8
# Lengths are planned for in steps of it, so that rows of many lengths share their plans.
_BUCKET_TOKENS = 256
# Of a trained element, AdamW's two moments, which belong to a step but to no module.
_MOMENT_BYTES = 8


class Planner:
    """The plans of one network, by batch shape; made on first use and forgotten on a change.

    What belongs to the network and not to a shape, how many layers stay unpacked and where the
    embedding is, is settled by the tightest plan so far: shapes that take turns change nothing.
    """

    def __init__(self, network: Decoder) -> None:
        self.network = network
        self.memory_gib: float | None = None
        self._sizes: NetworkSizes | None = None
        self._plans: dict[tuple[int, int], Plan] = {}
        self._forward_tiles: dict[tuple[int, int], int | None] = {}
        self._num_resident: int | None = None
        self._embedding_on_host = False

    def forget(self) -> None:
        """After an adapter came or went: sizes and plans are those of another network."""
        self._sizes, self._num_resident, self._embedding_on_host = None, None, False
        self._plans.clear()
        self._forward_tiles.clear()
        self.network.head_chunk_bytes = None
        self.network.release()

    def keeps(self, batch: int, seq: int) -> Sequence[Keep]:
        """What each layer keeps for a batch of this shape; nothing where no backward follows. The
        network's head takes its chunks from the same plan."""
        bucket = batch, -(-seq // _BUCKET_TOKENS) * _BUCKET_TOKENS
        if not torch.is_grad_enabled():
            return self._forward_only(bucket)
        plan = self._known(batch, seq, bucket[1]) or self._new(batch, seq, bucket[1])
        self.network.head_chunk_bytes = plan.head_chunk_bytes
        return plan.keeps

    def _known(self, batch: int, seq: int, longest: int) -> Plan | None:
        """A plan of before for this length, or for a longer one up to `longest`: rows that are
        shorter than what was planned for fit."""
        shapes = [s for s in self._plans if s[0] == batch and seq <= s[1] <= longest]
        return self._plans[min(shapes)] if shapes else None

    def _new(self, batch: int, seq: int, longest: int) -> Plan:
        """A plan for `longest`, or for this length alone where only that fits."""
        try:
            return self.plan(batch, longest)
        except BudgetTooSmall:
            if seq == longest:
                raise
            return self.plan(batch, seq)

    def set_budget(self, memory_gib: float | None, batch: int, seq: int) -> Plan:
        """A budget from here on, and its plan for a shape. Where it is refused (BudgetTooSmall) or
        is none (ValueError), the one of before stays, and so do its plans."""
        check_shape(batch, seq, memory_gib)
        before, self.memory_gib = self.memory_gib, memory_gib
        try:
            self._checked(self._make(batch, seq))
        except BudgetTooSmall:
            self.memory_gib = before
            raise
        self.forget()
        return self.plan(batch, seq)

    def plan(self, batch: int, seq: int) -> Plan:
        """Plan for a shape within the stated budget, else within the memory that is free now.

        Raises BudgetTooSmall where a stated budget cannot hold the smallest plan; warns where what
        is free may not.
        """
        plan = self._checked(self._make(batch, seq))
        if not plan.fits:
            warnings.warn(str(too_small(plan)), stacklevel=2)
        self._plans[batch, seq] = plan
        self._settle(plan)
        return self._plans[batch, seq]

    def _checked(self, plan: Plan) -> Plan:
        if self.memory_gib is not None and not plan.fits:
            raise too_small(plan)
        return plan

    @property
    def sizes(self) -> NetworkSizes:
        """Of the network, read when they are first asked for."""
        if self._sizes is None:
            self._sizes = NetworkSizes.of(self.network)
        return self._sizes

    def _make(self, batch: int, seq: int) -> Plan:
        locked = self.network.workspace.stash.pool.num_bytes
        return make_plan(self.sizes, batch, seq, self._budget_gib(), host_share_gib(locked))

    def _budget_gib(self) -> float | None:
        if self.memory_gib is not None:
            return self.memory_gib
        return device_budget_gib(self.network.device, own_bytes(self.network))

    def _settle(self, plan: Plan) -> None:
        """Layers that stay unpacked only ever become fewer, in every plan alike; an embedding that
        one plan wants in host memory stays there for the others."""
        wanted = sum(keep.resident for keep in plan.keeps)
        if self._num_resident is None or wanted < self._num_resident:
            self._num_resident = wanted
        for shape, known in self._plans.items():
            self._plans[shape] = with_residents(self.sizes, known, self._num_resident)
        self._embedding_on_host |= plan.embedding_on_host
        weight = self.network.model.embed_tokens.weight
        device = torch.device("cpu") if self._embedding_on_host else self.network.device
        if weight.device != device:
            weight.data = weight.data.to(device)

    def _forward_only(self, shape: tuple[int, int]) -> Sequence[Keep]:
        """The least that can be kept, with the MLP in tiles where a step's would be."""
        if shape not in self._forward_tiles:
            plan = self._plans.get(shape) or self._make(*shape)
            self._forward_tiles[shape] = plan.keeps[0].tile_tokens
        bare = replace(POLICIES["P1"], tile_tokens=self._forward_tiles[shape])
        unpacked, num_resident = replace(bare, resident=True), self._num_resident or 0
        num_layers = len(self.network.model.layers)
        return [unpacked if i < num_resident else bare for i in range(num_layers)]


def own_bytes(network: Decoder) -> int:
    """What a network's steps hold on its device already, of all that the process has allocated."""
    parameters = list(network.parameters())
    tensors = [*parameters, *network.buffers(), *(p.grad for p in parameters)]
    here = {t.data_ptr(): t.nbytes for t in tensors if t is not None and t.device == network.device}
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(here.values()) + network.workspace.num_bytes + _MOMENT_BYTES * trained


def host_share_gib(locked: int = 0) -> float | None:
    """What a plan may pin of the host's memory, None where the system does not say.

    locked: bytes that the network has pinned already.
    """
    free = free_host_gib()
    return None if free is None else _HOST_SHARE * (free + locked / GIB) / processes_here()


def too_small(plan: Plan) -> BudgetTooSmall:
    """The error for a plan that does not fit its budget."""
    needed = math.ceil(plan.needed_gib * 100) / 100  # what is said must be enough
    return BudgetTooSmall(
        f"{plan.batch} x {plan.seq} tokens need at least {needed:.2f} GiB, the budget is "
        f"{plan.budget_gib:.2f} GiB. Fewer rows or shorter ones, a smaller LoRA rank, or, where "
        "the base is not in 4 bits yet, quant='nf4' need less"
    )


def check_shape(batch: int, seq: int, memory_gib: float | None) -> None:
    """Raise ValueError for what is no shape of a batch, or no budget."""
    for name, value in (("batch", batch), ("seq", seq)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    require_rows(batch, seq)
    if memory_gib is None:
        return
    is_number = isinstance(memory_gib, int | float) and not isinstance(memory_gib, bool)
    if not is_number or not 0 < memory_gib < math.inf:
        raise ValueError(f"memory_gib must be a number above 0, or None, got {memory_gib!r}")


def predict(model: Model, batch: int, seq: int, optimizer: Optimizer) -> Plan:
    """What a step of a loaded model will take at the level it runs at. Changes nothing."""
    network = model.network
    budget = device_budget_gib(model.device, own_bytes(network))
    if model.level == "fused":
        return make_plan(NetworkSizes.of(network), batch, seq, budget, host_share_gib())
    return full_plan(network, batch, seq, budget, optimizer)
