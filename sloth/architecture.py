"""From config.json to a network without weights: which architecture, with which numbers.

Loading, estimates and `sloth data check` all come through here, so that what one of them refuses or
counts, the others do too. The network is built on the meta device, where it has shapes and no
memory; loading fills it from the files (`sloth.assemble`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sloth.errors import CheckpointMismatch, UnknownModel, UnsupportedConfig
from sloth.formats.checkpoint import stored_names
from sloth.formats.gguf import GGUFFile
from sloth.formats.json_file import read_mapping
from sloth.formats.wrapper import WRAPPERS, text_config, text_name
from sloth.linear import ProjectionFactory, dense_projection
from sloth.models import ARCHITECTURES, as_auto_config
from sloth.models.decoder import Decoder
from sloth.models.values import OBJECT, checked

# Ten times those of the deepest model there is.
MAX_LAYERS = 2000
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


@dataclass(frozen=True)
class Description:
    """A text model, or that of a multimodal one, as its config.json describes it.

    hf_config: the text model's config.json. config: the same as its family reads it. decoder_class:
    builds the network. wrapper: model_type of the multimodal model around it, None for a text
    model.
    """

    hf_config: dict[str, Any]
    config: Any
    decoder_class: Callable[..., Decoder]
    wrapper: str | None

    @property
    def is_quantized(self) -> bool:
        """Whether config.json says that the files hold 4-bit weights."""
        return bool(self.hf_config.get("quantization_config"))


def describe(path: Path, ignore_config: Iterable[str] = ()) -> Description:
    """The model of a Hugging Face folder or .gguf file; no weights are read, none need be there.

    ignore_config: keys to leave unread. Raises UnknownModel, UnsupportedConfig, CheckpointMismatch.
    """
    if path.is_file():
        return describe_config(GGUFFile(path).config, None, ignore_config)
    hf_config = read_config(path)
    # Of a text model config.json says enough; a wrapper's two levels contradict each other.
    names = stored_names(path) if is_wrapper(hf_config) else None
    return describe_config(hf_config, names, ignore_config)


def describe_config(
    hf_config: dict[str, Any], names: Collection[str] | None, ignore_config: Iterable[str] = ()
) -> Description:
    """The model that a config.json describes.

    names: the tensors' if they are known, on disk or in the text model. Raises UnsupportedConfig
    for what sloth does not compute or read, CheckpointMismatch for more layers than there are
    tensors of.
    """
    wrapper = None
    if is_wrapper(hf_config):
        wrapper = str(hf_config["model_type"])
        names = None if names is None else {text_name(name) for name in names}
        hf_config = text_config(hf_config, ignore_config, names)
    config_class, decoder_class = _architecture_of(hf_config)
    _check_quantization(hf_config)
    _check_layers(hf_config, names)
    config = config_class.from_hf(hf_config, ignore_config)
    return Description(hf_config, config, decoder_class, wrapper)


def meta_network(
    described: Description, projection: ProjectionFactory = dense_projection
) -> Decoder:
    """The network without weights, fp32, on the meta device.

    projection: what stores each matrix, asked as projection(path, in_features, out_features, bias).
    """
    with torch.device("meta"):
        return described.decoder_class(described.config, projection)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder, with the model_type that Transformers builds it from.

    Raises UnknownModel, or UnsupportedConfig if unreadable.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UnknownModel(f"{path} holds no config.json; expected a Hugging Face model folder")
    return as_auto_config(read_mapping(file, UnsupportedConfig))


def is_wrapper(hf_config: dict[str, Any]) -> bool:
    """Whether a config.json is of a multimodal model, with the text model's inside."""
    return str(hf_config.get("model_type")) in WRAPPERS


def _architecture_of(hf_config: dict[str, Any]) -> tuple[Any, Callable[..., Decoder]]:
    """Config and decoder of a text model's config.json. Raises UnsupportedConfig."""
    model_type = hf_config.get("model_type")
    found = ARCHITECTURES.get(str(model_type))
    if found is None:
        raise UnsupportedConfig(
            f"model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}, "
            f"and the text models of {' and '.join(WRAPPERS)}"
        )
    return found


def _check_layers(hf_config: dict[str, Any], names: Collection[str] | None) -> None:
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


def _check_quantization(hf_config: dict[str, Any]) -> None:
    """Raise UnsupportedConfig for stored weights of a kind that sloth does not read."""
    settings = checked("quantization_config", hf_config.get("quantization_config"), OBJECT) or {}
    method = settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or settings.get("load_in_8bit"):
        kind = "8-bit" if method == "bitsandbytes" else method
        raise UnsupportedConfig(
            f"the weights are quantized with {kind}; sloth reads 16 and 32-bit weights and "
            "bitsandbytes 4-bit NF4. Load the unquantized model, with quant='nf4' to save memory"
        )
