"""From files to a network: read config.json, build the decoder on meta, stream every tensor to its
owner.

Each tensor is read, checked, cast or quantized on the device, handed over and freed before the
next, so the peak is the model plus one tensor. Every expected name is filled once and every
leftover is accounted for, else CheckpointMismatch. What is 4-bit is decided tensor by tensor from
the file, as "dynamic" bitsandbytes checkpoints leave some projections in 16 bits.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sloth.errors import CheckpointMismatch, TokenizerMissing, UnknownModel, UnsupportedConfig
from sloth.formats.checkpoint import SafetensorsFolder
from sloth.formats.gguf import GGUFFile
from sloth.formats.wrapper import WRAPPERS, Source, TextTower, text_config
from sloth.linear import Linear, Projection
from sloth.lora import EMBEDDING, HEAD
from sloth.models import ARCHITECTURES, as_auto_config
from sloth.models.decoder import Decoder
from sloth.models.values import OBJECT, checked
from sloth.quant.bnb import BNB_SUFFIXES, FP4_STATE_KEY, STATE_KEY, read_bnb
from sloth.quant.linear4bit import Linear4bit
from sloth.text.tokenizer import Tokenizer

QUANTIZATIONS = (None, "nf4")
# Ten times those of the deepest model there is.
MAX_LAYERS = 2000
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_BNB_MARK, _BNB_FP4_MARK = f".{STATE_KEY}", f".{FP4_STATE_KEY}"


@dataclass
class Assembled:
    """A network with what came along with it.

    hf_config: the text model's config.json. wrapper: model_type of the multimodal model around it,
    None for a text model.
    """

    network: Decoder
    hf_config: dict[str, Any]
    tokenizer: Tokenizer | None
    is_quantized: bool
    wrapper: str | None = None


def assemble(
    path: Path,
    *,
    quant: str | None,
    device: torch.device,
    dtype: torch.dtype,
    ignore_config: Sequence[str] = (),
) -> Assembled:
    """Read a Hugging Face folder or a .gguf file into a network on `device` in `dtype`.

    quant: None keeps what is on disk, "nf4" quantizes every projection but the head.
    Raises UnknownModel, UnsupportedConfig, CheckpointMismatch.
    """
    if quant not in QUANTIZATIONS:
        raise ValueError(f"quant must be None or 'nf4', got {quant!r}")
    source, hf_config, tokenizer = _open(path)
    wrapper: str | None = None
    if str(hf_config.get("model_type")) in WRAPPERS:
        wrapper = hf_config["model_type"]
        source = TextTower(source)
        _tell_left_out(wrapper, source.left_out)
        hf_config = text_config(hf_config, ignore_config)
    config_class, decoder_class = architecture_of(hf_config)
    check_quantization(hf_config)
    _check_stored_quantization(source)
    check_layers(hf_config, source.names)
    config = config_class.from_hf(hf_config, ignore_config)
    if config.tie_word_embeddings and _has_own_head(source):
        config = replace(config, tie_word_embeddings=False)

    def projection(module_path: str, in_features: int, out_features: int, bias: bool) -> Projection:
        stored = f"{module_path}.weight{_BNB_MARK}" in source.names
        kind = Linear4bit if stored or quant == "nf4" else Linear
        return kind(in_features, out_features, bias)

    with torch.device("meta"):
        network = decoder_class(config, projection)
    _fill(network, source, device, dtype)
    is_quantized = any(isinstance(module, Linear4bit) for module in network.modules())
    network.requires_grad_(not is_quantized)
    return Assembled(network.eval(), hf_config, tokenizer, is_quantized, wrapper)


def architecture_of(hf_config: dict[str, Any]) -> tuple[Any, Callable[..., Decoder]]:
    """Config and decoder of a text model's config.json. Raises UnsupportedConfig."""
    model_type = hf_config.get("model_type")
    found = ARCHITECTURES.get(str(model_type))
    if found is None:
        raise UnsupportedConfig(
            f"model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}, "
            f"and the text models of {' and '.join(WRAPPERS)}"
        )
    return found


def check_layers(hf_config: dict[str, Any], names: Collection[str] | None = None) -> None:
    """Before anything is made for each layer: their number as config.json has it, against the
    tensors' names if these are known. Raises UnsupportedConfig, CheckpointMismatch.
    """
    num_layers = hf_config.get("num_hidden_layers")
    if not isinstance(num_layers, int | float):  # a config of its own says what is wrong with it
        return
    if num_layers > MAX_LAYERS:
        raise UnsupportedConfig(
            f"config.json asks for {num_layers} layers, more than the {MAX_LAYERS} of any model"
        )
    if names is None:
        return
    found = {int(match[1]) for match in map(_LAYER.match, names) if match}
    stored = max(found, default=-1) + 1
    if num_layers > stored:
        raise CheckpointMismatch(
            f"config.json asks for {num_layers} layers, and the weights are of {stored}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder, with the model_type that Transformers builds it from.

    Raises UnknownModel, or UnsupportedConfig if unreadable.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UnknownModel(f"{path} holds no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedConfig(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedConfig(f"{file} holds a {type(config).__name__}, expected an object")
    return as_auto_config(config)


def _open(path: Path) -> tuple[Source, dict[str, Any], Tokenizer | None]:
    if path.is_file():
        gguf = GGUFFile(path)
        return gguf, gguf.config, Tokenizer.from_files(gguf.tokenizer_files())
    hf_config = read_config(path)
    try:
        tokenizer = Tokenizer.from_folder(path)
    except TokenizerMissing:
        tokenizer = None
    return SafetensorsFolder(path), hf_config, tokenizer


def _tell_left_out(model_type: str, names: Sequence[str]) -> None:
    parts = sorted({name.removeprefix("model.").split(".")[0] for name in names})
    warnings.warn(
        f"this {model_type} model reads images too; sloth loads its text model and leaves out "
        f"{len(names)} tensors ({', '.join(parts) or 'none are there'})",
        stacklevel=4,
    )


def check_quantization(hf_config: dict[str, Any]) -> None:
    """Raise UnsupportedConfig for stored weights of a kind that sloth does not read."""
    settings = checked("quantization_config", hf_config.get("quantization_config"), OBJECT) or {}
    method = settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or settings.get("load_in_8bit"):
        kind = "8-bit" if method == "bitsandbytes" else method
        raise UnsupportedConfig(
            f"the weights are quantized with {kind}; sloth reads 16 and 32-bit weights and "
            "bitsandbytes 4-bit NF4. Load the unquantized model, with quant='nf4' to save memory"
        )


def _check_stored_quantization(source: Source) -> None:
    """Raise UnsupportedConfig for 4-bit tensors of another kind, or where sloth keeps 16 bits."""
    for name in source.names:
        if name.endswith(_BNB_FP4_MARK):
            raise UnsupportedConfig(
                f"{name.removesuffix(_BNB_FP4_MARK)} is stored in FP4; sloth reads bitsandbytes "
                "NF4 only. Load the unquantized model, with quant='nf4' to save memory"
            )
        path = name.removesuffix(f".weight{_BNB_MARK}")
        if path != name and path in (HEAD, EMBEDDING):
            raise UnsupportedConfig(
                f"{path} is stored in 4 bits (llm_int8_skip_modules leaves it out); sloth keeps "
                "head and embedding in 16 or 32 bits. Load the unquantized model, with quant='nf4' "
                "to save memory"
            )


def _has_own_head(source: Source) -> bool:
    """Whether a file whose config ties the head still holds another matrix for it."""
    if "lm_head.weight" not in source.names:
        return False
    return not torch.equal(
        source.tensor("lm_head.weight"), source.tensor("model.embed_tokens.weight")
    )


def _fill(network: Decoder, source: Source, device: torch.device, dtype: torch.dtype) -> None:
    used: set[str] = set()
    missing: list[str] = []

    def read(name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in source.names:
            missing.append(name)
            return None
        used.add(name)
        tensor = source.tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointMismatch(
                f"{name} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointMismatch(f"{name} is stored as {tensor.dtype}, expected floats")
        # A copy, always: a tensor that still maps the file would change when the file does.
        return tensor.to(device=device, dtype=dtype, copy=True)

    for path, module in network.named_modules():
        if isinstance(module, Linear4bit):
            _fill_linear4bit(module, f"{path}.weight", source, device, read, used)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            tensor = read(f"{path}.{leaf}", tuple(parameter.shape))
            if tensor is not None:
                setattr(module, leaf, nn.Parameter(tensor))
    extra = sorted(
        name for name in source.names if name not in used and not _is_leftover(name, network)
    )
    if missing or extra:
        raise CheckpointMismatch(
            "; ".join(
                ([f"missing tensors: {_listed(missing)}"] if missing else [])
                + ([f"tensors that belong to nothing: {_listed(extra)}"] if extra else [])
            )
        )


def _fill_linear4bit(
    module: Linear4bit, name: str, source: Source, device: torch.device, read: Any, used: set[str]
) -> None:
    if f"{name}{_BNB_MARK}" in source.names:
        weight = read_bnb(name, source.tensor, source.names).to(device)
        expected = (module.out_features, module.in_features)
        if tuple(weight.shape) != expected:
            raise CheckpointMismatch(
                f"{name} has shape {list(weight.shape)}, the config asks for {list(expected)}"
            )
        used.update({name, *(f"{name}.{suffix}" for suffix in BNB_SUFFIXES)})
        module.load_nf4(weight)
        return
    dense = read(name, (module.out_features, module.in_features))
    if dense is not None:
        module.quantize_(dense)


def _is_leftover(name: str, network: Decoder) -> bool:
    """Names that files carry and no module needs: old rotary tables, the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (network.tied and name == "lm_head.weight")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
