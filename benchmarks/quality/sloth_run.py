"""Sloth's side of a quality run: the public loss in a plain loop."""

from __future__ import annotations

import sloth
from benchmarks.quality.work import ALPHA, DEVICE, DTYPE, RANK, arguments, train
from sloth.lora import draw_lora


def run(name: str, description: str, base_compute: str | None = None) -> None:
    """One run under a name; base_compute as in `sloth.load`."""
    args = arguments(description)
    model = sloth.load(
        args.work / "model", dtype=DTYPE, device=str(DEVICE), base_compute=base_compute
    )
    model.add_lora(r=RANK, alpha=ALPHA)
    draw_lora(model.network, args.seed)
    model.network.train()
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    train(name, args, model.loss, trainable, model.network.as_stored)


if __name__ == "__main__":
    run("sloth", __doc__ or "")
