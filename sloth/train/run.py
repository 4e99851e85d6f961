"""Around the loop: what a run may start from, where it writes, and what must stay on resume."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sloth.errors import AdapterMismatch, OutputExists
from sloth.train.checkpoint import newest_good, remove_unfinished
from sloth.train.config import TrainConfig
from sloth.train.schedule import depends_on_length

RUNS = Path("runs")
FINGERPRINT_NUMBERS = 16

# May differ between a run and its continuation: they say where and when to write, stop or look.
_FREE = {"output", "resume", "save_steps", "eval_data", "eval_steps", "max_bad_steps"}
# Compared as what they come to: the number of steps, the adapter in place, the base's weights.
_DERIVED = {"max_steps", "epochs", "lora", "quant"}

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same: settings, number of steps, data and base fingerprints,
    adapter.
    """

    settings: dict[str, Any]
    num_steps: int
    data: str
    base: str
    lora: dict[str, Any] | None


def refuse_changes(before: Identity, now: Identity, source: Path) -> None:
    """Raise ValueError naming every difference with both values.

    A longer or shorter run is the same run only under a schedule that does not look at its length.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for name in sorted({*before.settings, *now.settings} - _FREE - _DERIVED):
        pairs.append((name, before.settings.get(name), now.settings.get(name)))
    old, new = before.lora or {}, now.lora or {}
    for name in sorted({*old, *new}):
        pairs.append((f"lora.{name}", old.get(name), new.get(name)))
    if depends_on_length(now.settings["schedule"]):
        pairs.append(("number of steps (max_steps, epochs)", before.num_steps, now.num_steps))
    pairs.append(("data (sha256 of its tokens)", before.data[:16], now.data[:16]))
    pairs.append(("base weights (sha256 of samples)", before.base[:16], now.base[:16]))
    changed = [f"{name} was {a!r}, now {b!r}" for name, a, b in pairs if a != b]
    if changed:
        raise ValueError(
            f"cannot resume {source} with other settings: {'; '.join(changed)}. "
            "Give the old values, or start a new run"
        )


def check_model(model: Any, config: TrainConfig) -> None:
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


def claim_output(config: TrainConfig) -> tuple[Path, Path | None]:
    """Make the run's folder; return it and the checkpoint to resume from, or None.

    resume=True with no checkpoint yet starts from the beginning. Raises OutputExists for a folder
    that holds files, ValueError for a resume without a place, CheckpointMismatch for damaged
    checkpoints.
    """
    output, source = config.output, None
    if config.resume is True:
        if output is None:
            raise ValueError("resume=True needs output, the folder of the run to continue")
        source = newest_good(output)
    elif config.resume:
        place = Path(config.resume)
        source = newest_good(place)
        if source is None:
            raise ValueError(f"resume={str(place)!r}: no checkpoint there (a step-000123 folder)")
        output = output or source.parent
    output = output or _new_folder()
    continues = config.resume is True or (source is not None and source.parent == output)
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file; choose another output")
    if not continues and output.is_dir() and any(output.iterdir()):
        raise OutputExists(
            f"{output} exists and is not empty; choose another, or continue it with resume=True"
        )
    output.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output)
    return output, source


def write_settings(config: TrainConfig, output: Path) -> None:
    """config.yaml of the run, in the form that `--config` reads."""
    text = yaml.safe_dump(config.plain(), sort_keys=False)
    (output / "config.yaml").write_text(text, encoding="utf-8")


def base_fingerprint(network: nn.Module) -> str:
    """sha256 over the first numbers of every frozen tensor: tells bases apart without reading them
    whole.
    """
    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in network.named_parameters() if not p.requires_grad]
    for name, tensor in (*frozen, *network.named_buffers()):
        sample = tensor.detach().flatten()[:FINGERPRINT_NUMBERS].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return digest.hexdigest()


def publish_weights(model: Any, output: Path) -> dict[str, Path]:
    """Save output/adapter, or output/model after full training; a resumed run replaces its own."""
    name = "adapter" if model.has_adapter else "model"
    folder = output / name
    shutil.rmtree(folder, ignore_errors=True)
    if name == "adapter":
        model.save_adapter(folder)
    else:
        model.save_merged(folder)
    return {name: folder}


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


def _new_folder() -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = RUNS / f"{stem}{suffix}"
        if not folder.exists():
            return folder
    raise OutputExists(f"{RUNS} holds too many runs of this second; give output")
