"""What other trainers call the settings of a run. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

# What other trainers call these settings, for the "did you mean" of an unknown key.
ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "train_on_inputs": "train_on",
    "assistant_only_loss": "train_on",
    "column_mapping": "columns",
    "max_grad_norm": "clip",
    "output_dir": "output",
    "eval_dataset": "eval_data",
    "resume_from_checkpoint": "resume",
    "load_in_4bit": "quant",
    "optim": "optimizer",
    "report_to": "trackers",
    "loraplus_lr_ratio": "lora_plus",
    "neftune_noise_alpha": "neftune",
    "early_stopping_patience": "patience",
    "load_best_model_at_end": "load_best",
    "rl": "objective",
    "loss_type": "objective",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "beta",
    "eval_fraction": "val_set_size",
    "val_size": "val_set_size",
    "test_size": "val_set_size",
    "val_split_fraction": "val_set_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gpu_memory_limit": "memory_gib",
}


def refuse_other_names(flags: Iterable[str]) -> None:
    """Raise ValueError for the flag of a setting that sloth calls otherwise, with its name here."""
    for flag in flags:
        if flag in ELSEWHERE:
            said = ELSEWHERE[flag].replace("_", "-")
            raise ValueError(f"unknown flag --{flag.replace('_', '-')}; did you mean --{said}?")
