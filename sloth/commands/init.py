"""`sloth init`: a file of all settings, each with its meaning, to start from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from sloth.commands.axolotl import Conversion, convert
from sloth.commands.base import parse, show
from sloth.errors import OutputExists
from sloth.lora_config import LoraConfig
from sloth.redact import Redactor
from sloth.train.config import TrainConfig, load_config
from sloth.train.yaml_file import read_yaml

WIDTH = 96


@dataclass(frozen=True)
class Init:
    """Write FILE: every setting of a training run with its default and what it means."""

    file: tyro.conf.Positional[Path] = field(default=Path("sloth.yaml"))
    """YAML file for `sloth train --config`."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """An Axolotl file to take settings from; what has no place is listed with the reason."""


def run(arguments: Sequence[str]) -> int:
    """Write a commented file of all settings, or turn an Axolotl file into one."""
    parsed = parse(Init, "init", arguments)
    if parsed.file.exists():
        raise OutputExists(f"{parsed.file} exists; choose another name or remove it")
    found = convert(read_yaml(parsed.from_)) if parsed.from_ is not None else Conversion()
    config = TrainConfig(**found.settings)  # refuses here what training would refuse
    text = Redactor().text(render(config, found.origins))
    parsed.file.write_text(text, encoding="utf-8")
    load_config(parsed.file)
    show(f"{parsed.file} written; use it as")
    show(f"  {found.command(str(parsed.file))}")
    if parsed.from_ is not None:
        _tell(found, parsed.from_.name)
    return 0


def _tell(found: Conversion, source: str) -> None:
    show(f"\nfrom {source}: {len(found.settings)} settings, and the arguments above")
    if found.unneeded:
        show(f"so anyway: {', '.join(found.unneeded)}")
    for key, why in found.left.items():
        show(f"not taken  {key}: {why}")
    show(
        "\nbatch_size * grad_accum rows are a step of sloth on any number of GPUs; Axolotl's step "
        "is so many on each"
    )


def render(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """YAML of every setting under its description; origins: where the given ones came from."""
    lines = ["# Settings of `sloth train`. Flags win over this file; what is left out is as here."]
    values = config.plain()
    for name, about in TrainConfig.model_fields.items():
        said = about.description or ""
        if name in origins:
            said += f" (From {origins[name]}.)"
        lines += ["", *textwrap.wrap(said, WIDTH, initial_indent="# ", subsequent_indent="# ")]
        lines.append(_entry(name, values[name]))
        if name == "lora" and config.lora is None:
            block = _entry("lora", LoraConfig().model_dump(mode="json"))
            lines += [f"# {line}" for line in block.splitlines()]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any) -> str:
    return yaml.safe_dump({name: value}, sort_keys=False, width=WIDTH).rstrip()
