"""Around the loop: what a run may start from, where it writes, and what must stay on resume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from sloth.errors import AdapterMismatch, OutputExists
from sloth.train.checkpoint import (
    checkpoints,
    is_good,
    newest_good,
    remove_unfinished,
    step_of,
)
from sloth.train.config import TrainConfig
from sloth.train.optim import eight_bit_library
from sloth.train.ranks import Ranks
from sloth.train.redact import Redactor
from sloth.train.schedule import depends_on_length

RUNS = Path("runs")
FINGERPRINT_NUMBERS = 16

# May differ between a run and its continuation: they say where and when to write, stop or look.
_FREE = {
    *("output", "resume", "allow_change", "save_steps", "max_bad_steps", "trackers", "project"),
    *("eval_data", "eval_steps", "patience", "load_best", "sample_prompts", "sample_tokens"),
}
# Compared as what they come to: the number of steps, the adapter in place, the base's weights.
_DERIVED = {"max_steps", "epochs", "lora", "quant"}

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same: settings, number of steps, data and base fingerprints,
    adapter, number of processes.
    """

    settings: dict[str, Any]
    num_steps: int
    data: str
    base: str
    lora: dict[str, Any] | None
    ranks: int = 1


def refuse_changes(
    before: Identity, now: Identity, source: Path, allowed: Sequence[str] = ()
) -> list[str]:
    """Raise ValueError naming every difference with both values; return those that are allowed.

    A longer or shorter run is the same run only under a schedule that does not look at its length.
    A setting that a checkpoint of an older version lacks had today's default.
    """
    defaults = TrainConfig().plain()
    pairs: list[tuple[str, str, Any, Any]] = []
    for name in sorted({*before.settings, *now.settings} - _FREE - _DERIVED):
        default = defaults.get(name)
        old, new = before.settings.get(name, default), now.settings.get(name, default)
        pairs.append((name, name, old, new))
    old, new = before.lora or {}, now.lora or {}
    for name in sorted({*old, *new}):
        pairs.append((f"lora.{name}", f"lora.{name}", old.get(name), new.get(name)))
    if depends_on_length(now.settings["schedule"]):
        said = "number of steps (max_steps, epochs)"
        pairs.append(("max_steps", said, before.num_steps, now.num_steps))
        pairs.append(("epochs", said, before.num_steps, now.num_steps))
    pairs.append(("data", "data (sha256 of its tokens)", before.data[:16], now.data[:16]))
    pairs.append(("base", "base weights (sha256 of samples)", before.base[:16], now.base[:16]))
    pairs.append(("ranks", "number of processes", before.ranks, now.ranks))
    changes = {said: f"{said} was {a!r}, now {b!r}" for _, said, a, b in pairs if a != b}
    may_change = {said for name, said, _, _ in pairs if name in allowed}
    refused = [text for said, text in changes.items() if said not in may_change]
    if refused:
        names = sorted({name for name, said, a, b in pairs if a != b and said not in may_change})
        raise ValueError(
            f"cannot resume {source} with other settings: {'; '.join(refused)}. Give the old "
            f"values, start a new run, or accept another curve with allow_change={names}"
        )
    return list(changes.values())


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


def check_optimizer(config: TrainConfig) -> None:
    """Raise ValueError for an optimizer whose library is missing."""
    if config.optimizer == "adamw_8bit":
        eight_bit_library()


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
    _refuse_branching(source, output)
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


def claim_once(config: TrainConfig, ranks: Ranks) -> tuple[Path, Path | None]:
    """`claim_output` in the first rank, its answer in all."""
    claimed: list[Path | None] = []
    ranks.first(lambda: claimed.extend(claim_output(config)))
    output, source = json.loads(ranks.tell(json.dumps([str(path or "") for path in claimed])))
    return Path(output), Path(source) if source else None


def _refuse_branching(source: Path | None, output: Path) -> None:
    """Raise ValueError for a continuation that newer checkpoints of its own folder would overrule
    the next time.
    """
    if source is None or source.parent != output:
        return
    newer = [path.name for path in checkpoints(output) if step_of(path) > step_of(source)]
    newer = [name for name in newer if is_good(output / name)]
    if newer:
        raise ValueError(
            f"{output} holds newer checkpoints than {source.name} ({', '.join(newer)}), and the "
            "newest one is resumed from; give another output, or delete them"
        )


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
    (output / "config.yaml").write_text("\n".join(blocks), encoding="utf-8")


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
