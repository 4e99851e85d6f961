"""Sloth's side of a quality run: the public loss in a plain loop."""

from __future__ import annotations

import sloth
from benchmarks.quality.work import ALPHA, DEVICE, DTYPE, RANK, arguments, train


def main() -> None:
    args = arguments(__doc__ or "")
    model = sloth.load(args.work / "model", dtype=DTYPE, device=str(DEVICE))
    model.add_lora(r=RANK, alpha=ALPHA)
    model.network.train()
    train("sloth", args, model.loss, [p for p in model.network.parameters() if p.requires_grad])


if __name__ == "__main__":
    main()
