"""`sloth data check FILE --model M`: data as training would read them, and what it would refuse.

Of the model only tokenizer and config are read. Exit code 2 where training would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import create_model

from sloth.commands.arguments import config_path
from sloth.commands.base import parse
from sloth.redact import Redactor
from sloth.train.config import TrainConfig, load_config, with_overrides

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer


# Those of a run's settings that decide what its data become.
_SETTINGS = (
    *("max_length", "on_long", "train_on", "packing", "skip_bad", "objective", "columns"),
    *("batch_size", "grad_accum"),
)
if TYPE_CHECKING:
    Settings = TrainConfig
else:  # their flags are read and described as those of `sloth train`
    _FIELDS = {name: TrainConfig.model_fields[name] for name in _SETTINGS}
    Settings = create_model("Settings", **{k: (f.annotation, f) for k, f in _FIELDS.items()})


@dataclass(frozen=True)
class Check:
    """Show format, lengths, masks and counts of DATA as training would read them."""

    data: tyro.conf.Positional[str]
    """JSONL, JSON, CSV, TXT or Parquet file, a folder with train and valid files, or
    hf://datasets/OWNER/NAME."""
    model: str
    """Alias, hub repository id, folder, or .gguf file; its tokenizer and template are used."""
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML file of settings, as for `sloth train`; flags win over it."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""


def _read(arguments: Sequence[str]) -> tuple[Check, TrainConfig]:
    """The flags, and the settings that they and the file come to."""
    from_file = load_config(config_path(arguments))
    values = {name: getattr(from_file, name) for name in _SETTINGS}
    shown = Settings.model_construct(**Redactor().value(values))  # by --help, as defaults
    parsed = parse(Check, "data check", arguments, Check(tyro.MISSING, tyro.MISSING, shown))
    flags = {name: getattr(parsed.settings, name) for name in _SETTINGS}
    changed = {name: flag for name, flag in flags.items() if flag != getattr(shown, name)}
    return parsed, with_overrides(from_file, changed, origin="flag")


def run(arguments: Sequence[str]) -> int:
    """Check data before training on them."""
    if not arguments or arguments[0] not in ("check", "-h", "--help"):
        found = repr(arguments[0]) if arguments else "nothing"
        raise ValueError(f"`sloth data` has one command, check; got {found}")
    rest = list(arguments[1:]) if arguments[0] == "check" else list(arguments)
    parsed, config = _read(rest)

    from rich.console import Console

    from sloth.data.check import check_data, epoch_seconds, histogram
    from sloth.data.show import describe_first_row, warnings_of, without_secrets
    from sloth.quiet import say

    tokenizer, num_parameters, vocab_size, positions = _read_model(parsed.model, parsed.revision)
    check = check_data(parsed.data, tokenizer, config, say, vocab_size)
    seconds = None
    if num_parameters is not None:
        seconds = epoch_seconds(check.data.counts.tokens, num_parameters)
    console = Console(highlight=False, soft_wrap=True)
    lines = check.lines(config.max_length, seconds)
    width = max(map(len, lines))
    for name, value in lines.items():
        console.print(without_secrets(f"{name:<{width}}  {value}"))
    console.print(without_secrets("\nlengths, in tokens:"))
    for line in histogram(check.data.examples):
        console.print(without_secrets(f"  {line}"))
    console.print(without_secrets("\nfirst row, trained parts in [+ +]:"))
    console.print(without_secrets(describe_first_row(check.data, tokenizer)))
    for warning in warnings_of(check.data, positions):
        console.print(without_secrets(f"\nWARNING: {warning}"))
    return 0


Sizes = tuple[int | None, int | None, int | None]


def _read_model(name: str, revision: str | None) -> tuple[Tokenizer, *Sizes]:
    """Its tokenizer, how many parameters it has, for how many tokens and positions (None for a
    tokenizer alone). Raises UnsupportedConfig for a model that cannot be trained.
    """
    from sloth.architecture import describe, describe_config, meta_network
    from sloth.formats.gguf import GGUFFile
    from sloth.formats.hub import resolve
    from sloth.text.tokenizer import Tokenizer

    path = resolve(name, revision, weights=False).path
    if path.is_file():
        file = GGUFFile(path)
        tokenizer = Tokenizer.from_files(file.tokenizer_files())
        described = describe_config(file.config, None)
    else:
        tokenizer = Tokenizer.from_folder(path)
        if not (path / "config.json").is_file():
            return tokenizer, None, None, None
        described = describe(path)
    num_parameters = sum(p.numel() for p in meta_network(described).parameters())
    config = described.config
    return tokenizer, num_parameters, config.vocab_size, config.max_position_embeddings
