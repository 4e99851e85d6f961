"""Around the loop: what a run may start from, its settings as a file, its generators."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from sloth.errors import AdapterMismatch
from sloth.redact import Redactor
from sloth.train.config import TrainConfig
from sloth.train.full_memory import check_memory
from sloth.train.optim import eight_bit_library
from sloth.train.run_folder import SETTINGS
from sloth.train.trackers import require_trackers
from sloth.train.trainable import Trainable

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def check_settings(model: Trainable, config: TrainConfig) -> None:
    """Raise ValueError, AdapterMismatch or BudgetTooSmall for settings that cannot be honoured
    here, whatever the data are.
    """
    check_model(model, config)
    check_device(config, model.device)
    check_memory(model, config)
    require_trackers(config.trackers)
    check_optimizer(config)


def check_model(model: Trainable, config: TrainConfig) -> None:
    """Raise ValueError or AdapterMismatch for settings that this model cannot honour."""
    if config.quant is not None and not model.is_quantized:
        raise ValueError(
            f"quant={config.quant!r} is decided when a model is loaded, and {model.name} is loaded "
            f"dense; use sloth.load({model.name!r}, quant={config.quant!r})"
        )
    if config.lora is not None and model.has_adapter and model.lora_config != config.lora:
        raise AdapterMismatch(
            f"the model already has an adapter ({model.lora_config!r}), other than the one in the "
            f"settings ({config.lora!r}); leave lora out to train on, or load the base again"
        )


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where deterministic=True could not hold: cuBLAS reads its setting once, at
    start.
    """
    if config.deterministic and device.type == "cuda" and _CUBLAS not in os.environ:
        raise ValueError(
            f"deterministic=True on a GPU needs the environment variable {_CUBLAS}=:4096:8 set "
            "before the process starts (the `sloth` command sets it)"
        )


def check_optimizer(config: TrainConfig) -> None:
    """Raise ValueError for an optimizer whose library is missing."""
    if config.optimizer == "adamw_8bit":
        eight_bit_library()


def write_settings(config: TrainConfig, output: Path) -> None:
    """config.yaml of the run, in the form that `--config` reads, without secrets: settings grouped
    by where they came from, defaults last.
    """
    by_origin: dict[str, dict[str, Any]] = {}
    for name, value in Redactor().value(config.plain()).items():
        by_origin.setdefault(config.origins()[name], {})[name] = value
    blocks = [
        f"# from {json.dumps(origin)}\n{yaml.safe_dump(by_origin[origin], sort_keys=False)}"
        for origin in sorted(by_origin, key=lambda origin: origin == "default")
    ]
    (output / SETTINGS).write_text("\n".join(blocks), encoding="utf-8")


@contextmanager
def seeded(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Inside: generators seeded, deterministic algorithms if asked for. Afterwards: as before."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)


@contextmanager
def planned_within(
    model: Trainable, memory_gib: float | None, batch: int, seq: int
) -> Iterator[None]:
    """Inside, plans keep to this budget, if there is one. Raises BudgetTooSmall where it does not
    hold one for this shape, KernelUnavailable below the fused level, which plans nothing.

    What layers prepared for the steps, recordings and unpacked matrices, is given back at the end.
    """
    before = model.planner.memory_gib
    try:
        if memory_gib is not None:
            model.plan(batch=batch, seq=seq, memory_gib=memory_gib)
        yield
    finally:
        model.planner.memory_gib = before
        model.planner.forget()
