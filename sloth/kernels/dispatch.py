"""Kernel levels: how much of a block runs as hand-written code. Chosen once, reported, never
guessed.

    reference   eager formulas in Hugging Face's order of casts (bit-equal to its eager mode)
    ops         every op is a hand-derived autograd Function
    fused       the whole block is one Function, its fused twin; the base must be frozen

Inside `ops` and `fused` each op has two engines, torch and Triton; `kernels.engine` picks by
tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from sloth.errors import KernelUnavailable
from sloth.kernels.fp8 import BaseCompute
from sloth.kernels.layer import Wiring
from sloth.kernels.ops import (
    add_rms_norm,
    attention,
    glu,
    linear_cross_entropy,
    linear_log_probs,
    lora_linear,
    rms_norm,
    rope,
)
from sloth.kernels.ops.lora_linear import Base, LoraOperands

Level = Literal["reference", "ops", "fused"]
LEVELS: tuple[Level, ...] = get_args(Level)

# model_type -> module that holds the fused twin of its block.
TWINS = {
    "llama": "sloth.kernels.llama",
    "mistral": "sloth.kernels.mistral",
    "ministral": "sloth.kernels.mistral",
    "ministral3": "sloth.kernels.mistral",
    "qwen2": "sloth.kernels.qwen2",
    "qwen3": "sloth.kernels.qwen3",
    "gemma": "sloth.kernels.gemma",
    "gemma2": "sloth.kernels.gemma2",
    "gemma3_text": "sloth.kernels.gemma3",
    "smollm3": "sloth.kernels.smollm3",
}


@dataclass(frozen=True)
class Ops:
    """The op table a module computes through; one instance per level."""

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope: Callable[..., tuple[Tensor, Tensor]]
    glu: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    lora_linear: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    linear_log_probs: Callable[..., Tensor]


def _lora_linear_reference(
    x: Tensor, base: Base, bias: Tensor | None, lora: LoraOperands | None, training: bool = False
) -> Tensor:
    mask = lora_linear.draw_dropout_mask(x, lora, training)
    return lora_linear.lora_linear_reference(x, base, bias, lora, mask)


REFERENCE = Ops(
    rms_norm=rms_norm.rms_norm_reference,
    add_rms_norm=add_rms_norm.add_rms_norm_reference,
    rope=rope.rope_reference,
    glu=glu.glu_reference,
    attention=attention.attention_reference,
    lora_linear=_lora_linear_reference,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy_reference,
    linear_log_probs=linear_log_probs.linear_log_probs_reference,
)
OPS = Ops(
    rms_norm=rms_norm.rms_norm,
    add_rms_norm=add_rms_norm.add_rms_norm,
    rope=rope.rope,
    glu=glu.glu,
    attention=attention.attention,
    lora_linear=lora_linear.lora_linear,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    linear_log_probs=linear_log_probs.linear_log_probs,
)


def ops_of(level: Level) -> Ops:
    """Op table of a level; the fused level uses it outside its blocks."""
    return REFERENCE if level == "reference" else OPS


def has_twin(model_type: str) -> bool:
    """Whether a family's block has a fused twin; without one the fused level cannot run."""
    return model_type in TWINS


def wiring_of(model_type: str) -> Wiring:
    """What a family's fused twin is made of. Raises KernelUnavailable without one."""
    return _twin_module(model_type).WIRING


def twin_of(model_type: str) -> Callable[..., Tensor]:
    """The fused twin of a family's block: (module, hidden_BTD, context, workspace) -> hidden_BTD.

    workspace: the network's scratch; a twin that is given none makes its own. Raises
    KernelUnavailable without a twin.
    """
    return _twin_module(model_type).block


def _twin_module(model_type: str) -> Any:
    if not has_twin(model_type):
        raise KernelUnavailable(_no_twin(model_type))
    return importlib.import_module(TWINS[model_type])


def _no_twin(model_type: str) -> str:
    return f"{model_type} has no fused twin yet"


def check_level(requested: str) -> None:
    """Raise KernelUnavailable for a level that there is not."""
    if requested not in ("auto", *LEVELS):
        raise KernelUnavailable(f"level {requested!r} is unknown; known: auto, {', '.join(LEVELS)}")


def choose_level(
    requested: str, model_type: str, trainable_base: bool, base_compute: BaseCompute = None
) -> tuple[Level, str]:
    """Level to run and the reason, for `sloth info`.

    requested: "auto" or a level by name. trainable_base: whether a parameter inside the blocks,
    other than an adapter's, needs a gradient. base_compute: not None asks for the fused level, the
    only one that has it. Raises KernelUnavailable when a level asked for cannot run.
    """
    obstacle = None
    if not has_twin(model_type):
        obstacle = _no_twin(model_type)
    elif trainable_base:
        obstacle = "the base is trainable, and the fused twin derives no base gradients"
    if base_compute is not None:
        if obstacle is None and requested not in ("auto", "fused"):
            obstacle = f"level={requested!r} was asked for"
        if obstacle:
            raise KernelUnavailable(
                f"base_compute={base_compute!r} is computed by the fused level alone, and it "
                f"cannot run: {obstacle}. Load without base_compute"
            )
        return "fused", f"base_compute={base_compute!r}: frozen matrices in 8 bits, approximately"
    if requested == "auto":
        if obstacle:
            return "ops", obstacle
        return "fused", "the base is frozen and the block has a fused twin"
    check_level(requested)
    if requested == "fused" and obstacle:
        instead = "Load with level='auto'"
        if has_twin(model_type):
            instead += " (it turns fused when add_lora freezes the base), with quant='nf4', or with"
            instead += " an adapter"
        raise KernelUnavailable(f"level 'fused' cannot run: {obstacle}. {instead}")
    level: Level = next(known for known in LEVELS if known == requested)
    return level, "asked for"
