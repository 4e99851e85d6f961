"""`sloth data check FILE --model M`: data as training would read them, and what it would refuse.

Of the model only tokenizer and config are read. Exit code 2 where training would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from sloth.commands.base import parse
from sloth.data.settings import OnLong, TrainOn
from sloth.train.config import ObjectiveName, TrainConfig, load_config

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Check:
    """Show format, lengths, masks and counts of DATA as training would read them."""

    data: tyro.conf.Positional[str]
    """JSONL, JSON, CSV, TXT or Parquet file, a folder with train and valid files, or
    hf://datasets/OWNER/NAME."""
    model: str
    """Alias, hub repository id, folder, or .gguf file; its tokenizer and template are used."""
    config: Path | None = None
    """YAML file of settings, as for `sloth train`; flags win over it."""
    max_length: int | None = None
    """Tokens of an example at most."""
    on_long: OnLong | None = None
    """What becomes of longer ones."""
    train_on: TrainOn | None = None
    """What is trained."""
    packing: bool = False
    """Put several examples into a row."""
    skip_bad: bool = False
    """Leave malformed rows out and count them."""
    objective: ObjectiveName | None = None
    """What the data are for: dpo and orpo read preference pairs."""
    columns: dict[str, str] | None = None
    """Which column holds which field, as in --columns prompt question completion answer."""
    batch_size: int | None = None
    """Rows of one forward pass."""
    grad_accum: int | None = None
    """Forward passes of one step."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    def settings(self) -> TrainConfig:
        """The run's settings."""
        names = (
            *("max_length", "on_long", "train_on", "objective", "columns"),
            *("batch_size", "grad_accum"),
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        given |= {name: True for name in ("packing", "skip_bad") if getattr(self, name)}
        return load_config(self.config, given)


def run(arguments: Sequence[str]) -> int:
    """Check data before training on them."""
    if not arguments or arguments[0] not in ("check", "-h", "--help"):
        found = repr(arguments[0]) if arguments else "nothing"
        raise ValueError(f"`sloth data` has one command, check; got {found}")
    rest = list(arguments[1:]) if arguments[0] == "check" else list(arguments)
    parsed = parse(Check, "data check", rest)
    config = parsed.settings()

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
