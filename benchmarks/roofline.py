"""What a training step has to compute and move: the formulas that every figure is held against.

A LoRA step over a frozen base multiplies every weight twice: X W forward and dY W^T backward, so 4
floating-point operations per weight and token, where full training takes 6. Causal attention adds,
per layer, two products over half the positions forward and five backward: 3.5 times the forward.

    flops = 4 N_linear tokens + 4 N_head trained tokens + 3.5 attention forward
    MFU   = flops / seconds / measured rate of a large bf16 product

Recomputed activations are work that a step chose to do twice and are not counted, nor is anything
elementwise. The head counts for trained tokens only: nothing else of it is needed, and without this
a packed batch with a quarter of its tokens trained would be credited with products nobody ran.

Shapes: L layers, D model, F ffn, H query heads, K kv heads, E head dim, V vocabulary, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384  # codes, 8-bit scales per 64, fp32 scales per 16384
BF16_BYTES = 2


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that decide its cost.

    windows: the attention window of every layer, None for full attention. softcap: of attention's
    scores, None for none.
    """

    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]
    softcap: float | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelShape:
        """From the keys of a config.json (of its `text_config`, where it has one)."""
        config = config.get("text_config", config)
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        kinds = config.get("layer_types") or ["full_attention"] * layers
        window = config.get("sliding_window")
        return cls(
            num_layers=layers,
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            softcap=config.get("attn_logit_softcapping"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """From a checkpoint's config.json."""
        return cls.from_hf(json.loads((folder / "config.json").read_text()))

    @property
    def q_dim(self) -> int:
        """Width of all query heads, H E."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads, K E."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven projections of a layer."""
        return {
            "q_proj": (self.q_dim, self.hidden),
            "k_proj": (self.kv_dim, self.hidden),
            "v_proj": (self.kv_dim, self.hidden),
            "o_proj": (self.hidden, self.q_dim),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def linear_weights(self) -> int:
        """N_linear: weights of all projections of all layers."""
        return self.num_layers * sum(out * inner for out, inner in self.linears.values())

    @property
    def head_weights(self) -> int:
        """N_head: weights of the output head, tied or not."""
        return self.vocabulary * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Trained parameters with LoRA on all seven projections."""
        return self.num_layers * rank * sum(sum(sizes) for sizes in self.linears.values())

    @property
    def dora_lengths(self) -> int:
        """What DoRA trains beside them: a length for every row of every projection."""
        return self.num_layers * sum(out for out, _ in self.linears.values())


def visible_keys(length: int, window: int | None) -> float:
    """Keys that the average token of a causal document of `length` tokens sees.

    length / 2 for full attention, counting half a key for the token itself. Within a window w the
    first w tokens form such a triangle and the others see w each: w - w^2 / (2 length).
    """
    if window is None or window >= length:
        return length / 2
    return window - window**2 / (2 * length)


def attention_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Forward attention products of all layers over documents of these lengths."""
    return sum(
        4 * shape.q_dim * visible_keys(length, window) * length
        for window in shape.windows
        for length in lengths
    )


def step_flops(shape: ModelShape, lengths: Sequence[int], num_trained: int) -> float:
    """Operations of one LoRA step over documents of these lengths (the MFU's numerator)."""
    num_tokens = sum(lengths)
    products = 4 * shape.linear_weights * num_tokens + 4 * shape.head_weights * num_trained
    return products + 3.5 * attention_flops(shape, lengths)


def step_flops_per_token(shape: ModelShape, length: int, replay: bool = False) -> float:
    """The same for one token of full rows, all trained; `replay` adds one more forward pass."""
    attention = attention_flops(shape, [length]) / length
    flops = 4 * (shape.linear_weights + shape.head_weights) + 3.5 * attention
    return flops + (2 * shape.linear_weights + attention if replay else 0)


def mfu(flops: float, ms: float, product_tflops: float) -> float:
    """Share of the measured product rate that a step of `ms` reaches."""
    return flops / (ms * 1e-3) / (product_tflops * 1e12)


def nf4_bytes(num_weights: int, out_bytes: float = BF16_BYTES) -> float:
    """Bytes read and written when this many weights are unpacked once."""
    return num_weights * (NF4_BYTES + out_bytes)


def elementwise_bytes(shape: ModelShape) -> tuple[int, int]:
    """(forward, backward) bytes per token and layer of norms, rotary, gates and residuals, bf16."""
    d, ffn, heads = shape.hidden, shape.ffn, shape.q_dim + shape.kv_dim
    forward = 2 * d + 2 * heads + 4 * d + 3 * ffn
    backward = 6 * ffn + 8 * d + 2 * heads + d
    return BF16_BYTES * forward, BF16_BYTES * backward
