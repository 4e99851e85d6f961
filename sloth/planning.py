"""The plans of a model that is loaded: `Model.plan`. (Of one that is not: estimating.py.)

`train/memory.py` knows how; this file asks the device for its budget, remembers one plan for each
batch shape, and moves the embedding where the plan wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sloth.errors import BudgetTooSmall
from sloth.kernels.context import Keep
from sloth.machine import free_host_gib
from sloth.models.decoder import Decoder
from sloth.train.full_memory import full_plan
from sloth.train.memory import Plan, device_budget_gib, make_plan
from sloth.train.step_memory import NetworkSizes

if TYPE_CHECKING:
    from sloth.model import Model
    from sloth.train.config import Optimizer

# Of the host's free memory, what a plan may pin.
_HOST_SHARE = 0.6
# Lengths are planned for in steps of it, so that rows of many lengths share their plans.
_BUCKET_TOKENS = 256


class Planner:
    """The plans of one network, by batch shape; made on first use and forgotten on a change."""

    def __init__(self, network: Decoder) -> None:
        self.network = network
        self.memory_gib: float | None = None
        self._sizes: NetworkSizes | None = None
        self._plans: dict[tuple[int, int], Plan] = {}
        self._max_resident: int | None = None

    def forget(self) -> None:
        """After an adapter came or went: sizes and plans are those of another network."""
        self._sizes, self._max_resident = None, None
        self._plans.clear()
        self.network.release()

    def keeps(self, batch: int, seq: int) -> Sequence[Keep]:
        """What each layer keeps for a batch of this shape."""
        if (batch, seq) in self._plans:
            return self._plans[batch, seq].keeps
        bucket = -(-seq // _BUCKET_TOKENS) * _BUCKET_TOKENS
        if (batch, bucket) not in self._plans:
            self.plan(batch, bucket)
        return self._plans[batch, bucket].keeps

    def plan(self, batch: int, seq: int) -> Plan:
        """Plan for a shape within the stated budget, else within the memory that is free now.

        Raises BudgetTooSmall where a stated budget cannot hold the smallest plan.
        """
        if self._sizes is None:
            self._sizes = NetworkSizes.of(self.network)
        plan = make_plan(self._sizes, batch, seq, self._budget_gib(), host_share_gib())
        if self.memory_gib is not None and not plan.fits:
            raise too_small(plan)
        self._plans[batch, seq] = plan = self._with_steady_residents(plan)
        self._move_embedding("cpu" if plan.embedding_on_host else self.network.device)
        return plan

    def _budget_gib(self) -> float | None:
        if self.memory_gib is not None:
            return self.memory_gib
        return device_budget_gib(self.network.device)

    def _with_steady_residents(self, plan: Plan) -> Plan:
        """Layers that stay unpacked are chosen once and only ever become fewer."""
        wanted = sum(keep.resident for keep in plan.keeps)
        if self._max_resident is None or wanted <= self._max_resident:
            self._max_resident = wanted
            return plan
        return plan.with_residents(self._max_resident)

    def _move_embedding(self, device: str | torch.device) -> None:
        weight = self.network.model.embed_tokens.weight
        weight.data = weight.data.to(device)


def host_share_gib() -> float | None:
    """What a plan may pin of the host's memory, None where the system does not say."""
    free = free_host_gib()
    return None if free is None else _HOST_SHARE * free


def too_small(plan: Plan) -> BudgetTooSmall:
    """The error for a plan that does not fit its budget."""
    return BudgetTooSmall(
        f"{plan.batch} x {plan.seq} tokens need at least {plan.predicted_gib:.2f} GiB, the budget "
        f"is {plan.budget_gib:.2f} GiB. Fewer rows or shorter ones, a smaller LoRA rank, or "
        "quant='nf4' need less"
    )


def predict(model: Model, batch: int, seq: int, optimizer: Optimizer) -> Plan:
    """What a step of a loaded model will take at the level it runs at. Changes nothing."""
    network, budget = model.network, device_budget_gib(model.device)
    if model.level == "fused":
        return make_plan(NetworkSizes.of(network), batch, seq, budget, host_share_gib())
    return full_plan(network, batch, seq, budget, optimizer)
