"""Plans for a model that is loaded, and for one that is not: `Model.plan` and `sloth estimate`.

`train/memory.py` knows how; this file asks the device for its budget, remembers one plan for each
batch shape, and moves the embedding where the plan wants it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sloth.dtypes import resolve_dtype
from sloth.errors import BudgetTooSmall, UnsupportedConfig
from sloth.formats.hub import resolve
from sloth.kernels.context import Keep
from sloth.kernels.fp8 import check_base_compute
from sloth.linear import Linear, Projection
from sloth.lora import attach_lora
from sloth.lora_config import LoraConfig
from sloth.machine import free_host_gib
from sloth.models import ARCHITECTURES
from sloth.models.decoder import Decoder
from sloth.quant.linear4bit import Linear4bit
from sloth.train.memory import Plan, free_budget_gib, make_plan
from sloth.train.step_memory import NetworkSizes

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
        plan = make_plan(self._sizes, batch, seq, self._budget_gib(), _host_gib())
        if self.memory_gib is not None and not plan.fits:
            raise too_small(plan)
        self._plans[batch, seq] = plan = self._with_steady_residents(plan)
        self._move_embedding("cpu" if plan.embedding_on_host else self.network.device)
        return plan

    def _budget_gib(self) -> float | None:
        if self.memory_gib is not None:
            return self.memory_gib
        device = self.network.device
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        cap = int(fraction * total) if fraction < 1 else None
        reserved, allocated = (
            torch.cuda.memory_reserved(device),
            torch.cuda.memory_allocated(device),
        )
        return free_budget_gib(free, reserved, allocated, cap)

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


def _host_gib() -> float | None:
    free = free_host_gib()
    return None if free is None else _HOST_SHARE * free


def too_small(plan: Plan) -> BudgetTooSmall:
    """The error for a plan that does not fit its budget."""
    return BudgetTooSmall(
        f"{plan.batch} x {plan.seq} tokens need at least {plan.predicted_gib:.2f} GiB, the budget "
        f"is {plan.budget_gib:.2f} GiB. Fewer rows or shorter ones, a smaller LoRA rank, or "
        "quant='nf4' need less"
    )


def estimate(
    name: str | Path,
    *,
    seq: int,
    batch: int = 1,
    quant: str | None = None,
    lora: LoraConfig | None = None,
    memory_gib: float | None = None,
    dtype: str | torch.dtype = "bfloat16",
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
    base_compute: str | None = None,
) -> Plan:
    """The plan of a LoRA step and its predicted peak, from config.json alone: no weights are read.

    memory_gib: the budget; default: all of the first GPU, or no budget without one. quant: "nf4"
    for QLoRA; None as the files are. base_compute: as for `load`. Raises UnknownModel,
    UnsupportedConfig, NoTargets.
    """
    where = resolve(str(name), revision, weights=False).path
    network = _on_meta(where, quant, resolve_dtype(dtype, torch.device("cpu")), ignore_config)
    network.base_compute = check_base_compute(base_compute)
    attach_lora(network, lora or LoraConfig())
    if memory_gib is None and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        memory_gib = free_budget_gib(free, 0, 0, None)
    return make_plan(NetworkSizes.of(network), batch, seq, memory_gib, _host_gib())


def _on_meta(
    path: Path, quant: str | None, dtype: torch.dtype, ignore_config: Sequence[str]
) -> Decoder:
    hf_config: dict[str, Any] = _read_config(path)
    model_type = hf_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedConfig(
            f"model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    config_class, decoder_class = ARCHITECTURES[model_type]
    config = config_class.from_hf(hf_config, ignore_config)
    is_4bit = quant == "nf4" or bool(hf_config.get("quantization_config"))
    kind = Linear4bit if is_4bit else Linear

    def projection(_: str, in_features: int, out_features: int, bias: bool) -> Projection:
        return kind(in_features, out_features, bias)

    with torch.device("meta"):
        network = decoder_class(config, projection)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
    return network


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_file():
        from sloth.formats.gguf import GGUFFile

        return GGUFFile(path).config
    return json.loads((path / "config.json").read_text(encoding="utf-8"))
