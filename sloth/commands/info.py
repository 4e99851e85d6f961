"""`sloth info MODEL`: what a model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sloth.commands.base import ModelCommand, parse, print_rows
from sloth.constants import GIB


@dataclass(frozen=True, kw_only=True)
class Info(ModelCommand):
    """Show MODEL's config, parameters, memory, and the kernel level chosen and why."""


def run(arguments: Sequence[str]) -> int:
    """What a model is."""
    parsed = parse(Info, "info", arguments)
    model = parsed.load()
    from sloth.lora import count_parameters

    total, trainable = count_parameters(model.network)
    held = (*model.network.parameters(), *model.network.buffers())
    held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    kind = "NF4" if model.is_quantized else str(model.dtype).removeprefix("torch.")
    rows = {
        "model": model.name,
        "revision": model.revision or "(local files)",
        "parameters": f"{total:,}, of which trainable {trainable:,}",
        "memory": f"{held_bytes / GIB:.3f} GiB of weights on {model.device}",
        "stored as": kind,
        "adapter": "yes" if model.has_adapter else "no",
        "level": f"{model.level}: {model.level_reason}",
        "config": "",
    }
    print_rows(rows)
    print_rows({f"  {name}": value for name, value in model.config.to_hf().items()})
    return 0
