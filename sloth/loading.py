"""`load`: a name, repo id, folder or .gguf file -> a ready `Model`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from sloth.assemble import assemble
from sloth.dtypes import resolve_dtype
from sloth.errors import TokenizerMissing
from sloth.formats.adapter import read_adapter
from sloth.formats.hub import read_license, resolve
from sloth.kernels.dispatch import check_level
from sloth.kernels.fp8 import check_base_compute, require_fp8
from sloth.lora import load_adapter_tensors
from sloth.machine import resolve_device
from sloth.model import Model
from sloth.new_tokens import grow_network, rows_of_adapter
from sloth.text.tokenizer import Tokenizer

_APPROXIMATE = (
    "base_compute='fp8' is an approximation: after 400 steps on real text the adapter of a 135M "
    "model had a held-out loss 0.7% above that trained without it, more than seeds differ, that of "
    "a 0.5B model 0.2%, less than they do; compare before you rely on it"
)


def load(
    name: str | Path,
    *,
    quant: str | None = None,
    adapter: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    level: str = "auto",
    base_compute: str | None = None,
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
) -> Model:
    """Load a model for training or use.

    name: alias ("llama-3.2-1b"), hub repository id, Hugging Face folder, or .gguf file.
    quant: None keeps what is on disk (a bitsandbytes 4-bit folder stays 4-bit), "nf4" quantizes.
    adapter: PEFT adapter folder to attach, to use or to train on; the base is then frozen. One with
    new tokens brings their rows and the tokenizer beside it.
    device: "auto" is CUDA when there is one. dtype: "auto" is bf16 on a GPU, fp32 on a CPU.
    level: "auto", or a kernel level by name: reference, ops, fused.
    base_compute: "fp8" freezes the base and multiplies by its matrices in 8-bit floats wherever the
    fused level runs, an approximation that trains faster (`kernels/fp8.py`); on GPUs of compute
    capability 8.9 or above in bf16, emulated on a CPU. Files are written from the base as loaded,
    and held-out losses are taken of it. Warns of what it costs in quality.
    revision: branch, tag or commit on the hub. ignore_config: config.json keys to leave unread.
    A dense load leaves every parameter trainable; an NF4 load, or one with base_compute, none until
    `add_lora`.
    Raises UnknownModel, UnsupportedConfig, CheckpointMismatch, AdapterMismatch, ValueError for a
    setting that there is not, and KernelUnavailable for a level that there is not or that cannot
    run; settings are looked at before any file, sizes that base_compute cannot multiply before any
    weight.
    """
    check_level(level)
    compute = check_base_compute(base_compute)
    where = resolve_device(device)
    computed = resolve_dtype(dtype, where)
    if compute is not None:
        require_fp8(where, computed)
    found = resolve(str(name), revision)
    parts = assemble(
        Path(found.path),
        quant=quant,
        device=where,
        dtype=computed,
        ignore_config=ignore_config,
        base_compute=compute,
    )
    if compute is not None:
        warnings.warn(_APPROXIMATE, stacklevel=2)
        parts.network.requires_grad_(False)
    model = Model(
        parts.network,
        parts.hf_config,
        parts.tokenizer,
        name=found.repo_id or str(found.path),
        revision=found.revision,
        license=read_license(Path(found.path)),
        wrapper=parts.wrapper,
        requested_level=level,
        is_quantized=parts.is_quantized,
        frozen_base=adapter is not None,
        base_compute=compute,
    )
    if adapter is not None:
        adapter = Path(adapter).expanduser()
        files = read_adapter(adapter)
        grow_network(model.network, rows_of_adapter(files.config, files.tensors), "mean")
        _take_larger_tokenizer(model, adapter)
        model._attach(files.config, strict=False)
        model.carried = load_adapter_tensors(model.network, files.config, files.tensors)
    return model


def _take_larger_tokenizer(model: Model, adapter: Path) -> None:
    """Use the tokenizer beside an adapter where it has tokens that the base's has not."""
    try:
        tokenizer = Tokenizer.from_folder(adapter)
    except TokenizerMissing:
        return
    if model.has_tokenizer and tokenizer.vocab_size > model.tokenizer.vocab_size:
        model.take_tokenizer(tokenizer)
