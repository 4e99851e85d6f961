"""One QLoRA step of sloth: the public loss, ordinary autograd, a stock optimizer."""

from __future__ import annotations

import torch

import sloth
from benchmarks.common import ALPHA, LEARNING_RATE, RANK, arguments, measure, random_batch


def main() -> None:
    args = arguments(__doc__ or "")
    model = sloth.load(args.folder, level=args.variant or "auto")
    model.add_lora(sloth.LoraConfig(r=RANK, alpha=ALPHA))
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    tokens = random_batch(model.config.vocab_size, args.batch, args.length)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(tokens, tokens)
        loss.backward()
        optimizer.step()
        return loss.detach()

    measure(f"sloth ({model.level})", args, step, trainable)


if __name__ == "__main__":
    main()
