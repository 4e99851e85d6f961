"""An Axolotl file as settings of sloth: `sloth init --from axolotl.yml`.

Every key of the file ends in one of three places: a setting, an argument of the command line, or
the list of what was left, with a reason. Where a key is not in the file and the two programs'
defaults differ, Axolotl's is written down.
Source: Axolotl's configuration reference, https://docs.axolotl.ai/docs/config-reference.html
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sloth.commands.axolotl_reasons import NOTHING, REASONS

# Of keys that are not in the file, where sloth would do something else.
_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "num_epochs": 1.0,
    "sequence_len": 512,
    "excess_length_strategy": "drop",
    "lr_scheduler": "cosine",
    "weight_decay": 0.0,
}
# Its default warm-up: a share of the steps, up to so many.
_WARMUP_RATIO, _WARMUP_STEPS = 0.03, 100
# key -> setting of the same meaning and the same values.
_SAME = {
    "output_dir": "output",
    "max_steps": "max_steps",
    "num_epochs": "epochs",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "learning_rate": "lr",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_ratio",
    "eval_batch_size": "eval_batch_size",
    "weight_decay": "weight_decay",
    "embedding_lr": "embedding_lr",
    "loraplus_lr_ratio": "lora_plus",
    "neftune_noise_alpha": "neftune",
    "noisy_embedding_alpha": "neftune",
    "max_grad_norm": "clip",
    "seed": "seed",
    "early_stopping_patience": "patience",
    "load_best_model_at_end": "load_best",
    "resume_from_checkpoint": "resume",
}
_LORA = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_trainable_token_indices": "trainable_token_indices",
}
# key -> {value: (setting, value)}; None stands for what needs no setting, being so anyway.
_VALUES: dict[str, dict[Any, tuple[str, Any] | None]] = {
    "excess_length_strategy": {
        "drop": ("on_long", "drop"),
        "truncate": ("on_long", "truncate"),
        "raise": ("on_long", "error"),
    },
    "train_on_inputs": {
        False: ("train_on", "assistant"),
        True: ("train_on", "everything"),
    },
    "lr_scheduler": {
        **{name: ("schedule", name) for name in ("cosine", "linear", "constant")},
        "constant_with_warmup": ("schedule", "constant"),
        "warmup_stable_decay": ("schedule", "wsd"),
    },
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), ("optimizer", "adamw")),
        **dict.fromkeys(("adamw_hf", "adamw_apex_fused"), ("optimizer", "adamw")),
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), ("optimizer", "adamw_8bit")),
    },
    "auto_resume_from_checkpoints": {True: ("resume", True), False: None},
    "rl": {"dpo": ("objective", "dpo"), "orpo": ("objective", "orpo")},
    "load_in_4bit": {True: ("quant", "nf4"), False: None},
    "load_in_8bit": {False: None},
    "chat_template": {"tokenizer_default": None},
    "use_wandb": {True: ("trackers", "wandb"), False: None},
    "use_mlflow": {True: ("trackers", "mlflow"), False: None},
    "use_tensorboard": {True: ("trackers", "tensorboard"), False: None},
    "trust_remote_code": {False: None},
    "save_safetensors": {True: None},
    "lora_fan_in_fan_out": {False: None},
    "group_by_length": {False: None},
    "relora": {False: None},
    "fp16": {False: None},
    "bf16": {"auto": None},
    "strict": {False: None},
}
# Fields of a dataset that name a column -> sloth's field.
_COLUMNS = {
    "field": "text",
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
}
_FORMATS = ("chat_template", "sharegpt", "alpaca", "completion", "input_output")
# What a dataset may say that holds anyway. A list is compared as a list.
_AS_IT_IS: tuple[tuple[str, Any], ...] = (
    ("roles_to_train", ["assistant"]),
    ("train_on_eos", "turn"),
    ("split", "train"),
    ("ds_type", "json"),
)
# Paths that name how data_files are read.
_LOADERS = ("json", "csv", "parquet", "text")
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")


@dataclass
class Conversion:
    """What became of a file. settings: by sloth's names, from: the key each comes from; arguments:
    of `sloth train`; unneeded: keys that ask for what is so anyway; left: key -> why it has no
    place.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    unneeded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, key: str) -> None:
        """A setting; a second key of the same one is named too, a tracker joins those there."""
        if name == "trackers":
            there = self.settings.get(name, [])
            value = there if value in there else [*there, value]
        before = self.origins.get(name)
        self.settings[name] = value
        self.origins[name] = f"{before}, {key}" if before else key

    def command(self, config: str) -> str:
        """The `sloth train` to type."""
        given = dict(self.arguments)
        positional = [given.pop("MODEL", "MODEL"), given.pop("DATA", "DATA")]
        flags = [word for flag, value in given.items() for word in (flag, value)]
        return shlex.join(["sloth", "train", *positional, "--config", config, *flags])


def convert(file: Mapping[str, Any]) -> Conversion:
    """Settings of sloth for an Axolotl file that was read."""
    result = Conversion()
    for key, value in _DEFAULTS.items():
        if file.get(key) is None and not (key == "num_epochs" and file.get("max_steps")):
            _convert_key(result, key, value, f"{key}, Axolotl's default")
    _add_warmup(result, file)
    lora: dict[str, Any] = {}
    for key, value in file.items():
        if value is None or value == "" or value == [] or value == {}:
            result.left[key] = "empty"
        elif key in _LORA:
            lora[_LORA[key]] = value
        elif key in _SPECIAL:
            _SPECIAL[key](result, key, value)
        elif key == "lora_target_linear":
            continue  # with the adapter, below
        else:
            _convert_key(result, key, value, key)
    _add_lora(result, file, lora)
    _drop_without_effect(result)
    return result


def _add_warmup(result: Conversion, file: Mapping[str, Any]) -> None:
    """Axolotl's default. How many steps a share comes to is known only where the file says how many
    there are; else the share is written down, and where its limit would be.
    """
    if any(file.get(key) is not None for key in ("warmup_steps", "warmup_ratio")):
        return
    origin, steps = "warmup_steps, Axolotl's default", file.get("max_steps")
    if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
        result.set("warmup_steps", min(int(_WARMUP_RATIO * steps), _WARMUP_STEPS), origin)
        return
    result.set("warmup_ratio", _WARMUP_RATIO, origin)
    result.left["default warm-up"] = (
        f"Axolotl's is {_WARMUP_STEPS} steps at most; give warmup_steps to a run of more than "
        f"{round(_WARMUP_STEPS / _WARMUP_RATIO)} steps"
    )


def _convert_key(result: Conversion, key: str, value: Any, origin: str) -> None:
    known = _VALUES.get(key, {})
    if key in _SAME:
        result.set(_SAME[key], value, origin)
    elif isinstance(value, str | bool | int | float) and value in known:
        found = known[value]
        if found is not None:
            result.set(*found, origin)
        else:
            result.unneeded.append(key)
    else:
        shown = f"{value!r}: " if key in _VALUES else ""
        result.left[key] = shown + REASONS.get(key, NOTHING)


def _add_lora(result: Conversion, file: Mapping[str, Any], lora: dict[str, Any]) -> None:
    """The adapter's block, or a reason for each of its keys where there is none."""
    keys = [key for key in file if key in _LORA or key == "lora_target_linear"]
    kind = file.get("adapter")
    if kind not in ("lora", "qlora"):
        why = "there is no adapter" if not kind else f"adapter {kind!r} is unknown to sloth"
        result.left |= {key: why for key in keys if key not in result.left}
        return
    if file.get("lora_target_linear"):
        lora["targets"] = "all-linear"
    if kind == "qlora":
        result.set("quant", "nf4", "adapter")
    result.set("lora", lora, f"adapter, {', '.join(keys)}" if keys else "adapter")


def _drop_without_effect(result: Conversion) -> None:
    """Settings that sloth refuses as having no effect beside the others."""
    given = result.settings
    held_out, pairs = "eval_data" in given or "val_set_size" in given, "objective" in given
    no_rows = "there are no held-out rows yet; add it with eval_data or val_set_size"
    evaluating = ("eval_steps", "patience", "load_best", "eval_batch_size")
    refused = {name: no_rows for name in evaluating if not held_out}
    if held_out and "eval_steps" not in given:
        refused["patience"] = "it counts evaluations: add it with eval_steps"
    if "eval_data" in given:
        refused["val_set_size"] = "test_datasets are held out already"
    if pairs:
        refused |= dict.fromkeys(("packing", "train_on"), "pairs are compared one by one")
    else:
        refused["beta"] = "it weighs preferences, and the objective is sft"
    for name in refused.keys() & result.settings.keys():
        del result.settings[name]
        result.left[result.origins.pop(name)] = refused[name]


def _adapter(result: Conversion, key: str, value: Any) -> None:
    if value not in ("lora", "qlora"):
        result.left[key] = f"{value!r}: sloth has lora and qlora; without one it trains in full"


def _model(result: Conversion, key: str, value: Any) -> None:
    result.arguments["MODEL"] = str(value)


def _flag(flag: str) -> Callable[[Conversion, str, Any], None]:
    def take(result: Conversion, key: str, value: Any) -> None:
        result.arguments[flag] = str(value)

    return take


def _dtype(result: Conversion, key: str, value: Any) -> None:
    if value is True:
        result.arguments["--dtype"] = "float16" if key in ("fp16", "float16") else "bfloat16"
    elif value in (False, "auto"):
        result.unneeded.append(key)
    else:
        result.left[key] = f"{value!r}: sloth computes in bfloat16, float16 or float32 (--dtype)"


def _count(result: Conversion, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        result.left[key] = f"{value!r}: expected a number of steps"
    elif 0 < value < 1:
        result.left[key] = f"{value:g} is a share of the run, and sloth counts in steps"
    else:
        result.set(key, value, key)


def _held_out(result: Conversion, key: str, value: Any) -> None:
    if value == 0:
        result.unneeded.append(key)
    else:
        result.set(key, value, key)


def _project(result: Conversion, key: str, value: Any) -> None:
    tracker = "mlflow" if key.startswith("mlflow") else "wandb"
    result.set("trackers", tracker, key)
    result.set("project", value, key)


def _beta(result: Conversion, key: str, value: Any) -> None:
    result.set("beta", value, key)


def _datasets(result: Conversion, key: str, value: Any) -> None:
    """The first goes to the command line; what it says of columns becomes `columns`."""
    sets = value if isinstance(value, list) else [value]
    for index, one in enumerate(sets):
        if not isinstance(one, Mapping) or not one.get("path"):
            result.left[f"{key}[{index}]"] = "no path"
        elif index:
            result.left[f"{key}[{index}]"] = (
                f"{one['path']}: a run reads one file or one folder; put the rows together"
            )
        else:
            _dataset(result, f"{key}[0]", key, one)


def _dataset(result: Conversion, place: str, key: str, one: Mapping[str, Any]) -> None:
    path, files = str(one["path"]), one.get("data_files")
    files = files if isinstance(files, list) else [files] if files else []
    takes_file = path in _LOADERS and len(files) == 1
    path = str(files[0]) if takes_file else path
    is_local = takes_file or Path(path).suffix in _DATA_SUFFIXES or path.startswith((".", "/", "~"))
    name = path if is_local or Path(path).exists() else f"hf://datasets/{path}"
    if key == "datasets":
        result.arguments["DATA"] = name
    else:
        result.set("eval_data", name, key)
    columns = {_COLUMNS[k]: str(v) for k, v in one.items() if k in _COLUMNS and v}
    if columns and key == "datasets":
        result.set("columns", columns, f"{place}.{', '.join(k for k in one if k in _COLUMNS)}")
    for name, value in one.items():
        is_path = name == "path" or (name == "data_files" and takes_file)
        if is_path or (name in _COLUMNS and key == "datasets"):
            continue
        if (name, value) in _AS_IT_IS or (name == "type" and str(value).split(".")[0] in _FORMATS):
            result.unneeded.append(f"{place}.{name}")
        else:
            why = "the rows tell; `sloth data check` shows what" if name == "type" else NOTHING
            result.left[f"{place}.{name}"] = f"{value!r}: {why}"


_SPECIAL: dict[str, Callable[[Conversion, str, Any], None]] = {
    "base_model": _model,
    "revision_of_model": _flag("--revision"),
    "lora_model_dir": _flag("--adapter"),
    "adapter": _adapter,
    "bf16": _dtype,
    "bfloat16": _dtype,
    "fp16": _dtype,
    "float16": _dtype,
    "save_steps": _count,
    "eval_steps": _count,
    "val_set_size": _held_out,
    "wandb_project": _project,
    "mlflow_experiment_name": _project,
    "rl_beta": _beta,
    "dpo_beta": _beta,
    "orpo_alpha": _beta,
    "datasets": _datasets,
    "test_datasets": _datasets,
}
