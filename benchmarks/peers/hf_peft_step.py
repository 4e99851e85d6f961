"""The same step in Hugging Face transformers + PEFT, with bitsandbytes for NF4.

--variant checkpoint turns gradient checkpointing on; prepared has PEFT prepare the model, as its
guide to quantized bases says to: checkpointing, and all that is not in 4 bits in fp32
(https://huggingface.co/docs/peft/developer_guides/quantization). Packed rows go in with positions
that restart and no attention mask; transformers then builds the block-diagonal mask itself (its
padding-free form without flash-attn). Attention is torch's own where transformers allows it for the
model, else eager (Gemma 2, for its softcap), and then the row says so.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from benchmarks.common import ALPHA, DEVICE, TARGETS, Clock, arguments, measure
from benchmarks.data import Batch

VARIANTS = ("plain", "checkpoint", "prepared")


def run(name: str, args: argparse.Namespace) -> None:
    """Load with transformers, attach LoRA with PEFT, measure."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(args.folder))]
    attention = "sdpa" if kind._supports_sdpa else "eager"
    clock = Clock()
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.folder,
        dtype=torch.bfloat16,
        device_map={"": DEVICE.index or 0} if DEVICE.type == "cuda" else "cpu",
        attn_implementation=attention,
    )
    if args.variant == "prepared":
        if args.dtype != "nf4":
            raise SystemExit("PEFT prepares quantized bases; this one is in bf16")
        model = prepare_model_for_kbit_training(model)
    if args.variant == "checkpoint":
        # Without re-entrance the frozen embedding's output needs no gradient of its own.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=args.rank,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.train()
    load_s = clock.seconds()
    trainable = [p for p in model.parameters() if p.requires_grad]

    def loss_of(batch: Batch) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss: Tensor = model(
                input_ids=batch.tokens,
                labels=batch.labels,
                position_ids=batch.positions,
                use_cache=False,
            ).loss
        return loss

    setting = "" if attention == "sdpa" else f"attention {attention}: transformers has no other"
    measure(name, args, loss_of, trainable, load_s, setting)


if __name__ == "__main__":
    run("HF + PEFT", arguments(__doc__ or "", VARIANTS))
