"""The same step in Hugging Face transformers + PEFT + bitsandbytes.

--variant checkpoint turns gradient checkpointing on (what most people run); default is off.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.common import ALPHA, LEARNING_RATE, RANK, arguments, measure, random_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    args = arguments(__doc__ or "")
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    if args.variant == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    tokens = random_batch(model.config.vocab_size, args.batch, args.length)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    measure(f"HF + PEFT + bitsandbytes {args.variant}".strip(), args, step, trainable)


if __name__ == "__main__":
    main()
