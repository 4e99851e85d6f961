"""How long until the first step is done: loading a checkpoint, attaching LoRA, one step.

Kernels that this machine has compiled before are taken from Triton's cache; with TRITON_CACHE_DIR
naming an empty folder the first step compiles them all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sloth
from benchmarks.common import ALPHA, Clock, device_name, emit
from benchmarks.data import random_batch
from benchmarks.roofline import ModelShape


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quant", choices=("nf4",), help="quantise what is loaded")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    clock = Clock()
    model = sloth.load(args.folder, dtype=torch.bfloat16, quant=args.quant)
    load_s = clock.seconds()
    model.add_lora(sloth.LoraConfig(r=16, alpha=ALPHA))
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True)
    vocabulary = ModelShape.from_folder(args.folder).vocabulary
    batch = random_batch(vocabulary, args.batch, args.length, seed=0).to(model.device)
    clock = Clock()
    for step in ("first", "second"):
        model.loss(batch.tokens, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == "first":
            first_step_s, clock = clock.seconds(), Clock()
    emit(
        {
            **{"gpu": device_name(), "quant": args.quant},
            **{"batch": args.batch, "length": args.length},
            **{"load_s": round(load_s, 2), "first_step_s": round(first_step_s, 2)},
            "second_step_s": round(clock.seconds(), 2),
        }
    )


if __name__ == "__main__":
    main()
