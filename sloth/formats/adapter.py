"""PEFT adapters: adapter_config.json and adapter_model.safetensors, in and out.

PEFT's tensor names are ours behind `base_model.model.`; for a multimodal model's text tower see
adapter_wrapper.py. What this package cannot represent (trained biases, other methods than
LoRA) is refused by name rather than left out.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from sloth.errors import AdapterMismatch, CheckpointMismatch, one_line
from sloth.formats.adapter_wrapper import text_adapter, whole_patterns, whole_targets
from sloth.formats.checkpoint import read_header, safe_open, set_mode_by_umask
from sloth.formats.json_file import read_mapping
from sloth.formats.wrapper import is_left_out, text_name, whole_name
from sloth.lora import BASE_LAYER, EMBEDDING, HEAD, is_lora_name
from sloth.lora_config import LoraConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Whole matrices: trained in full, or the frozen ones that PEFT writes along with their LoRA.
_SAVED_MODULES = tuple(
    f"{path}{leaf}" for path in (HEAD, EMBEDDING) for leaf in (".weight", BASE_LAYER)
)

# What else PEFT writes of these two with save_embedding_layers=True, from inside its wrappers: the
# frozen matrix around trained rows, which counts, and for one trained in full the trained matrix
# once more and the base's, in whose place it is.
_ROWS = ".token_adapter.trainable_tokens_delta"
_AROUND_ROWS = ".token_adapter.base_layer.weight"
_REPEATED = (".modules_to_save.weight", ".original_module.weight")

# Settings that change what the adapter computes and that sloth does not: the value each must have.
_MUST_BE_OFF = (
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
)

# Ways of starting an adapter that take its product out of the base's matrices: the adapter then
# belongs to a base that no file holds. Some have more words after theirs, as pissa_niter_16.
_REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# What PEFT calls the list of blocks in every model that sloth builds.
_LAYERS = "layers"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read: its settings, tensors by our names, and the base it names."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    base_name: str | None


def save_adapter_files(
    folder: Path,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    *,
    base_name: str,
    revision: str | None,
    target_suffixes: list[str],
    for_wrapper: bool = False,
) -> None:
    """Write the two files into an existing folder.

    tensors: by our names. target_suffixes: what names exactly the adapted modules, so neither the
    layer subset nor exclusions need to be written. for_wrapper: under the names of a multimodal
    model whose text tower the base is.
    """
    targets: str | list[str] = target_suffixes
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    if for_wrapper:
        targets = whole_targets(target_suffixes)
        ranks, alphas = whole_patterns(config, tensors)
        tensors = {whole_name(name): tensor for name, tensor in tensors.items()}
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    settings: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "revision": revision,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.use_rslora,
    }
    # Older PEFT refuses keys it does not know, so these appear only when they say something.
    if ranks:
        settings["rank_pattern"] = ranks
    if alphas:
        settings["alpha_pattern"] = alphas
    if config.use_dora:
        settings["use_dora"] = True
    if config.trainable_token_indices:
        settings["trainable_token_indices"] = config.trainable_token_indices
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    named = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    set_mode_by_umask(folder / WEIGHTS_NAME)


def read_adapter(folder: Path) -> AdapterFiles:
    """Read a LoRA adapter that PEFT or sloth wrote.

    Raises AdapterMismatch for missing files, other methods, features sloth lacks, or tensors that
    belong to nothing.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise AdapterMismatch(f"{folder} holds no {CONFIG_NAME}; expected a PEFT adapter folder")
    settings = read_mapping(file, AdapterMismatch)
    config, tensors = text_adapter(_lora_config(settings, file), _read_tensors(folder))
    if settings.get("ensure_weight_tying"):
        config = _with_tied_head(config, tensors)
    if HEAD not in config.token_rows:  # those of a head tied to the embedding are the same ones
        tensors.pop(f"{HEAD}{_ROWS}", None)
    return AdapterFiles(config, tensors, settings.get("base_model_name_or_path"))


def _with_tied_head(config: LoraConfig, tensors: dict[str, Tensor]) -> LoraConfig:
    """The settings of an adapter on a tied embedding that PEFT made the head share.

    They name the embedding alone, while the file has the head's part, too: equal to the
    embedding's, or transposed for low-rank factors.
    """
    update: dict[str, object] = {}
    targets = config.targets
    if "embed_tokens" in config.modules_to_save and f"{HEAD}.weight" in tensors:
        update["modules_to_save"] = list(dict.fromkeys([*config.modules_to_save, HEAD]))
    if f"{HEAD}.lora_A.weight" in tensors:
        is_pattern = isinstance(targets, str)
        update["targets"] = f"(?:{targets})|{HEAD}" if is_pattern else [*targets, HEAD]
    if update:
        warnings.warn(
            "the adapter keeps embedding and head tied (ensure_weight_tying); sloth computes the "
            "same from it, but training on trains the two apart",
            stacklevel=3,
        )
    return config.model_copy(update=update)


def _lora_config(settings: dict[str, Any], file: Path) -> LoraConfig:
    if settings.get("peft_type") != "LORA":
        raise AdapterMismatch(
            f"{file} has peft_type {settings.get('peft_type')!r}; sloth reads LORA"
        )
    if settings.get("bias", "none") != "none":
        raise AdapterMismatch(f"{file} sets bias={settings['bias']!r}; sloth trains no biases")
    for key in _MUST_BE_OFF:
        if settings.get(key):
            raise AdapterMismatch(
                f"{file} sets {key}={settings[key]!r}, which sloth does not compute"
            )
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        raise AdapterMismatch(
            f"{file} sets init_lora_weights={start!r}, which also rewrote the base's matrices, so "
            "on the base as it is the adapter computes something else. Save it again in PEFT as "
            "plain LoRA, with save_pretrained(..., path_initial_model_for_weight_conversion="
            "<the adapter before training>), or merge it there with merge_and_unload (the one way "
            "for loftq) and load the merged model"
        )
    pattern = settings.get("layers_pattern") or _LAYERS
    if _LAYERS not in ([pattern] if isinstance(pattern, str) else pattern):
        raise AdapterMismatch(
            f"{file} sets layers_pattern={pattern!r}; the blocks of a model that sloth loads are "
            f"called {_LAYERS!r}"
        )
    targets = settings.get("target_modules")
    if not targets:
        raise AdapterMismatch(f"{file} names no target_modules")
    layers = settings.get("layers_to_transform")
    try:
        return LoraConfig(
            r=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            targets=targets,
            exclude=settings.get("exclude_modules"),
            layers=[layers] if isinstance(layers, int) else layers,
            rank_pattern=settings.get("rank_pattern") or {},
            alpha_pattern=settings.get("alpha_pattern") or {},
            use_rslora=settings.get("use_rslora", False),
            use_dora=settings.get("use_dora", False),
            modules_to_save=_leaves(settings.get("modules_to_save") or []),
            trainable_token_indices=settings.get("trainable_token_indices"),
        )
    except ValidationError as error:
        raise AdapterMismatch(f"{file} cannot be used: {one_line(error)}") from error


def _leaves(paths: list[str]) -> list[str]:
    """Last parts of paths, each once: PEFT takes `model.embed_tokens` for `embed_tokens`."""
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        pickle = folder / "adapter_model.bin"
        why = (
            f"only pickled weights ({pickle.name}), whose reading runs code; save it again "
            "with PEFT's save_pretrained(..., safe_serialization=True)"
            if pickle.is_file()
            else f"no {WEIGHTS_NAME}"
        )
        raise AdapterMismatch(f"{folder} holds {why}")
    try:
        read_header(file)
    except CheckpointMismatch as error:
        raise AdapterMismatch(str(error)) from error
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt", device="cpu") as opened:
        for key in opened.keys():  # noqa: SIM118 (no mapping)
            name = key.removeprefix(PREFIX)
            if name.endswith(_AROUND_ROWS):
                name = f"{name.removesuffix(_AROUND_ROWS)}.weight"
            repeated = next((leaf for leaf in _REPEATED if name.endswith(leaf)), None)
            once = name if repeated is None else f"{name.removesuffix(repeated)}.weight"
            if not key.startswith(PREFIX) or not _is_known(once):
                raise AdapterMismatch(f"{file} holds {key}, which sloth cannot place")
            if repeated is None:
                tensors[name] = opened.get_tensor(key).clone()
    return tensors


def _is_known(name: str) -> bool:
    known = is_lora_name(name) or text_name(name) in _SAVED_MODULES
    return known or is_left_out(name)
