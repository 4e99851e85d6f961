"""`sloth train MODEL DATA`: every setting is a flag, or comes from `--config`; flags win."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from sloth.commands import launch
from sloth.commands.arguments import config_path, spell_out_resume
from sloth.commands.base import Loaded, Loading, ModelName, parse, print_rows, show
from sloth.lora_config import LoraConfig
from sloth.quiet import give_up_on_broken, tell
from sloth.redact import Redactor
from sloth.train.config import TrainConfig, load_config, with_overrides
from sloth.train.other_names import refuse_other_names

if TYPE_CHECKING:
    from sloth.model import Model
    from sloth.train.memory import Plan
    from sloth.train.records import TrainReport


class Settings(TrainConfig):
    """Flags of the same names as TrainConfig's fields and keys of its YAML; any --lora.* flag
    attaches an adapter.
    """

    # An optional block would become a subcommand, so here it is always there.
    lora: LoraConfig = Field(default=LoraConfig())
    eval_data: str | None = Field(
        default=None, description=TrainConfig.model_fields["eval_data"].description
    )


@dataclass(frozen=True)
class Train:
    """Fine-tune MODEL on DATA: chats, prompts and completions, or texts."""

    model: ModelName
    data: tyro.conf.Positional[str]
    """JSONL, JSON, CSV, TXT or Parquet file, a folder with train and valid files, or
    hf://datasets/OWNER/NAME."""
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML file of settings; flags win over it."""
    dry_run: bool = False
    """Print what would be done (rows, steps, memory, kernel level, where each setting came from)
    and stop."""
    gpus: int | None = None
    """Train on so many GPUs of this machine, a process each; the curve is that of one."""
    loading: Loaded = field(default_factory=Loading)


def run(arguments: Sequence[str]) -> int:
    """Fine-tune a model."""
    arguments = spell_out_resume(arguments)
    parsed, config = _read(arguments)
    if launch.is_rank():
        if parsed.gpus is not None:
            launch.check_size(parsed.gpus)
        launch.take_device(parsed.loading.device)
    elif parsed.gpus is not None and parsed.gpus > 1 and not parsed.dry_run:
        return launch.run_ranks(parsed.gpus, parsed.loading.device, arguments)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if parsed.dry_run:
        _show_plan(parsed.loading.load(parsed.model, config.quant, config), parsed, config)
        return 0
    try:
        report = _train(parsed, config)
        if launch.is_first():
            tell(_outcome(report), sys.stdout)
    finally:  # a training that is done is done, whoever has heard of it
        give_up_on_broken(sys.stdout, sys.stderr)
    return 0


def _outcome(report: TrainReport) -> str:
    last = report.losses[-1] if report.losses else float("nan")
    said = (
        f"{len(report.losses)} steps, {report.tokens} tokens, {report.seconds:.0f} s, "
        f"loss {last:.4f}"
    )
    paths = (f"{name:>12}  {path}" for name, path in report.paths.items())
    return "\n".join((said, *paths))


def _train(parsed: Train, config: TrainConfig) -> TrainReport:
    """Load and train; a rank that fails on the way ends all of them."""
    from sloth.machine import resolve_device
    from sloth.train.ranks import Ranks

    with Ranks.of_process(resolve_device(parsed.loading.device)) as ranks:
        model = ranks.together(lambda: parsed.loading.load(parsed.model, config.quant, config))
        return model.train(parsed.data, config)


def _read(arguments: Sequence[str]) -> tuple[Train, TrainConfig]:
    """The flags, and the settings that they and the file come to."""
    flags_given = (a.removeprefix("--").split("=")[0] for a in arguments if a.startswith("--"))
    refuse_other_names(name.replace("-", "_") for name in flags_given)
    from_file = load_config(config_path(arguments))
    wants_lora = from_file.lora is not None or any(a.startswith("--lora.") for a in arguments)
    values = {name: getattr(from_file, name) for name in TrainConfig.model_fields}
    if "--help" in arguments or "-h" in arguments:  # which shows the file's settings as defaults
        values = {name: Redactor().value(value) for name, value in values.items()}
    shown = Settings.model_construct(**{**values, "lora": from_file.lora or LoraConfig()})
    parsed = parse(Train, "train", arguments, Train(tyro.MISSING, tyro.MISSING, shown))
    if parsed.gpus is not None and parsed.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {parsed.gpus}")
    flags = {name: getattr(parsed.settings, name) for name in TrainConfig.model_fields}
    flags["lora"] = parsed.settings.lora if wants_lora else None
    changed = {name: value for name, value in flags.items() if value != getattr(from_file, name)}
    return parsed, with_overrides(from_file, changed, origin="flag")


def _show_plan(model: Model, parsed: Train, config: TrainConfig) -> None:
    """What a run would do, the memory it would take, and where each setting came from."""
    from sloth.train.trainer import Trainer

    trainer = Trainer(model, parsed.data, config)
    rows = trainer.dry_run()
    if parsed.gpus is not None:
        rows["processes"] = f"{parsed.gpus}, which share the rows of a step"
    plan = _predicted(model, *trainer.data.pass_shape(config.batch_size), config)
    print_rows(rows)
    show(f"\nmemory of the largest pass\n{plan}")
    if plan.budget_gib is not None:
        show(f"fits          {'yes' if plan.fits else 'no; smaller passes will be tried'}")
    show("\nsettings")
    print_rows(_settings(config))


def _predicted(model: Model, batch: int, seq: int, config: TrainConfig) -> Plan:
    """What a pass of this shape will take, within the budget that the settings state, if any."""
    from sloth.planning import host_share_gib, predict
    from sloth.train.memory import make_plan
    from sloth.train.network_sizes import NetworkSizes

    if config.memory_gib is None:
        return predict(model, batch, seq, config.optimizer)
    sizes = NetworkSizes.of(model.network)
    return make_plan(sizes, batch, seq, config.memory_gib, host_share_gib())


def _settings(config: TrainConfig) -> dict[str, str]:
    """Every setting with where it came from; an adapter's each on a line."""
    origins = {
        **config.origins(),
        **{f"lora.{name}": where for name, where in config.lora_origins().items()},
    }
    rows = {}
    for name, value in Redactor().value(config.plain()).items():
        flat = {f"{name}.{k}": v for k, v in value.items()} if name == "lora" and value else {}
        for key, shown in (flat or {name: value}).items():
            rows[f"  {key}"] = f"{shown!s:<24}  {origins[key]}"
    return rows
