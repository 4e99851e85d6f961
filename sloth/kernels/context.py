"""What a block needs beside its input: rotary tables, who sees whom, the cache when decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sloth.kernels.ops.attention import AttentionLayout


@dataclass
class BlockContext:
    """Prepared once per forward pass; layers of one kind share it.

    cos, sin: [B or 1, T, E], None for a layer without rotary positions. layout: visibility of keys.
    cache: keys and values so far of this layer, None outside decoding.
    """

    cos: Tensor | None
    sin: Tensor | None
    layout: AttentionLayout
    cache: Any = None
