"""LoRA over a whole network: where it goes, what is frozen, what is trained, and the merged weight.

Names here are the network's own (`model.layers.0.self_attn.q_proj`); `formats/adapter.py` adds and
strips PEFT's prefix. The matching rules are PEFT's, so an adapter means the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sloth.errors import AdapterMismatch, NoTargets
from sloth.kernels.ops.lora_linear import dense_weight
from sloth.linear import Projection
from sloth.lora_config import LoraConfig
from sloth.models.decoder import Decoder

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"


def projections(network: nn.Module) -> dict[str, Projection]:
    """Every projection by its path, in network order."""
    return {path: m for path, m in network.named_modules() if isinstance(m, Projection)}


def attach_lora(network: Decoder, config: LoraConfig, strict: bool = True) -> list[str]:
    """Freeze the network, fill the LoRA slots that `config` names, and return their paths.

    strict: refuse a listed target that matches nothing although others match; files written by
    other tools may list such names, so reading an adapter passes False.
    Raises NoTargets when nothing matches, AdapterMismatch when an adapter is already attached.
    """
    if has_adapter(network):
        raise AdapterMismatch(
            "the model already has an adapter; load the base again for another one"
        )
    if HEAD in config.modules_to_save or "embed_tokens" in config.modules_to_save:
        network.untie()  # trained apart, embedding and head are two matrices from here on
    targets = target_paths(network, config, strict)
    network.requires_grad_(False)
    for path in targets:
        module = projections(network)[path]
        module.attach_lora(
            config.rank_of(path), config.scale_of(path), config.dropout, _device_of(module)
        )
    for path in saved_module_paths(config):
        network.get_submodule(path).requires_grad_(True)
    return targets


def target_paths(network: Decoder, config: LoraConfig, strict: bool = True) -> list[str]:
    """Paths of the projections that get LoRA. Raises NoTargets, listing what exists."""
    every = list(projections(network))
    saved = set(saved_module_paths(config))
    candidates = [
        path
        for path in every
        if path not in saved
        and not (config.exclude is not None and _matches(path, config.exclude))
        and (config.layers is None or _layer_of(path) in config.layers)
    ]
    found = [path for path in candidates if _matches(path, config.targets)]
    listed = config.targets if isinstance(config.targets, list) else []
    idle = [name for name in listed if not any(_matches(path, [name]) for path in every)]
    if not found or (strict and idle):
        what = f"targets {idle!r}" if idle else f"targets={config.targets!r}"
        limits = "".join(
            f", {name}={value!r}"
            for name, value in (("exclude", config.exclude), ("layers", config.layers))
            if value is not None
        )
        names = sorted({path.rsplit(".", 1)[-1] for path in every})
        raise NoTargets(
            f"{what}{limits} match no projection. The model has {', '.join(names)}, in "
            f"{network.config.num_hidden_layers} layers. (embed_tokens and lm_head can be trained "
            "in full through modules_to_save.)"
        )
    return found


def saved_module_paths(config: LoraConfig) -> list[str]:
    """Paths of the modules that are trained in full."""
    return [HEAD if name == HEAD else EMBEDDING for name in config.modules_to_save]


def _matches(path: str, rule: str | list[str]) -> bool:
    if isinstance(rule, list):
        return any(path == name or path.endswith("." + name) for name in rule)
    if rule == ALL_LINEAR:
        return path != HEAD
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise NoTargets(f"targets={rule!r} is no regular expression: {error}") from error
    return bool(pattern.fullmatch(path)) or _matches(path, [rule])


def _layer_of(path: str) -> int | None:
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def _device_of(module: Projection) -> torch.device:
    base = module.base
    return base.device if isinstance(base, Tensor) else base.codes.device


def peft_targets(network: Decoder) -> list[str]:
    """The shortest `target_modules` list that names exactly the adapted projections in PEFT."""
    every = projections(network)
    adapted = [path for path, module in every.items() if module.has_lora]
    suffixes = sorted({path.rsplit(".", 1)[-1] for path in adapted})
    exact = [path for path in every if _matches(path, suffixes)] == adapted
    return suffixes if exact else adapted


def has_adapter(network: nn.Module) -> bool:
    """Whether any projection carries LoRA."""
    return any(module.has_lora for module in projections(network).values())


def is_lora_name(name: str) -> bool:
    """Whether a parameter name belongs to a LoRA matrix."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def adapter_tensors(network: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """What an adapter file holds, by our names: LoRA matrices and modules trained in full."""
    wanted = {f"{path}.weight" for path in saved_module_paths(config)}
    return {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if is_lora_name(name) or name in wanted
    }


def load_adapter_tensors(
    network: nn.Module, config: LoraConfig, tensors: dict[str, Tensor]
) -> None:
    """Copy adapter tensors into an attached network. Raises AdapterMismatch, naming misfits."""
    own = adapter_tensors(network, config)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, the model takes {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if missing or extra or misshapen:
        raise AdapterMismatch(
            "the adapter does not fit this model (was it trained on another base?): "
            + "; ".join(
                misshapen[:4]
                + [f"missing {name}" for name in missing[:4]]
                + [f"unexpected {name}" for name in extra[:4]]
            )
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def merged_weight(module: Projection) -> Tensor:
    """W + s B A [out, in] in fp32 (fp64 for an fp64 base), dequantised first if need be."""
    base = module.base
    dtype = (
        torch.float64 if isinstance(base, Tensor) and base.dtype == torch.float64 else torch.float32
    )
    weight = dense_weight(base, dtype).detach()
    lora = module.lora
    if lora is None:
        return weight
    return weight + lora.scale * (lora.B.detach().to(dtype) @ lora.A.detach().to(dtype))


@contextmanager
def adapter_disabled(network: nn.Module) -> Iterator[None]:
    """Inside, the network computes as its base alone."""
    modules = [module for module in projections(network).values() if module.lora_enabled]
    for module in modules:
        module.lora_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.lora_enabled = True


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a 4-bit code counts as one parameter."""
    stored = {path: module for path, module in projections(network).items()}
    total = trainable = 0
    for parameter in network.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    for module in stored.values():
        if not isinstance(module.base, Tensor):
            total += module.in_features * module.out_features
    return total, trainable
