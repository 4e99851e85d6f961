"""What makes two runs the same, and so may not change on resume."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sloth.train.config import TrainConfig
from sloth.train.schedule import depends_on_length

FINGERPRINT_NUMBERS = 16

# May differ between a run and its continuation: they say where and when to write, stop or evaluate.
_FREE = {
    *("output", "resume", "allow_change", "save_steps", "max_bad_steps", "trackers", "project"),
    *("eval_data", "eval_steps", "patience", "load_best", "sample_prompts", "sample_tokens"),
    *("eval_batch_size", "memory_gib"),
}
# Of an adapter, what its tensors depend on: a checkpoint of others cannot be put into them.
_SHAPES = {
    *("lora.r", "lora.targets", "lora.exclude", "lora.layers", "lora.rank_pattern"),
    *("lora.use_dora", "lora.modules_to_save", "lora.trainable_token_indices"),
}
# Compared as what they come to: the number of steps, the adapter in place, the base's weights.
_DERIVED = {"max_steps", "epochs", "lora", "quant"}


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same: settings, number of steps, data and base fingerprints,
    adapter, number of processes, and how products are computed (level and base_compute; a
    checkpoint of an older version does not say). eval_data: fingerprint of the held-out rows, which
    may change; what was measured on others is no yardstick then.
    """

    settings: dict[str, Any]
    num_steps: int
    data: str
    base: str
    lora: dict[str, Any] | None
    ranks: int = 1
    level: str | None = None
    base_compute: str | None = None
    eval_data: str | None = None


def refuse_changes(
    before: Identity, now: Identity, source: Path, allowed: Sequence[str] = ()
) -> list[str]:
    """Raise ValueError naming every difference with both values; return those that are allowed.

    A longer or shorter run is the same run only under a schedule that does not look at its length.
    A setting that a checkpoint of an older version lacks had today's default.
    """
    if (before.lora is None) != (now.lora is None):
        had, has = ("no adapter", "one") if before.lora is None else ("an adapter", "none")
        raise ValueError(
            f"cannot resume {source}: the run had {had} and this model has {has} (lora.r was "
            f"{(before.lora or {}).get('r')}, now {(now.lora or {}).get('r')}); "
            + (
                "train without an adapter, or start a new run"
                if before.lora is None
                else "attach it with the same settings (lora, or add_lora), or start a new run"
            )
        )
    defaults = TrainConfig().plain()
    pairs: list[tuple[str, str, Any, Any]] = []
    for name in sorted({*before.settings, *now.settings} - _FREE - _DERIVED):
        default = defaults.get(name)
        old, new = before.settings.get(name, default), now.settings.get(name, default)
        pairs.append((name, name, old, new))
    old, new = before.lora or {}, now.lora or {}
    for name in sorted({*old, *new}):
        pairs.append((f"lora.{name}", f"lora.{name}", old.get(name), new.get(name)))
    if depends_on_length(now.settings["schedule"], now.settings.get("warmup_ratio", 0.0)):
        said = "number of steps (max_steps, epochs)"
        pairs.append(("max_steps", said, before.num_steps, now.num_steps))
        pairs.append(("epochs", said, before.num_steps, now.num_steps))
    pairs.append(("data", "data (sha256 of its tokens)", before.data[:16], now.data[:16]))
    pairs.append(("base", "base weights (sha256 of samples)", before.base[:16], now.base[:16]))
    pairs.append(("ranks", "number of processes", before.ranks, now.ranks))
    if before.level is not None:
        pairs.append(("level", "kernel level", before.level, now.level))
        pairs.append(("base_compute", "base_compute", before.base_compute, now.base_compute))
    changes = {said: f"{said} was {a!r}, now {b!r}" for _, said, a, b in pairs if a != b}
    may_change = {said for name, said, _, _ in pairs if name in allowed}
    refused = [text for said, text in changes.items() if said not in may_change]
    if refused:
        names = sorted({name for name, said, a, b in pairs if a != b and said not in may_change})
        advice = f", or accept another curve with allow_change={names}"
        if _SHAPES.intersection(names):
            advice = "; an adapter of other tensors takes none of the checkpoint's"
        raise ValueError(
            f"cannot resume {source} with other settings: {'; '.join(refused)}. Give the old "
            f"values, or start a new run{advice}"
        )
    return list(changes.values())


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
