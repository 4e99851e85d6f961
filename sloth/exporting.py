"""Files out: the adapter, the merged model, the base. Each is read back and compared before it
counts.

A folder is written beside its final name, loaded with sloth's own loader, and only then renamed, so
a folder under the final name is whole. Of a model the logits on fixed probe tokens are compared
with those of the model in memory, of an adapter every tensor and every scale.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sloth.assemble import assemble
from sloth.dtypes import dtype_name, resolve_dtype
from sloth.embedding import Embedding
from sloth.errors import AdapterMismatch, CheckpointMismatch, OutputExists
from sloth.formats.adapter import read_adapter, save_adapter_files
from sloth.formats.checkpoint import write_safetensors
from sloth.kernels.ops.lora_linear import dense_weight
from sloth.kernels.ops.nf4 import NF4Weight
from sloth.linear import Projection
from sloth.lora import (
    EMBEDDING,
    adapter_tensors,
    frozen_along,
    is_lora_name,
    merged_weight,
    peft_targets,
    projections,
)
from sloth.models.mode import evaluating
from sloth.quant.bnb import bnb_quantization_config, bnb_tensors
from sloth.quant.nf4 import quantize_nf4
from sloth.redact import Redactor
from sloth.train.card import Subject, write_card

if TYPE_CHECKING:
    from sloth.model import Model

PROBE_TOKENS = 16

# Allowed RMS difference of the logits over their own RMS, by the narrowest dtype on the way. A
# wrong or missing tensor gives about 1; one rounding of each weight gives about the dtype's
# epsilon.
_ALLOWED_ERROR = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 0.02,
    torch.bfloat16: 0.05,
}
# NF4 rounds weights by about 9% RMS, so this only tells a quantized model from a broken one.
_ALLOWED_NF4_ERROR = 0.7
# Of its size in the compute dtype, what a model that is read back may take beside the first.
_ROOM = 1.3


def save_adapter(model: Model, folder: Path) -> Path:
    """PEFT files: adapter_config.json and adapter_model.safetensors; the tokenizer beside them."""
    if model.lora_config is None:
        raise AdapterMismatch("the model has no adapter to save; call add_lora or train first")
    config, network = model.lora_config, model.network
    carried = frozen_along(network, model.carried)
    # Copies: a file cannot hold one tensor under several names, and a tied matrix has two.
    tensors = adapter_tensors(network, config) | {n: t.clone() for n, t in carried.items()}
    tensors = {name: tensor.to("cpu") for name, tensor in tensors.items()}
    with published(folder) as partial:
        save_adapter_files(
            partial,
            config,
            tensors,
            base_name=Redactor().text(model.name),
            revision=model.revision,
            target_suffixes=peft_targets(network),
            for_wrapper=model.wrapper is not None,
        )
        if model.has_tokenizer:
            model.tokenizer.save(partial)
        write_card(partial, _subject(model, is_adapter=True), model.training)
        files = read_adapter(partial)
        adaptable: dict[str, Any] = {EMBEDDING: network.model.embed_tokens, **projections(network)}
        for path, module in adaptable.items():
            if module.has_lora and files.config.scale_of(path) != module.lora_scale:
                raise AdapterMismatch(f"read back, the scale of {path} differs from the model's")
        names = sorted(files.tensors.keys() | tensors.keys())
        differing = [n for n in names if not _is_same(files.tensors.get(n), tensors.get(n))]
        if differing:
            raise AdapterMismatch(
                f"read back, {len(differing)} of the adapter's tensors are not those of the model, "
                f"such as {differing[0]}"
            )
    return folder


def save_merged(model: Model, folder: Path, dtype: str | torch.dtype | None = None) -> Path:
    """Dense Hugging Face folder of W + s B A, formed in fp32 and cast once."""
    target = model.dtype if dtype is None else resolve_dtype(dtype, model.device)
    tensors = ((name, tensor.to(target)) for name, tensor in merged_tensors(model))
    return _save_folder(model, folder, tensors, target, model.network.tied, has_card=True)


def merged_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the dense model, W + s B A in fp32, one at a time."""
    for name, module, parameter in _entries(model):
        if isinstance(module, Projection) and name.endswith(".weight"):
            parameter = merged_weight(module)
        elif isinstance(module, Embedding):
            parameter = module.merged_weight()
        yield name, parameter.detach()


def merged_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `merged_tensors` gives, in its order."""
    return {
        name: (module.out_features, module.in_features)
        if isinstance(module, Projection) and name.endswith(".weight")
        else tuple(parameter.shape)
        for name, module, parameter in _entries(model)
    }


def save_base(model: Model, folder: Path, quant: str | None = None) -> Path:
    """The model without its adapter: dense in the compute dtype, or bitsandbytes NF4.

    With quant="nf4" 4-bit projections keep their codes; a dense model's are quantized, head
    excepted.
    """
    if quant not in (None, "nf4"):
        raise ValueError(f"quant must be None or 'nf4', got {quant!r}")

    kept_dense: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, module, parameter in _entries(model):
            if model.base_is_tied and name == "lm_head.weight":
                continue  # untied only to train it; the base shares the embedding
            value = model.originals.get(name, parameter).detach()
            if not isinstance(module, Projection) or not name.endswith(".weight"):
                yield name, value.to(model.dtype)
            elif quant is None:
                base = module.base if isinstance(module.base, NF4Weight) else value
                yield name, dense_weight(base, model.dtype)
            elif isinstance(module.base, NF4Weight):
                yield from bnb_tensors(name, module.base).items()
            elif name == "lm_head.weight" or model.is_quantized:
                kept_dense.append(name.removesuffix(".weight"))
                yield name, value.to(model.dtype)
            else:
                yield from bnb_tensors(name, quantize_nf4(value.to(model.dtype))).items()

    with model.adapter_off() if model.has_adapter else nullcontext():
        return _save_folder(
            model, folder, tensors(), model.dtype, model.base_is_tied, quant, kept_dense
        )


def _is_same(read: Tensor | None, written: Tensor | None) -> bool:
    if read is None or written is None:
        return False
    return read.dtype == written.dtype and torch.equal(read, written)


def _subject(model: Model, is_adapter: bool) -> Subject:
    return Subject(model.name, model.revision, model.license, is_adapter, model.is_quantized)


def _entries(model: Model) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    """(name, owner, parameter) of every tensor of the base, in network order."""
    for path, module in model.network.named_modules():
        if path.endswith((".lora_A", ".lora_B", ".token_adapter")):
            continue
        if isinstance(module, Projection):
            yield f"{path}.weight", module, module.weight
            if module.bias is not None:
                yield f"{path}.bias", module, module.bias
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                if not is_lora_name(f"{path}.{leaf}"):
                    yield f"{path}.{leaf}", module, parameter


def _save_folder(
    model: Model,
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    tied: bool,
    quant: str | None = None,
    kept_dense: list[str] | None = None,
    has_card: bool = False,
) -> Path:
    with published(folder) as partial:
        write_safetensors(partial, tensors)
        config: dict[str, Any] = model.config.to_hf()
        config |= {"dtype": dtype_name(dtype), "tie_word_embeddings": tied}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in model.hf_config:
                config[key] = model.hf_config[key]
        if quant is not None:
            settings = bnb_quantization_config(dtype)
            if kept_dense and kept_dense != ["lm_head"]:
                settings["llm_int8_skip_modules"] = sorted({"lm_head", *kept_dense})
            config["quantization_config"] = settings
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if model.has_tokenizer:
            model.tokenizer.save(partial)
        if has_card:
            write_card(partial, _subject(model, is_adapter=False), model.training)
        _verify(model, partial, dtype, is_requantized=quant is not None and not model.is_quantized)
    return folder


def _verify(model: Model, folder: Path, dtype: torch.dtype, is_requantized: bool) -> None:
    """Load the folder and compare logits; raises CheckpointMismatch when they differ."""
    expected = probe_logits(model.network, model.device)
    device = _device_with_room(model)
    again = assemble(folder, quant=None, device=device, dtype=model.dtype).network
    got = probe_logits(again, device).to(expected.device)
    error = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    allowed = max(_ALLOWED_ERROR[dtype], _ALLOWED_ERROR[model.dtype])
    if is_requantized:
        allowed = _ALLOWED_NF4_ERROR
    if not error <= allowed:
        raise CheckpointMismatch(
            f"read back, the saved model's logits differ from the model's by {error:.2g} of their "
            f"size, more than {allowed:.2g}; nothing was kept under {folder.name}"
        )


@torch.no_grad()
def probe_logits(network: Any, device: torch.device) -> Tensor:
    """Logits [1, 16, V] in fp32 of fixed random tokens, dropout off, by the matrices as stored."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = network.config.vocab_size
    tokens = torch.randint(vocabulary, (1, min(PROBE_TOKENS, vocabulary)), generator=generator)
    with evaluating(network), network.as_stored():
        logits: Tensor = network(tokens.to(device)).float()
    return logits


def _device_with_room(model: Model) -> torch.device:
    """The model's device if a second copy fits beside it, else the CPU."""
    if model.device.type != "cuda":
        return model.device
    num_elements = sum(math.prod(shape) for shape in merged_shapes(model).values())
    free_bytes, _ = torch.cuda.mem_get_info(model.device)
    has_room = free_bytes > _ROOM * num_elements * model.dtype.itemsize
    return model.device if has_room else torch.device("cpu")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the final name only if nothing failed inside."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExists(f"{folder} exists and is not empty; choose another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
