"""Why keys of an Axolotl file have no place in one of sloth."""

from __future__ import annotations

_KERNELS = "sloth picks its kernels itself; `sloth info` says which, --level changes it"
_MEMORY = "the planner decides what is kept and what is computed again; `sloth estimate` shows it"
_SHARDED = "every process holds the whole model; `sloth train --gpus N` shares out the rows"
_STEPS = "sloth counts in steps: save_steps, eval_steps"
NOTHING = "sloth has nothing like it"
_ACCOUNT = "set by the tracker's own environment variables"
REASONS = {
    "load_in_8bit": "sloth loads 16-bit or 4-bit (quant: nf4) bases",
    "chat_template": "rows are rendered with the template in the model's folder",
    "chat_template_jinja": "rows are rendered with the template in the model's folder",
    "trust_remote_code": "no code from a checkpoint is ever run",
    "saves_per_epoch": _STEPS,
    "evals_per_epoch": _STEPS,
    "save_strategy": _STEPS,
    "eval_strategy": _STEPS,
    "save_total_limit": "the newest checkpoints and the best one are kept",
    "logging_steps": "every step is in metrics.jsonl",
    "dataset_prepared_path": "prepared data are kept in SLOTH_CACHE",
    "pad_to_sequence_len": "rows are padded to their batch's longest, or not at all",
    "eval_sample_packing": "held-out rows are never packed",
    "group_by_length": "rows are read in random order",
    "special_tokens": "the tokenizer's own are used; model.add_tokens adds more in Python",
    "tokens": "model.add_tokens adds tokens, in Python",
    "hub_model_id": "`sloth push FOLDER OWNER/NAME` uploads when the run is over",
    "hub_strategy": "`sloth push FOLDER OWNER/NAME` uploads when the run is over",
    "optimizer": "sloth has adamw and adamw_8bit",
    "lr_scheduler": "sloth has linear, cosine, constant and wsd",
    "rl": "sloth has the objectives dpo and orpo",
    "loraplus_lr_embedding": "of LoRA+ alone; sloth's embedding_lr holds for embeddings in full",
    "use_wandb": "expected true or false",
    "batch_size": "follows from micro_batch_size and gradient_accumulation_steps",
    "model_type": "config.json says it",
    "tokenizer_type": "the files say it",
    "tf32": "products of fp32 matrices keep their precision",
    "wandb_name": _ACCOUNT,
    "wandb_entity": _ACCOUNT,
    "wandb_watch": _ACCOUNT,
    "wandb_log_model": _ACCOUNT,
    "wandb_mode": _ACCOUNT,
    "mlflow_tracking_uri": _ACCOUNT,
    "mlflow_run_name": _ACCOUNT,
    **dict.fromkeys(
        ("flash_attention", "sdp_attention", "xformers_attention", "flex_attention"), _KERNELS
    ),
    **dict.fromkeys(("eager_attention", "attn_implementation", "torch_compile"), _KERNELS),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "plugins"), _KERNELS),
    **dict.fromkeys(
        ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"),
        _MEMORY,
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version"), _SHARDED),
    **dict.fromkeys(("context_parallel_size", "tensor_parallel_size"), _SHARDED),
}
