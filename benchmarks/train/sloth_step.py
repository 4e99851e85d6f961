"""One LoRA step of sloth: the public loss, ordinary autograd, a stock optimizer.

--variant is a kernel level (auto, fused, ops, reference), fp8: base_compute="fp8", or dora: the
adapter scales rows to trained lengths as well. --memory-gib caps what the process may allocate, and
is handed to the planner, which then decides what the backward keeps; without it the planner takes
what is free. A folder with config.json alone stands for random 4-bit weights made on the device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sloth
from benchmarks.common import ALPHA, DEVICE, Clock, arguments, measure
from benchmarks.data import Batch
from tools.random_checkpoint import random_model


def model_of(folder: Path, variant: str) -> Any:
    """The base of a folder, computed as a variant says."""
    special: dict[str, dict[str, Any]] = {"fp8": {"base_compute": "fp8"}, "dora": {}}
    how = special.get(variant, {"level": variant})
    if list(folder.glob("*.safetensors")):
        return sloth.load(folder, dtype=torch.bfloat16, **how)
    return random_model(folder, DEVICE.type, **how)


def main() -> None:
    args = arguments(__doc__ or "", ("auto", "fused", "ops", "reference", "fp8", "dora"))
    clock = Clock()
    model = model_of(args.folder, args.variant)
    use_dora = args.variant == "dora"
    model.add_lora(sloth.LoraConfig(r=args.rank, alpha=ALPHA, use_dora=use_dora))
    setting = f"level {model.level}"
    # Asked for, not assumed: the suite also measures revisions that have no planner yet.
    plan = getattr(model, "plan", None)
    if plan is not None and model.level == "fused":
        chosen = plan(batch=args.batch, seq=args.length, memory_gib=args.memory_gib)
        if args.packed:  # never recorded: documents differ from batch to batch
            keeps = tuple(replace(keep, recorded=False) for keep in chosen.keeps)
            chosen = replace(chosen, keeps=keeps)
        # The host is timed on fewer tokens, and launches what it launches here.
        model.network.planner = lambda batch, seq: chosen.keeps
        model.network.head_chunk_bytes = getattr(chosen, "head_chunk_bytes", None)
        headlines = str(chosen).split("\n  ")[0]  # what follows, indented, are the peak's parts
        setting += ", " + " ".join(headlines.split())
    load_s = clock.seconds()
    trainable = [p for p in model.network.parameters() if p.requires_grad]

    def loss_of(batch: Batch) -> Tensor:
        return model.loss(batch.tokens, batch.labels, batch.positions)

    measure("sloth", args, loss_of, trainable, load_s, setting)


if __name__ == "__main__":
    main()
