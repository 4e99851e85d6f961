"""What commands share: reading flags, naming and loading a model, showing rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import ValidationError

from sloth.errors import one_line
from sloth.redact import Redactor

if TYPE_CHECKING:
    from sloth.model import Model
    from sloth.train.config import TrainConfig

Quant = Literal["nf4"] | None


@dataclass(frozen=True)
class Loading:
    """How to load the model."""

    adapter: Path | None = None
    """PEFT adapter folder to put on the model."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    dtype: str = "auto"
    """bfloat16, float16, float32, or auto."""
    level: Literal["auto", "reference", "ops", "fused"] = "auto"
    """Kernel level."""
    base_compute: Literal["fp8"] | None = None
    """fp8: products with the frozen base in 8-bit floats, faster and an approximation."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def load(self, name: str, quant: str | None, to_train: TrainConfig | None = None) -> Model:
        """The model, ready. to_train: of a run whose state may be more than the device holds."""
        from sloth.loading import load

        if to_train is not None:
            self._require_room(name, to_train)
        return load(
            name,
            quant=quant,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            level=self.level,
            base_compute=self.base_compute,
            revision=self.revision,
        )

    def _require_room(self, name: str, config: TrainConfig) -> None:
        if config.lora is None and config.quant is None and self.adapter is None:
            from sloth.estimating import refuse_full_training
            from sloth.machine import resolve_device

            device = resolve_device(self.device)
            refuse_full_training(
                name, config, device=device, dtype=self.dtype, revision=self.revision
            )


Loaded = Annotated[Loading, tyro.conf.arg(name="")]
ModelName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(help="Alias, hub repository id, folder, or .gguf file."),
]


@dataclass(frozen=True, kw_only=True)
class ModelCommand:
    """A command about one model."""

    model: ModelName
    quant: Quant = None
    """Load in 4 bits."""
    loading: Loaded = field(default_factory=Loading)

    def load(self) -> Model:
        """The model, ready."""
        return self.loading.load(self.model, self.quant)


def parse(kind: type[Any], name: str, arguments: Sequence[str], default: Any = None) -> Any:
    """The flags of `sloth NAME` as a `kind`. Usage errors and --help leave with SystemExit.

    Raises ValueError, in one line, for a setting that a config of its own refuses.
    """
    given = {} if default is None else {"default": default}

    def read(words: Sequence[str]) -> Any:
        return tyro.cli(
            kind,
            prog=f"sloth {name}",
            args=list(words),
            config=(tyro.conf.AvoidSubcommands,),
            **given,
        )

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return read(arguments)
    except SystemExit as leaving:
        _refuse_setting(leaving)
    # What is said of a mistake repeats the words, in lines that may end inside of one.
    read([Redactor().text(word) for word in arguments])
    raise ValueError("the flags cannot be read")


def _refuse_setting(leaving: SystemExit) -> None:
    """Raise ValueError if tyro left because an adapter's settings were refused.

    What it shows of that is pydantic's text of many lines; the error itself stands behind its own.
    """
    error: BaseException | None = leaving
    while error is not None and not isinstance(error, ValidationError):
        error = error.__context__
    if error is not None:
        raise ValueError(one_line(error, within="lora"))


def show(text: str) -> None:
    """Print, without secrets."""
    print(Redactor().text(text))


def print_rows(rows: Mapping[str, Any]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        show(f"{name:<{width}}  {value}".rstrip())


def stream_answer(
    model: Model, prompt: Any, max_new_tokens: int, temperature: float, stop: Sequence[str]
) -> str:
    """Print an answer as it comes; the whole of it."""
    pieces = []
    answer = model.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=list(stop) or None,
        stream=True,
    )
    for piece in answer:
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
