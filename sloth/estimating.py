"""What a run will need, from config.json alone: `sloth estimate`; and a full training that cannot
fit is refused before its weights are loaded.

The network is built on the meta device, where it has shapes and no memory, and planned like one
that is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from sloth.architecture import describe, meta_network
from sloth.dtypes import resolve_dtype
from sloth.formats.hub import resolve
from sloth.kernels.dispatch import has_twin
from sloth.kernels.fp8 import check_base_compute
from sloth.kernels.layer import require_fp8_blocks
from sloth.linear import Linear, Projection
from sloth.lora import attach_lora
from sloth.lora_config import LoraConfig
from sloth.models.decoder import Decoder
from sloth.planning import check_shape, host_share_gib
from sloth.quant.linear4bit import Linear4bit
from sloth.train.config import Optimizer, TrainConfig
from sloth.train.full_memory import full_plan, require_room, state_bytes_of
from sloth.train.memory import Plan, device_budget_gib, make_plan
from sloth.train.network_sizes import NetworkSizes


def estimate(
    name: str | Path,
    *,
    seq: int,
    batch: int = 1,
    quant: str | None = None,
    lora: LoraConfig | None = None,
    full: bool = False,
    memory_gib: float | None = None,
    dtype: str | torch.dtype = "bfloat16",
    optimizer: Optimizer = "adamw",
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
    base_compute: str | None = None,
) -> Plan:
    """The plan of a training step and its predicted peak; no weights are read or fetched.

    seq, batch: tokens of a row and rows of a forward pass. quant: "nf4" for QLoRA; None as the
    files are. lora: the adapter; full: none, every weight is trained. memory_gib: the budget;
    default: what the first GPU has free, or no budget without one. The plan's `fits` says whether
    it is enough. base_compute: as for `load`. Raises UnknownModel, UnsupportedConfig, NoTargets;
    ValueError for a setting that cannot be, as a full training of 4-bit weights; KernelUnavailable
    for sizes or an adapter that base_compute cannot take.
    """
    if quant not in (None, "nf4"):
        raise ValueError(f"quant must be None or 'nf4', got {quant!r}")
    if optimizer not in get_args(Optimizer):
        known = ", ".join(get_args(Optimizer))
        raise ValueError(f"optimizer {optimizer!r} is unknown; known: {known}")
    if lora is not None and not isinstance(lora, LoraConfig):
        raise ValueError(f"lora must be a LoraConfig or None, got {lora!r}")
    check_shape(batch, seq, memory_gib)
    where = resolve(str(name), revision, weights=False).path
    network, is_4bit = on_meta(
        where, quant, resolve_dtype(dtype, torch.device("cpu")), ignore_config
    )
    network.base_compute = check_base_compute(base_compute)
    if memory_gib is None and torch.cuda.is_available():
        memory_gib = device_budget_gib(torch.device("cuda"))
    if full:
        if is_4bit or lora is not None or base_compute is not None:
            with_lora = "lora" if lora is not None else "base_compute"
            given = "4-bit weights" if is_4bit and lora is None else with_lora
            raise ValueError(f"full training trains every weight, so {given} cannot be with it")
        return full_plan(network, batch, seq, memory_gib, optimizer)
    attach_lora(network, lora or LoraConfig())
    if network.base_compute is not None:
        require_fp8_blocks(network.model.layers)
    if not has_twin(network.model_type):
        return full_plan(network, batch, seq, memory_gib, optimizer)
    return make_plan(NetworkSizes.of(network), batch, seq, memory_gib, host_share_gib())


def refuse_full_training(
    name: str | Path,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> None:
    """Raise BudgetTooSmall where weights, masters, gradients and moments alone exceed the device.

    Says what an adapter would need instead. Nothing to refuse where the files are 4-bit: they are
    trained through an adapter.
    """
    where = resolve(str(name), revision, weights=False).path
    chosen = resolve_dtype(dtype, device)
    network, is_4bit = on_meta(where, None, chosen)
    if is_4bit:
        return

    def instead() -> str:
        adapter, in_4bit = (
            estimate(where, seq=config.max_length, quant=quant, dtype=chosen).predicted_gib
            for quant in (None, "nf4")
        )
        return (
            f"At {config.max_length} tokens a row a LoRA adapter (--lora.r 16) needs about "
            f"{adapter:.2f} GiB, with --quant nf4 {in_4bit:.2f} GiB"
        )

    require_room(state_bytes_of(network, config.optimizer), str(name), device, instead)


def on_meta(
    path: Path,
    quant: str | None,
    dtype: torch.dtype,
    ignore_config: Sequence[str] = (),
) -> tuple[Decoder, bool]:
    """The network of a folder or .gguf file without its weights, and whether it is in 4 bits."""
    described = describe(path, ignore_config)
    is_4bit = quant == "nf4" or described.is_quantized
    kind = Linear4bit if is_4bit else Linear

    def projection(_: str, in_features: int, out_features: int, bias: bool) -> Projection:
        return kind(in_features, out_features, bias)

    network = meta_network(described, projection)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.set_level("ops")
    return network, is_4bit
