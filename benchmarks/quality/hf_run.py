"""The peer's side of a quality run: transformers, PEFT and bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import TARGETS
from benchmarks.quality.work import ALPHA, DEVICE, DTYPE, RANK, arguments, train


def main() -> None:
    args = arguments(__doc__ or "")
    place = 0 if DEVICE.type == "cuda" else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.work / "model", dtype=DTYPE, device_map={"": place}
    )
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.train()

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
        return loss

    train("hf", args, loss_of, [p for p in model.parameters() if p.requires_grad])


if __name__ == "__main__":
    main()
