"""`sloth train MODEL DATA`: every setting is a flag, or comes from `--config`; flags win."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from sloth.commands.arguments import config_path, spell_out_resume
from sloth.commands.base import Loaded, Loading, ModelName, parse, print_rows
from sloth.lora_config import LoraConfig
from sloth.train.config import TrainConfig, load_config, with_overrides


class Settings(TrainConfig):
    """Flags of the same names as TrainConfig's fields and keys of its YAML; any --lora.* flag
    attaches an adapter.
    """

    # An optional block would become a subcommand, so here it is always there.
    lora: LoraConfig = Field(default=LoraConfig())
    eval_data: Path | None = Field(
        default=None, description=TrainConfig.model_fields["eval_data"].description
    )


@dataclass(frozen=True)
class Train:
    """Fine-tune MODEL on DATA: chats, prompts and completions, or texts."""

    model: ModelName
    data: tyro.conf.Positional[Path]
    """JSONL, JSON, CSV, TXT or Parquet file, or a folder with train and valid files."""
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML file of settings; flags win over it."""
    dry_run: bool = False
    """Print what would be done (rows, steps, kernel level, ...) and stop."""
    loading: Loaded = field(default_factory=Loading)


def run(arguments: Sequence[str]) -> int:
    """Fine-tune a model."""
    arguments = spell_out_resume(arguments)
    from_file = load_config(config_path(arguments))
    wants_lora = from_file.lora is not None or any(a.startswith("--lora.") for a in arguments)
    values = {name: getattr(from_file, name) for name in TrainConfig.model_fields}
    shown = Settings.model_construct(**{**values, "lora": from_file.lora or LoraConfig()})
    parsed = parse(Train, "train", arguments, Train(tyro.MISSING, tyro.MISSING, shown))
    flags = {name: getattr(parsed.settings, name) for name in TrainConfig.model_fields}
    flags["lora"] = parsed.settings.lora if wants_lora else None
    changed = {name: value for name, value in flags.items() if value != getattr(from_file, name)}
    config = with_overrides(from_file, changed, origin="flag")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = parsed.loading.load(parsed.model, config.quant, config)
    if parsed.dry_run:
        from sloth.train.trainer import Trainer

        print_rows(Trainer(model, parsed.data, config).dry_run())
        return 0
    report = model.train(parsed.data, config)
    last = report.losses[-1] if report.losses else float("nan")
    print(
        f"{len(report.losses)} steps, {report.tokens} tokens, {report.seconds:.0f} s, "
        f"loss {last:.4f}"
    )
    print("\n".join(f"{name:>12}  {path}" for name, path in report.paths.items()))
    return 0
