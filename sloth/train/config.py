"""`TrainConfig`: every setting of a training run. Keyword arguments, flags and YAML are three
spellings of it.

Needs no torch, so that `sloth train --help` is quick. Unknown keys are refused with the nearest
known name, booleans are refused where a number is meant (YAML reads `yes` as one), and `lr: 2e-4`,
which YAML 1.1 reads as text, is taken as the number it looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from sloth.data.settings import ROW_FIELDS, OnLong, TrainOn
from sloth.lora_config import LoraConfig
from sloth.names import refuse_unknown
from sloth.train.other_names import ELSEWHERE
from sloth.train.yaml_file import read_yaml

Schedule = Literal["linear", "cosine", "constant", "wsd"]
Optimizer = Literal["adamw", "adamw_8bit"]
ObjectiveName = Literal["sft", "dpo", "orpo"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]

# What `allow_change` knows beside settings: what else a checkpoint holds of its run.
FINGERPRINTS = ("data", "base", "ranks", "level", "base_compute")


class TrainConfig(BaseModel):
    """Settings of one run. Raises pydantic's ValidationError (a ValueError) for any that cannot be.

    One optimizer step reads batch_size * grad_accum rows; the loss is divided by the trained
    tokens of the whole step, so how the rows are split between the two changes memory only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    output: Path | None = Field(
        default=None, description="Folder of the run; a new runs/<time> by default."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps at most.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Passes over the data at most; 1 when max_steps is not given either.",
    )
    batch_size: int = Field(default=4, ge=1, description="Rows of one forward pass.")
    grad_accum: int = Field(default=1, ge=1, description="Forward passes of one optimizer step.")
    max_length: int = Field(
        default=2048, ge=2, description="Tokens of an example at most; on_long says what then."
    )
    on_long: OnLong = Field(
        default="truncate",
        description="A longer example: truncate, split into pieces, drop, or error.",
    )
    packing: bool = Field(
        default=False,
        description="Put several examples into a row, each seeing only itself; a row is then "
        "max_length tokens.",
    )
    train_on: TrainOn = Field(
        default="assistant",
        description="assistant (all its turns; completions), last (its last turn), everything.",
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="Which column holds which field, as in prompt question completion answer.",
    )
    skip_bad: bool = Field(
        default=False,
        description="Leave malformed rows out and count them, rather than refuse the data.",
    )
    objective: ObjectiveName = Field(
        default="sft",
        description="sft (learn the rows), dpo or orpo (prefer chosen to rejected answers).",
    )
    beta: float = Field(default=0.1, gt=0, description="dpo, orpo: how much a preference weighs.")
    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    schedule: Schedule = Field(default="linear", description="Learning rate after warm-up.")
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which the rate rises to its peak."
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="The same as a share of all steps, rounded up."
    )
    optimizer: Optimizer = Field(
        default="adamw", description="adamw, or adamw_8bit (needs bitsandbytes)."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's decay, on matrices only.")
    embedding_lr: float | None = Field(
        default=None, gt=0, description="Peak rate of embedding and head, if not lr."
    )
    lora_plus: float | None = Field(
        default=None, gt=0, description="Rate of LoRA's B over that of A; LoRA+ advises 16."
    )
    neftune: float | None = Field(
        default=None, gt=0, description="Noise on embeddings while training; NEFTune advises 5."
    )
    clip: float | None = Field(
        default=1.0, gt=0, description="Largest gradient norm; None to not clip."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Of row order, dropout, new adapters.")
    eval_data: Any = Field(
        default=None, description="Held-out rows, evaluated at the end: of any kind that data are."
    )
    val_set_size: float | None = Field(
        default=None,
        gt=0,
        description="Held-out rows out of the data: their share (below 1) or number, by seed.",
    )
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="Rows of one evaluation pass; batch_size if none."
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="Evaluate (and sample) each so many steps, too."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations without a new lowest loss.",
    )
    load_best: bool = Field(
        default=False,
        description="At the end, go back to the weights with the lowest evaluation loss.",
    )
    sample_prompts: list[str] = Field(
        default=[], description="Answered greedily at each evaluation, for the log."
    )
    sample_tokens: int = Field(default=64, ge=1, description="Tokens of such an answer at most.")
    save_steps: int | None = Field(
        default=200, ge=1, description="Checkpoint each so many steps; None for the last step only."
    )
    resume: bool | Path = Field(
        default=False,
        description="Continue: True from the newest good checkpoint of output, or a folder.",
    )
    allow_change: list[str] = Field(
        default=[],
        description="Settings that may differ from the checkpoint's on resume, by name.",
    )
    trackers: list[Tracker] = Field(
        default=[], description="Where to log as well: tensorboard, wandb, trackio, mlflow."
    )
    project: str | None = Field(default=None, description="The trackers' project; sloth if none.")
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="Budget of plans (fused level); what the device has free if none.",
    )
    deterministic: bool = Field(
        default=False, description="Only algorithms that give the same bits each run."
    )
    max_bad_steps: int = Field(
        default=5,
        ge=1,
        description="Steps in a row with a NaN or infinite gradient that stop the run.",
    )
    lora: LoraConfig | None = Field(default=None, description="Adapter to attach before training.")
    quant: Literal["nf4"] | None = Field(default=None, description="Load the model in 4 bits.")

    # Of the settings that were given: where. See `origins`.
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            refuse_unknown(values, cls.model_fields, "setting", ELSEWHERE)
            lora = values.get("lora")
            if isinstance(lora, Mapping):
                refuse_unknown(lora, LoraConfig.model_fields, "lora setting")
        return values

    @field_validator(
        *("max_steps", "epochs", "batch_size", "grad_accum", "max_length", "lr", "warmup_steps"),
        *("weight_decay", "clip", "seed", "eval_steps", "save_steps", "max_bad_steps"),
        *("embedding_lr", "lora_plus", "neftune", "patience", "sample_tokens", "beta"),
        *("warmup_ratio", "val_set_size", "eval_batch_size", "memory_gib"),
        mode="before",
    )
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("expected a number, got a boolean")
        return value

    @field_validator("output", "resume")
    @classmethod
    def _of_home(cls, value: bool | Path | None) -> bool | Path | None:
        """No shell reads a YAML file: `~/runs` would be a folder of that name."""
        return value.expanduser() if isinstance(value, Path) else value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        refuse_unknown(columns or (), ROW_FIELDS, "field in columns")
        return columns

    @field_validator("eval_data")
    @classmethod
    def _is_source(cls, value: Any) -> Any:
        """A Path would make one slash of the two in hf://."""
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (int, float, bytes)):
            raise ValueError(f"expected a path or rows, got a {type(value).__name__}")
        return value

    @field_validator("val_set_size")
    @classmethod
    def _is_share_or_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("expected a share below 1, or a whole number of rows")
        return value

    @model_validator(mode="after")
    def _has_effect(self) -> TrainConfig:
        """What needs held-out rows is looked at once the data are there: they may bring some."""
        if self.eval_data is not None and self.val_set_size is not None:
            raise ValueError(
                f"val_set_size={self.val_set_size:g} takes held-out rows out of the data, and "
                "eval_data brings others; leave one of them out"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio:g} both say "
                "how long the warm-up is; leave one of them out"
            )
        if self.patience is not None and self.eval_steps is None:
            raise ValueError(f"patience={self.patience} has no effect without eval_steps")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        if self.pairs:
            for name in ("packing", "train_on"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with "
                        f"objective={self.objective!r}: pairs are compared one by one, on their "
                        "answers"
                    )
            if self.on_long == "split":
                raise ValueError(
                    f"on_long='split' cannot be with objective={self.objective!r}: half an answer "
                    "is preferred to nothing; choose truncate, drop or error"
                )
        elif self.beta != defaults["beta"]:
            raise ValueError(f"beta={self.beta:g} has no effect with objective={self.objective!r}")
        if self.sample_tokens != defaults["sample_tokens"] and not self.sample_prompts:
            raise ValueError(
                f"sample_tokens={self.sample_tokens} has no effect without sample_prompts"
            )
        if self.project is not None and not self.trackers:
            raise ValueError(f"project={self.project!r} has no effect without trackers")
        if self.allow_change and not self.resume:
            raise ValueError(f"allow_change={self.allow_change} has no effect without resume")
        lora = (f"lora.{name}" for name in LoraConfig.model_fields)
        known = (*type(self).model_fields, *lora, *FINGERPRINTS)
        refuse_unknown(self.allow_change, known, "setting in allow_change")
        return self

    @property
    def pairs(self) -> bool:
        """Whether rows are preference pairs."""
        return self.objective != "sft"

    def __eq__(self, other: object) -> bool:
        """Equal settings are equal wherever they came from."""
        return isinstance(other, TrainConfig) and all(
            _equal(getattr(self, name), getattr(other, name)) for name in TrainConfig.model_fields
        )

    def origins(self) -> dict[str, str]:
        """Where each setting came from: the name of a file, flag, argument, or default."""
        return {
            name: self._origins.get(
                name, "argument" if name in self.model_fields_set else "default"
            )
            for name in TrainConfig.model_fields
        }

    def lora_origins(self) -> dict[str, str]:
        """The same of each of the adapter's settings."""
        given = self.lora.model_fields_set if self.lora is not None else ()
        whole = self.origins()["lora"]
        return {
            name: self._origins.get(f"lora.{name}", whole if name in given else "default")
            for name in LoraConfig.model_fields
        }

    def plain(self) -> dict[str, Any]:
        """The settings as JSON types, less an evaluation on rows that were given in memory."""
        if self.eval_data is None or isinstance(self.eval_data, str):
            return self.model_dump(mode="json")
        unnamed = {"eval_data", "patience", "load_best"}
        return self.model_dump(
            mode="json", exclude=unnamed if self.sample_prompts else {*unnamed, "eval_steps"}
        )


def _equal(a: Any, b: Any) -> bool:
    """Tables of rows are equal to themselves; they would compare cell by cell."""
    plain = (str, int, float, list, dict, Path, BaseModel)
    return bool(a == b) if isinstance(a, plain) and isinstance(b, plain) else a is b


def load_config(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The settings of a YAML file with `overrides` laid over it; `lora` is merged key by key.

    Raises ValueError for a file that cannot be read as settings.
    """
    values = read_yaml(Path(path).expanduser()) if path is not None else {}
    origins = dict.fromkeys(values, Path(path).name) if path is not None else {}
    for name, value in (overrides or {}).items():
        below = values.get(name)
        if name == "lora" and isinstance(below, Mapping) and isinstance(value, Mapping):
            origins |= {f"lora.{key}": origins["lora"] for key in below}
            origins |= {f"lora.{key}": "argument" for key in value}
            value = {**below, **value}
        values[name] = value
        origins[name] = "argument"
    return _from(origins, TrainConfig(**values))


def with_overrides(
    config: TrainConfig | None, overrides: Mapping[str, Any], origin: str = "argument"
) -> TrainConfig:
    """`config` (or the defaults) with some settings replaced, validated again. origin: where those
    came from.
    """
    base = config or TrainConfig()
    given = {name: getattr(base, name) for name in TrainConfig.model_fields}
    kept = {name: where for name, where in base.origins().items() if where != "default"}
    origins = {**dict.fromkeys(given, "default"), **kept, **dict.fromkeys(overrides, origin)}
    if isinstance(lora := overrides.get("lora"), LoraConfig):
        before, where = base.lora or LoraConfig(), base.lora_origins()
        for name in LoraConfig.model_fields:
            is_as_before = getattr(lora, name) == getattr(before, name)
            origins[f"lora.{name}"] = where[name] if is_as_before else origin
    return _from(origins, TrainConfig(**{**given, **overrides}))


def _from(origins: dict[str, str], config: TrainConfig) -> TrainConfig:
    config._origins.update(origins)
    return config
