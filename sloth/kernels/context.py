"""What a block needs beside its input: rotary tables, who sees whom, what to keep, the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sloth.kernels.ops.attention_layout import AttentionLayout


@dataclass(frozen=True)
class Keep:
    """What a fused layer keeps from forward to backward beside its input; the rest is made again.

    attention: the attention output and its log-sum-exp. hidden: the residual stream between the two
    halves. qkv: q and k after RoPE, v. gate, up: the two products of the MLP. The output of
    down_proj is never made again, whatever is kept. tile_tokens: rows the MLP works on at a time,
    None for all; the products are then not kept. offload: the layer's input and what else is kept,
    but for gate and up, wait in host memory.
    resident: its NF4 matrices stay unpacked instead of being unpacked twice a step; once with
    DoRA, whose gains change them at every step.
    recorded: of all layers or none: the passes are replayed as CUDA graphs (`recording.py`).
    """

    attention: bool = True
    hidden: bool = True
    qkv: bool = True
    gate: bool = True
    up: bool = True
    tile_tokens: int | None = None
    offload: bool = False
    resident: bool = False
    recorded: bool = False

    def __post_init__(self) -> None:
        if self.tile_tokens is not None and (self.gate or self.up):
            raise ValueError("Keep: an MLP in tiles keeps neither gate nor up")
        if self.up and not self.gate:
            raise ValueError("Keep: up is kept only beside gate")


# From least to most memory; each keeps what saves the most work for its bytes.
POLICIES = {
    "P1": Keep(attention=False, hidden=False, qkv=False, gate=False, up=False),
    "P2": Keep(hidden=False, qkv=False, gate=False, up=False),
    "P3": Keep(qkv=False, gate=False, up=False),
    "P4": Keep(gate=False, up=False),
    "P5": Keep(up=False),
    "P6": Keep(),
}


@dataclass
class BlockContext:
    """Prepared once per forward pass; layers of one kind share tables and layout.

    cos, sin: [B or 1, T, E], None for a layer without rotary positions. layout: visibility of keys.
    query_scale: [B or 1, T, 1, 1], a factor on queries that grows with their position, None for 1.
    cache: keys and values so far of this layer, None outside decoding. keep: what a fused layer
    keeps for its backward.
    """

    cos: Tensor | None
    sin: Tensor | None
    layout: AttentionLayout
    cache: Any = None
    keep: Keep = field(default_factory=Keep)
    query_scale: Tensor | None = None
