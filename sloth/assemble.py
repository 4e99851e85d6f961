"""From files to a network: build the decoder on meta (`sloth.architecture`), stream every tensor to
its owner.

Each tensor is read, checked, cast or quantized on the device, handed over and freed before the
next, so the peak is the model plus one tensor. Every expected name is filled once and every
leftover is accounted for, else CheckpointMismatch. What is 4-bit is decided tensor by tensor from
the file, as "dynamic" bitsandbytes checkpoints leave some projections in 16 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sloth.architecture import describe_config, is_wrapper, meta_network, read_config
from sloth.errors import CheckpointMismatch, TokenizerMissing, UnsupportedConfig
from sloth.formats.checkpoint import SafetensorsFolder
from sloth.formats.gguf import GGUFFile
from sloth.formats.wrapper import Source, TextTower
from sloth.kernels.fp8 import BaseCompute
from sloth.kernels.layer import require_fp8_blocks
from sloth.linear import Linear, Projection
from sloth.lora import EMBEDDING, HEAD
from sloth.models.decoder import Decoder
from sloth.quant.bnb import BNB_SUFFIXES, FP4_STATE_KEY, STATE_KEY, read_bnb
from sloth.quant.linear4bit import Linear4bit
from sloth.text.tokenizer import Tokenizer

QUANTIZATIONS = (None, "nf4")
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
    base_compute: BaseCompute = None,
) -> Assembled:
    """Read a Hugging Face folder or a .gguf file into a network on `device` in `dtype`.

    quant: None keeps what is on disk, "nf4" quantizes every projection but the head.
    base_compute: what the network will be computed with; sizes that do not suit it raise
    KernelUnavailable before any weight is read.
    Raises UnknownModel, UnsupportedConfig, CheckpointMismatch.
    """
    if quant not in QUANTIZATIONS:
        raise ValueError(f"quant must be None or 'nf4', got {quant!r}")
    source, hf_config, tokenizer = _open(path)
    if is_wrapper(hf_config):
        source = TextTower(source)
        _tell_left_out(hf_config["model_type"], source.left_out)
    described = describe_config(hf_config, source.names, ignore_config)
    _check_stored_quantization(source)
    if described.wrapper is not None or described.config.tie_word_embeddings:
        # The tensors know better: a config may tie a head that has a matrix of its own.
        config = replace(described.config, tie_word_embeddings=not _has_own_head(source))
        described = replace(described, config=config)

    def projection(module_path: str, in_features: int, out_features: int, bias: bool) -> Projection:
        stored = f"{module_path}.weight{_BNB_MARK}" in source.names
        kind = Linear4bit if stored or quant == "nf4" else Linear
        return kind(in_features, out_features, bias)

    network = meta_network(described, projection)
    if base_compute is not None:
        require_fp8_blocks(network.model.layers)
    _fill(network, source, device, dtype)
    is_quantized = any(isinstance(module, Linear4bit) for module in network.modules())
    network.requires_grad_(not is_quantized)
    return Assembled(
        network.eval(), described.hf_config, tokenizer, is_quantized, described.wrapper
    )


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
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in source.names:
        return False
    if embedding not in source.names:  # which `_fill` then misses, by name
        return True
    return not torch.equal(source.tensor(head), source.tensor(embedding))


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
