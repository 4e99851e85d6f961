"""LoRA over a whole network: where it goes, what is frozen, what is trained, and the merged weight.

Names here are the network's own (`model.layers.0.self_attn.q_proj`); `formats/adapter.py` adds and
strips PEFT's prefix. The matching rules are PEFT's, so an adapter means the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sloth.embedding import Embedding, TokenRows
from sloth.errors import AdapterMismatch, NoTargets
from sloth.kernels.ops.dora import gains_of
from sloth.kernels.ops.lora_linear import dense_weight
from sloth.linear import Projection
from sloth.lora_config import LoraConfig
from sloth.models.decoder import Decoder

FIRST_SEED = 0  # of an adapter that no run has given its own
ALL_LINEAR = "all-linear"
HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"

# Of parameters that are an adapter's own, in PEFT's spelling.
ADAPTER_SUFFIXES = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_magnitude_vector",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".token_adapter.trainable_tokens_delta",
)
BASE_LAYER = ".base_layer.weight"


def projections(network: nn.Module) -> dict[str, Projection]:
    """Every projection by its path, in network order."""
    return {path: m for path, m in network.named_modules() if isinstance(m, Projection)}


def attach_lora(network: Decoder, config: LoraConfig, strict: bool = True) -> list[str]:
    """Freeze the network, fill the LoRA slots that `config` names, and return their paths.

    The start values are those of `draw_lora` with FIRST_SEED, whatever was drawn before.
    strict: refuse a listed target, exclusion, layer or pattern that matches nothing; files written
    by other tools may list such names, so reading an adapter passes False.
    Raises NoTargets when nothing matches, AdapterMismatch when an adapter is already attached or
    one module is asked to be adapted in two ways.
    """
    if has_adapter(network):
        raise AdapterMismatch(
            "the model already has an adapter; load the base again for another one"
        )
    targets = target_paths(network, config, strict)
    _refuse_conflicts(network, config, targets)
    if config.modules_to_save:
        network.untie()  # trained apart, embedding and head are two matrices from here on
    elif EMBEDDING in targets or HEAD in targets:
        network.untie(share=True)
    network.requires_grad_(False)
    for path in targets:
        module: Any = network.get_submodule(path)
        rank, scale = config.rank_of(path), config.scale_of(path)
        if isinstance(module, Embedding):
            module.attach_lora(rank, scale)
        else:
            device = _device_of(module)
            module.attach_lora(rank, scale, config.dropout, device, config.use_dora)
    for path in saved_module_paths(config):
        network.get_submodule(path).requires_grad_(True)
    for name, ids in config.token_rows.items():
        module = network.get_submodule(_vocabulary_path(name))
        module.token_adapter = TokenRows(module.weight, ids)
    draw_lora(network, FIRST_SEED)
    return targets


def _refuse_conflicts(network: Decoder, config: LoraConfig, targets: list[str]) -> None:
    """Raise AdapterMismatch for what cannot work, saying what would."""
    if config.use_dora and EMBEDDING in targets:
        raise AdapterMismatch(
            "use_dora scales the rows of linear projections, and embed_tokens is a table of rows "
            "by token; leave embed_tokens out of targets, or train it through modules_to_save or "
            "trainable_token_indices"
        )
    num_rows = len(network.model.embed_tokens.weight)
    for name, ids in config.token_rows.items():
        if _vocabulary_path(name) in targets:
            raise AdapterMismatch(
                f"{name} is in targets and in trainable_token_indices, which new tokens join by "
                f"themselves; a row has one adapter. Leave {name} out of targets, or train it in "
                "full through modules_to_save"
            )
        if max(ids) >= num_rows:
            raise AdapterMismatch(
                f"trainable_token_indices asks for row {max(ids)} of {name}, the model has "
                f"{num_rows}; model.add_tokens adds rows"
            )
    rows = config.token_rows
    split = bool(config.modules_to_save) or EMBEDDING in targets or HEAD in targets
    if network.tied and ("lm_head" in rows or (rows and split)):
        alone = "lm_head" not in rows
        raise AdapterMismatch(
            "the head is tied to embed_tokens, so their trained rows are the same ones: "
            + (
                "leave modules_to_save, and embed_tokens and lm_head as targets, out"
                if alone
                else "name embed_tokens alone in trainable_token_indices"
            )
        )


def target_paths(network: Decoder, config: LoraConfig, strict: bool = True) -> list[str]:
    """Paths of the projections that get LoRA. Raises NoTargets, listing what exists."""
    every = [EMBEDDING, *projections(network)]
    if network.tied:
        every.append(HEAD)
    saved = set(saved_module_paths(config))
    candidates = [
        path
        for path in every
        if path not in saved
        and not (config.exclude is not None and _matches(path, config.exclude, "exclude"))
        and (config.layers is None or _layer_of(path) in config.layers)
    ]
    found = [path for path in candidates if _matches(path, config.targets)]
    listed = config.targets if isinstance(config.targets, list) else []
    idle = _idle(listed, every)
    names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in every}))
    there = f"The model has {names}, in {network.config.num_hidden_layers} layers."
    if not found or (strict and idle):
        what = f"targets {idle!r}" if idle else f"targets={config.targets!r}"
        limits = "".join(
            f", {name}={value!r}"
            for name, value in (("exclude", config.exclude), ("layers", config.layers))
            if value is not None
        )
        raise NoTargets(
            f"{what}{limits} match no projection. {there} (embed_tokens and lm_head can also be "
            "trained in full through modules_to_save.)"
        )
    if strict:
        kept = _idle(config.exclude, every, "exclude")
        if kept:
            raise NoTargets(f"exclude {kept} matches no projection. {there}")
        _refuse_idle(network, config, found)
    return found


def _idle(rule: str | list[str] | None, paths: list[str], setting: str = "targets") -> list[str]:
    """What matches none of these modules: of a list its names, or the one regular expression."""
    if isinstance(rule, str):
        return [] if any(_matches(path, rule, setting) for path in paths) else [rule]
    return [name for name in rule or [] if not any(_matches(path, [name]) for path in paths)]


def _refuse_idle(network: Decoder, config: LoraConfig, found: list[str]) -> None:
    """Raise NoTargets for layers that are not there and patterns that match no adapted module."""
    num_layers = network.config.num_hidden_layers
    absent = [layer for layer in config.layers or [] if not 0 <= layer < num_layers]
    if absent:
        raise NoTargets(
            f"layers {absent} are not in the model, whose {num_layers} layers count from 0"
        )
    for name, patterns in config.idle_patterns(found).items():
        adapted = sorted({path.rsplit(".", 1)[-1] for path in found})
        raise NoTargets(
            f"{name} {patterns} matches none of the adapted modules: {', '.join(adapted)}"
        )


def saved_module_paths(config: LoraConfig) -> list[str]:
    """Paths of the modules that are trained in full."""
    return [_vocabulary_path(name) for name in config.modules_to_save]


def _vocabulary_path(name: str) -> str:
    """Path of `embed_tokens` or `lm_head`."""
    return HEAD if name == HEAD else EMBEDDING


def _matches(path: str, rule: str | list[str], setting: str = "targets") -> bool:
    if isinstance(rule, list):
        return any(path == name or path.endswith("." + name) for name in rule)
    if rule == ALL_LINEAR:
        return path not in (HEAD, EMBEDDING)
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise NoTargets(f"{setting}={rule!r} is no regular expression: {error}") from error
    return bool(pattern.fullmatch(path)) or _matches(path, [rule])


def _layer_of(path: str) -> int | None:
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def _device_of(module: Projection) -> torch.device:
    base = module.base
    return base.device if isinstance(base, Tensor) else base.codes.device


def peft_targets(network: Decoder) -> list[str]:
    """The shortest `target_modules` list that names exactly the adapted modules in PEFT."""
    every: dict[str, Any] = {EMBEDDING: network.model.embed_tokens, **projections(network)}
    adapted = [path for path, module in every.items() if module.has_lora]
    suffixes = sorted({path.rsplit(".", 1)[-1] for path in adapted})
    exact = [path for path in every if _matches(path, suffixes)] == adapted
    return suffixes if exact else adapted


def has_adapter(network: nn.Module) -> bool:
    """Whether any module carries an adapter."""
    return any(is_lora_name(name) for name, _ in network.named_parameters())


def is_lora_name(name: str) -> bool:
    """Whether a parameter is an adapter's own: a LoRA matrix, DoRA's magnitudes, trained rows."""
    return name.endswith(ADAPTER_SUFFIXES)


def adapter_tensors(network: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """What an adapter file holds, by our names: LoRA matrices and modules trained in full."""
    wanted = {f"{path}.weight" for path in saved_module_paths(config)}
    return {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if is_lora_name(name) or name in wanted
    }


def load_adapter_tensors(
    network: Decoder, config: LoraConfig, tensors: dict[str, Tensor]
) -> list[str]:
    """Copy adapter tensors into an attached network. Raises AdapterMismatch, naming misfits.

    PEFT may write frozen matrices of embedding and head along: `<module>.base_layer.weight` of
    adapted ones, `<module>.weight` of a resized vocabulary or with save_embedding_layers=True. They
    take the place of the network's, as they do there. Returns the names of those that differ from
    what the network had, which the adapter has to go on carrying.
    """
    own = adapter_tensors(network, config)
    along = frozen_along(network, tensors.keys() - own.keys())
    own |= along
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
    both = [name for path in (EMBEDDING, HEAD) if (name := f"{path}.weight") in along]
    if network.tied and len(both) == 2 and not torch.equal(*(tensors[name] for name in both)):
        raise AdapterMismatch(
            f"the adapter holds two matrices, {' and '.join(both)}, that are one in this model; it "
            "was trained on a base whose head is not tied"
        )
    differing = [
        name for name, frozen in along.items() if not torch.equal(frozen, tensors[name].to(frozen))
    ]
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return differing


def frozen_along(network: Decoder, names: Collection[str]) -> dict[str, Tensor]:
    """Those matrices [V, D] of embedding and head that `names` of an adapter's file speak of."""
    embedding = network.model.embed_tokens
    owners = {EMBEDDING: embedding, HEAD: embedding if network.tied else network.lm_head}
    return {
        f"{path}{leaf}": owner.get_parameter("weight").detach()
        for path, owner in owners.items()
        for leaf in (".weight", BASE_LAYER)
        if owner is not None and f"{path}{leaf}" in names
    }


def draw_lora(network: nn.Module, seed: int) -> None:
    """Start values of every low-rank matrix, a pure function of `seed` and the device: torch's own
    generators are neither read nor moved.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for module in _adapted(network):
        device = module.lora_factors[0].device
        if device.type == "meta":
            continue
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        module.draw_lora(generators[device])


def redraw_lora(network: nn.Module, seed: int) -> bool:
    """`draw_lora` with a run's seed, if the matrices are still those that attaching drew; else, as
    they were trained, loaded or set by hand, they stay. Whether it drew.
    """
    held = [(p, p.detach().clone()) for module in _adapted(network) for p in module.lora_factors]
    draw_lora(network, FIRST_SEED)
    is_fresh = all(torch.equal(parameter, before) for parameter, before in held)
    if is_fresh:
        draw_lora(network, seed)
        return True
    with torch.no_grad():
        for parameter, before in held:
            parameter.copy_(before)
    return False


def _adapted(network: nn.Module) -> list[Any]:
    """Modules with low-rank matrices, in network order."""
    kinds = Projection | Embedding
    return [m for m in network.modules() if isinstance(m, kinds) and m.has_lora]


def merged_weight(module: Projection) -> Tensor:
    """W + s B A [out, in] in fp32 (fp64 for an fp64 base), dequantised first if need be; with
    DoRA its rows scaled to their magnitudes."""
    base = module.base
    dtype = (
        torch.float64 if isinstance(base, Tensor) and base.dtype == torch.float64 else torch.float32
    )
    weight = dense_weight(base, dtype).detach()
    if module.token_adapter is not None and module.lora_enabled:
        weight = module.token_adapter.merged(weight).detach()
    lora = module.lora
    if lora is None:
        return weight
    weight = weight + lora.scale * (lora.B.detach().to(dtype) @ lora.A.detach().to(dtype))
    if lora.magnitude is not None:
        weight *= gains_of(lora.magnitude.m.detach().to(dtype), weight.norm(dim=1))[:, None]
    return weight


@contextmanager
def adapter_disabled(network: nn.Module) -> Iterator[None]:
    """Inside, the network computes as its base alone."""
    every = [m for m in network.modules() if isinstance(m, Projection | Embedding)]
    modules = [module for module in every if module.lora_enabled]
    for module in modules:
        module.lora_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.lora_enabled = True


@contextmanager
def adapters_held(network: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, DoRA's norms are those at the start: for factors that do not move meanwhile.

    Taking them reads every adapted matrix, which one token at a time would pay again and again, as
    it would the factors' rounding to the `dtype` of the products, None where they keep their own.
    """
    modules = list(projections(network).values())
    for module in modules:
        module.hold_adapter(dtype)
    try:
        yield
    finally:
        for module in modules:
            module.release_adapter()


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
