"""Adapters of a multimodal model's text tower: PEFT's names for it, out and in.

PEFT finds modules by their path in Transformers' class of the whole model. There the text model's
`model.layers.0.self_attn.q_proj` is `model.language_model.layers.0.self_attn.q_proj`; an adapter
under the text model's own names would be left out with no more than a warning. And a bare `q_proj`
names projections of the vision tower as well, which have none of the text model's adapter.

So what goes out names the tower in full, and what comes in is brought back, from today's prefix and
from that of files written before Transformers 4.52. Adapters on the vision tower, which PEFT adds
when targets are bare names, do nothing for text and are left out, by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import Tensor

from sloth.formats.wrapper import is_left_out, text_name, whole_name
from sloth.lora_config import LoraConfig


def adapted_paths(names: Iterable[str]) -> list[str]:
    """Modules that tensors named like `<module>.lora_A.weight` belong to, each once."""
    return list(dict.fromkeys(name.split(".lora_")[0] for name in names if ".lora_" in name))


def whole_targets(targets: list[str]) -> str | list[str]:
    """PEFT's `target_modules` for the whole model that name the text tower's modules alone.

    targets: module paths, or the last parts of paths, of the text model. Last parts become one
    regular expression, since a list of them reaches into the vision tower.
    """
    if any("." in target for target in targets):
        return [whole_name(target) for target in targets]
    inside = [target for target in targets if target != "lm_head"]
    pattern = rf"{re.escape(whole_name('model.'))}(.*\.)?({'|'.join(inside)})"
    if not inside:
        return targets
    return f"({pattern}|lm_head)" if "lm_head" in targets else pattern


def whole_patterns(
    config: LoraConfig, names: Iterable[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern of the whole model: each module that differs, by its path."""
    paths = {whole_name(path): path for path in adapted_paths(names)}
    return _differing(config, paths)


def text_adapter(
    config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A whole model's adapter as the text model's: settings, and tensors by its names.

    Lists of targets are renamed. A regular expression cannot be, so the tensors say what it
    matched. An adapter under the text model's names comes back as it is.
    """
    if all(text_name(name) == name and not is_left_out(name) for name in tensors):
        return config, tensors
    left_out = [name for name in tensors if is_left_out(name)]
    if left_out:
        warnings.warn(
            f"the adapter was made for a model that reads images too; sloth loads its text model "
            f"and leaves out {len(left_out)} tensors (such as {left_out[0]})",
            stacklevel=3,
        )
    kept = {name: tensor for name, tensor in tensors.items() if not is_left_out(name)}
    paths = {text_name(path): path for path in adapted_paths(kept)}
    ranks, alphas = _differing(config, paths)
    update: dict[str, object] = {"rank_pattern": ranks, "alpha_pattern": alphas}
    if isinstance(config.targets, str) or isinstance(config.exclude, str):
        update |= {"targets": list(paths), "exclude": None, "layers": None}
    else:
        update["targets"] = [text_name(target) for target in config.targets]
        update["exclude"] = config.exclude and [text_name(name) for name in config.exclude]
    return config.model_copy(update=update), {text_name(n): t for n, t in kept.items()}


def _differing(
    config: LoraConfig, paths: dict[str, str]
) -> tuple[dict[str, int], dict[str, float]]:
    """{path to write: rank or alpha} where it is not the adapter's; paths: to write -> to match."""
    ranks = {new: config.rank_of(old) for new, old in paths.items()}
    alphas = {new: config.alpha_of(old) for new, old in paths.items()}
    return (
        {path: rank for path, rank in ranks.items() if rank != config.r},
        {path: alpha for path, alpha in alphas.items() if alpha != config.alpha},
    )
