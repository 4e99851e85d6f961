"""GGUF files out: the merged model with its tokenizer, or the adapter alone, for llama.cpp and
Ollama.

As with every export, a file is written beside its final name, read back with sloth's own reader,
compared with the model in memory (config, tokenizer keys, each tensor within the error its storage
allows), and only then renamed.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sloth.errors import AdapterMismatch, CheckpointMismatch, OutputExists, UnsupportedConfig
from sloth.exporting import merged_shapes, merged_tensors, published
from sloth.formats.gguf import GGUFFile
from sloth.formats.gguf_archs import Config, GGUFArch, arch_of_model
from sloth.formats.gguf_config import context_length
from sloth.formats.gguf_header import read_header
from sloth.formats.gguf_vocabulary import UNUSED, vocabulary_metadata
from sloth.formats.gguf_write import (
    QUANTS,
    WrittenTensor,
    largest_error,
    model_metadata,
    plan,
    read_f32,
    write_adapter,
    write_model,
)
from sloth.lora import projections
from sloth.redact import Redactor

if TYPE_CHECKING:
    from sloth.model import Model

MODELFILE = "Modelfile"
ADAPTER_NAME = "adapter.gguf"

# Numbers are stored as fp32.
_FP32_RELATIVE_ERROR = 1e-6
# Keys of config.json that need no counterpart: they are checked elsewhere, mean nothing for the
# logits, or (windows, their layers) are compared through what the file states of them.
_UNCOMPARED = {
    "architectures",
    "model_type",
    "attention_dropout",
    "max_position_embeddings",
    "max_window_layers",
    "no_rope_layer_interval",
    "use_sliding_window",
    "_sliding_window_pattern",
}
_WINDOW_KEYS = {"sliding_window", "layer_types"}


def save_gguf(model: Model, path: Path, quant: str = "f16") -> Path:
    """The model, adapter merged, as one GGUF file, with a Modelfile beside it: <name>.Modelfile
    where there is one already.
    """
    if quant not in QUANTS:
        raise ValueError(f"quant must be one of {', '.join(QUANTS)}, got {quant!r}")
    if path.suffix != ".gguf":
        raise ValueError(f"a GGUF file ends in .gguf, got {path.name!r}")
    arch, config = _described(model)
    positions, length = config["max_position_embeddings"], context_length(arch, config)
    if length < positions:
        warnings.warn(
            f"a {arch.name} GGUF file cannot say that layers see {length} tokens back, so "
            f"{path.name} promises a context of {length} of the model's {positions}: up to there "
            "both compute the same, past it a program that reads the file would not",
            stacklevel=3,
        )
    vocabulary = vocabulary_metadata(model.tokenizer, config["vocab_size"])
    name = Path(Redactor().text(model.name)).name.removesuffix(".gguf")
    metadata = model_metadata(arch, config, vocabulary, name, quant)
    planned = plan(arch, merged_shapes(model), quant)
    beside = path.with_name(MODELFILE)
    if beside.exists():  # of another file in the same folder, or somebody's
        beside = path.with_name(f"{path.stem}.{MODELFILE}")
    with _published_files(path, beside) as (partial, modelfile):
        write_model(partial, arch, config, metadata, planned, merged_tensors(model))
        _verify(model, partial, arch, config, metadata, planned)
        modelfile.write_text(_modelfile(model, path.name, vocabulary), encoding="utf-8")
    return path


def save_gguf_adapter(model: Model, folder: Path) -> Path:
    """The adapter alone as `adapter.gguf`, for `llama-server --lora` or Ollama's ADAPTER."""
    if model.lora_config is None:
        raise AdapterMismatch("the model has no adapter to save; call add_lora or train first")
    beyond = _beyond_gguf(model)
    if beyond:
        raise AdapterMismatch(
            f"a GGUF adapter holds low-rank matrices of projections only, and this one "
            f"{' and '.join(beyond)}; write the whole model with save_gguf"
        )
    arch, config = _described(model)
    factors = {
        path_in_model: (lora.A, lora.B, lora.scale)
        for path_in_model, module in projections(model.network).items()
        if (lora := module.lora_slot) is not None
    }
    alpha = model.lora_config.alpha
    with published(folder) as partial:
        file = partial / ADAPTER_NAME
        name = Path(Redactor().text(model.name)).name
        write_adapter(file, arch, config, alpha, factors, name)
        _verify_adapter(file, arch, config, factors)
    return folder


def _beyond_gguf(model: Model) -> list[str]:
    """What an adapter does that a GGUF adapter cannot say."""
    config = model.lora_config
    assert config is not None
    found = []
    if config.modules_to_save:
        found.append(f"trains {', '.join(config.modules_to_save)} in full")
    if config.use_dora:
        found.append("scales rows to trained lengths (use_dora)")
    if config.token_rows:
        found.append(f"trains token rows of {', '.join(config.token_rows)}")
    if model.network.model.embed_tokens.has_lora:
        found.append("adapts embed_tokens")
    if model.carried:
        found.append(f"brings {', '.join(model.carried)} along")
    return found


def _described(model: Model) -> tuple[GGUFArch, Config]:
    """The row to write by, and the config.json of the model as it is now."""
    model_type = model.network.model_type
    arch = arch_of_model(model_type)
    if arch is None:
        raise UnsupportedConfig(f"models of type {model_type!r} cannot be written to GGUF files")
    return arch, model.config.to_hf() | {"tie_word_embeddings": model.network.tied}


def _modelfile(model: Model, file_name: str, vocabulary: dict[str, Any]) -> str:
    """Ollama reads the chat template from the GGUF file; the stop texts it is told."""
    tokens, kinds = (vocabulary[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    ids = [index for index in model.tokenizer.stop_ids if index < len(tokens)]
    stops = [tokens[index] for index in ids if kinds[index] != UNUSED]
    lines = [f"FROM ./{file_name}"]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


# -- reading back ----------------------------------------------------------------------------------


def _verify(
    model: Model,
    path: Path,
    arch: GGUFArch,
    config: Config,
    metadata: dict[str, Any],
    planned: dict[str, WrittenTensor],
) -> None:
    """Raises CheckpointMismatch, or UnsupportedConfig for a config that reads back otherwise."""
    file = GGUFFile(path)
    lost = [
        key
        for key, value in metadata.items()
        if value != [] and not _same(file.metadata.get(key), value)  # no empty list is written
    ]
    if lost:
        raise CheckpointMismatch(f"read back, the GGUF file says otherwise of {', '.join(lost)}")
    _verify_config(arch, config, file.config)
    if file.names != {name: tensor.shape for name, tensor in planned.items()}:
        raise CheckpointMismatch("read back, the GGUF file holds other tensors than the model")
    for name, value in merged_tensors(model):
        expected = value.float().cpu()
        kind = planned[name].kind
        stored = arch.to_file(name, expected, config)
        got = arch.to_file(name, file.tensor(name), config)
        if not bool(((got - stored).abs() <= largest_error(stored, kind)).all()):
            raise CheckpointMismatch(
                f"read back, {name} differs by more than {kind} explains; nothing "
                f"was kept under {path.name}"
            )


def _verify_config(arch: GGUFArch, config: Config, told: Config) -> None:
    unlike = [
        key
        for key, value in config.items()
        if key in told
        and key not in _UNCOMPARED
        and not (key in _WINDOW_KEYS and value is None)
        and not _same(told[key], value)
    ]
    unsaid = [
        key
        for key, value in config.items()
        if key not in told and key not in _UNCOMPARED | _WINDOW_KEYS and value not in (None, False)
    ]
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in (None, arch.activation):
        unlike.append("hidden_act")
    unsaid = [key for key in unsaid if key not in ("hidden_act", "hidden_activation", "head_dim")]
    if told["max_position_embeddings"] != context_length(arch, config):
        unlike.append("max_position_embeddings")
    if unlike or unsaid:
        raise UnsupportedConfig(
            f"a {arch.name} GGUF file cannot state this model's {', '.join(unlike + unsaid)}; a "
            "program that reads it would compute something else"
        )


def _same(one: Any, other: Any) -> bool:
    """Equal, numbers to the precision of fp32."""
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = _said(one), _said(other)
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=_FP32_RELATIVE_ERROR)
    if isinstance(one, list) and isinstance(other, list) and one and isinstance(one[0], float):
        close = torch.tensor(one) == torch.tensor(other) if len(one) == len(other) else None
        return close is not None and bool(close.all())
    return bool(one == other)


def _said(rope: dict[str, Any]) -> dict[str, Any]:
    """A rotary scaling without the settings that are at their defaults."""
    defaults = {"truncate": True}
    return {k: v for k, v in rope.items() if v is not None and v != defaults.get(k)}


def _verify_adapter(path: Path, arch: GGUFArch, config: Config, factors: dict[str, Any]) -> None:
    """Every B A of the file, times what programs multiply it by, must be the model's s B A."""
    header = read_header(path)
    alpha = header.metadata["adapter.lora.alpha"]

    def factor(name: str) -> torch.Tensor:
        entry = header.tensors[name]
        return read_f32(path, entry.start, entry.shape)

    for path_in_model, (a, b, scale) in factors.items():
        weight = f"{path_in_model}.weight"
        stored = arch.gguf_name(weight)
        file_a, file_b = factor(f"{stored}.lora_a"), factor(f"{stored}.lora_b")
        same_a = torch.equal(file_a, a.detach().float().cpu())
        delta = alpha / file_b.shape[1] * file_b
        expected = arch.rows_to_file(weight, scale * b.detach().float().cpu(), config)
        if not same_a or not torch.allclose(delta, expected, rtol=_FP32_RELATIVE_ERROR, atol=0.0):
            raise AdapterMismatch(f"read back, the adapter of {path_in_model} differs")
    if len(header.tensors) != 2 * len(factors):
        raise AdapterMismatch("read back, the file holds other tensors than the adapter")


@contextmanager
def _published_files(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files that take their final names only if nothing failed inside."""
    for path in paths:
        if path.exists():
            raise OutputExists(f"{path} exists; choose another folder or remove it")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    partials = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in paths]
    done: list[Path] = []
    try:
        yield partials
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
            done.append(path)
    except BaseException:
        for path in [*partials, *done]:
            path.unlink(missing_ok=True)
        raise
