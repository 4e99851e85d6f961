"""The `sloth` command: train, generate, chat, export, info, doctor, data.

Flags of `train` are the fields of TrainConfig; `--config FILE.yaml` gives others, and flags win
over the file. torch is imported only where a model is needed, so help is quick. Errors meant for
users print one line and exit with 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field, ValidationError

from sloth import __version__
from sloth.arguments import config_path, spell_out_resume
from sloth.errors import SlothError
from sloth.lora_config import LoraConfig
from sloth.train.config import TrainConfig, load_config, with_overrides
from sloth.train.redact import Redactor

if TYPE_CHECKING:
    from sloth.model import Model

USAGE_ERROR = 2
INTERRUPTED = 130
GIB = 2**30

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
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def load(self, name: str, quant: str | None) -> Model:
        """The model, ready."""
        import sloth

        return sloth.load(
            name,
            quant=quant,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            level=self.level,
            revision=self.revision,
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


def train(arguments: Sequence[str]) -> int:
    """Fine-tune a model."""
    arguments = spell_out_resume(arguments)
    from_file = load_config(config_path(arguments))
    wants_lora = from_file.lora is not None or any(a.startswith("--lora.") for a in arguments)
    values = {name: getattr(from_file, name) for name in TrainConfig.model_fields}
    shown = Settings.model_construct(**{**values, "lora": from_file.lora or LoraConfig()})
    parsed = _parse(Train, "train", arguments, Train(tyro.MISSING, tyro.MISSING, shown))
    flags = {name: getattr(parsed.settings, name) for name in TrainConfig.model_fields}
    flags["lora"] = parsed.settings.lora if wants_lora else None
    changed = {name: value for name, value in flags.items() if value != getattr(from_file, name)}
    config = with_overrides(from_file, changed, origin="flag")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = parsed.loading.load(parsed.model, config.quant)
    if parsed.dry_run:
        from sloth.train.trainer import Trainer

        _print_rows(Trainer(model, parsed.data, config).dry_run())
        return 0
    report = model.train(parsed.data, config)
    last = report.losses[-1] if report.losses else float("nan")
    print(
        f"{len(report.losses)} steps, {report.tokens} tokens, {report.seconds:.0f} s, "
        f"loss {last:.4f}"
    )
    print("\n".join(f"{name:>12}  {path}" for name, path in report.paths.items()))
    return 0


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand):
    """Continue PROMPT and print the new text."""

    prompt: tyro.conf.Positional[str]
    """Raw text, or with --chat a user's message."""
    chat: bool = False
    """Put the prompt in the model's chat template."""
    max_new_tokens: int = 256
    """Tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""


def generate(arguments: Sequence[str]) -> int:
    """Continue a prompt."""
    parsed = _parse(Generate, "generate", arguments)
    model = parsed.load()
    prompt = [{"role": "user", "content": parsed.prompt}] if parsed.chat else parsed.prompt
    _stream(model, prompt, parsed.max_new_tokens, parsed.temperature, parsed.stop)
    return 0


@dataclass(frozen=True, kw_only=True)
class Chat(ModelCommand):
    """Talk with MODEL; /reset forgets the conversation, /quit leaves."""

    system: str | None = None
    """System message."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    temperature: float = 0.7
    """0 takes the likeliest token."""


def chat(arguments: Sequence[str]) -> int:
    """Talk with a model."""
    parsed = _parse(Chat, "chat", arguments)
    model = parsed.load()
    opening = [{"role": "system", "content": parsed.system}] if parsed.system else []
    messages = list(opening)
    print(f"{model.name}. /reset forgets the conversation, /quit leaves.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = list(opening)
            print("(forgotten)")
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _stream(model, messages, parsed.max_new_tokens, parsed.temperature, ())
            messages.append({"role": "assistant", "content": answer})


@dataclass(frozen=True)
class Export:
    """Write MODEL with its adapter merged, or its base, as a Hugging Face folder or GGUF file."""

    model: ModelName
    merged: Path | None = None
    """Folder for the model with --adapter merged into it."""
    base: Path | None = None
    """Folder for the model without an adapter."""
    quant: Quant = None
    """Write --base in bitsandbytes 4-bit."""
    gguf: Path | None = None
    """GGUF file for the model, with --adapter merged if given; a Modelfile comes beside it."""
    gguf_quant: Literal["f16", "bf16", "q8_0", "q4_0"] | None = None
    """How --gguf is stored; f16 unless said."""
    gguf_adapter: Path | None = None
    """Folder for --adapter as a GGUF file."""
    loading: Loaded = field(default_factory=Loading)


def export(arguments: Sequence[str]) -> int:
    """Write a merged model, a base or an adapter, for Hugging Face or GGUF programs."""
    parsed = _parse(Export, "export", arguments)
    if (parsed.merged, parsed.base, parsed.gguf, parsed.gguf_adapter) == (None,) * 4:
        raise ValueError(
            "nothing to export: give --merged DIR (with --adapter), --base DIR, --gguf FILE.gguf "
            "or --gguf-adapter DIR (with --adapter)"
        )
    for flag in ("merged", "gguf_adapter"):
        if getattr(parsed, flag) is not None and parsed.loading.adapter is None:
            raise ValueError(f"--{flag.replace('_', '-')} needs --adapter DIR, the adapter")
    if parsed.quant is not None and parsed.base is None:
        raise ValueError("--quant says how --base is written; give --base DIR")
    if parsed.gguf_quant is not None and parsed.gguf is None:
        raise ValueError("--gguf-quant says how --gguf is stored; give --gguf FILE.gguf")
    model = parsed.loading.load(parsed.model, None)
    if parsed.merged is not None:
        print(f"merged  {model.save_merged(parsed.merged)}")
    if parsed.base is not None:
        print(f"base    {model.save_base(parsed.base, quant=parsed.quant)}")
    if parsed.gguf is not None:
        print(f"gguf    {model.save_gguf(parsed.gguf, quant=parsed.gguf_quant or 'f16')}")
    if parsed.gguf_adapter is not None:
        print(f"adapter {model.save_adapter(parsed.gguf_adapter, format='gguf')}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Info(ModelCommand):
    """Show MODEL's config, parameters, memory, and the kernel level chosen and why."""


def info(arguments: Sequence[str]) -> int:
    """What a model is."""
    parsed = _parse(Info, "info", arguments)
    model = parsed.load()
    from sloth.lora import count_parameters

    total, trainable = count_parameters(model.network)
    held = (*model.network.parameters(), *model.network.buffers())
    held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    kind = "NF4" if model.is_quantized else str(model.dtype).removeprefix("torch.")
    rows = {
        "model": model.name,
        "revision": model.revision or "(local files)",
        "parameters": f"{total:,}, of which trainable {trainable:,}",
        "memory": f"{held_bytes / GIB:.3f} GiB of weights on {model.device}",
        "stored as": kind,
        "adapter": "yes" if model.has_adapter else "no",
        "level": f"{model.level}: {model.level_reason}",
        "config": "",
    }
    _print_rows(rows)
    _print_rows({f"  {name}": value for name, value in model.config.to_hf().items()})
    return 0


@dataclass(frozen=True)
class Doctor:
    """Show what sloth finds on this machine: GPU, driver, torch, triton."""


def doctor(arguments: Sequence[str]) -> int:
    """What the machine has."""
    _parse(Doctor, "doctor", arguments)
    from sloth.machine import describe_machine

    _print_rows(describe_machine())
    return 0


def data(arguments: Sequence[str]) -> int:
    """Look at data before training on them."""
    from sloth import data_command

    return data_command.data(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "generate": generate,
    "chat": chat,
    "export": export,
    "info": info,
    "doctor": doctor,
    "data": data,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. 2 for errors a user can mend, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"sloth {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        return _complain(f"unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}")
    try:
        return command(arguments[1:])
    except ValidationError as error:
        return _complain(_one_line(error))
    except (SlothError, ValueError, OSError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as leaving:  # tyro, after help and usage errors; training, after a signal
        return leaving.code if isinstance(leaving.code, int) else USAGE_ERROR


def _complain(text: str) -> int:
    """Say what is wrong, on one line and without secrets."""
    print(f"error: {Redactor().text(' '.join(text.split()))}", file=sys.stderr)
    return USAGE_ERROR


def _help() -> str:
    lines = [f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items()]
    purpose = "usage: sloth COMMAND ...\n\nFine-tune Llama, Mistral, Gemma and Qwen models.\n"
    hint = "\n`sloth COMMAND --help` lists a command's flags; `sloth --version` the version."
    return "\n".join([purpose, *lines, hint])


def _parse(kind: type[Any], name: str, arguments: Sequence[str], default: Any = None) -> Any:
    given = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=f"sloth {name}",
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
        **given,
    )


def _stream(
    model: Model, prompt: Any, max_new_tokens: int, temperature: float, stop: Sequence[str]
) -> str:
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


def _print_rows(rows: dict[str, Any]) -> None:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}".rstrip())


def _one_line(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})" if place else ""
        parts.append(f"{place}: {message}{given}" if place else message)
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
