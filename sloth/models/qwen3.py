"""Qwen 3, dense: Llama's block with an RMSNorm on every head of q and k before RoPE.

    h = h + o_proj(attention(rope(q_norm(q)), rope(k_norm(k)), v))
    h = h + down_proj(silu(gate) * up)                  both read norm(h) through projections

Serves every `Qwen3ForCausalLM` checkpoint: Qwen3 0.6B to 32B, the 2507 releases, R1-0528-Qwen3-8B.
The norms run over the head dim with one weight for all heads; they bound the scores, which is what
Qwen 2's biases on q and k were dropped for. Heads are of 128 whatever the width. A window, if any,
is as in Qwen 2: only with `use_sliding_window`, from layer `max_window_layers` on.

Paper: Yang et al. 2025, https://arxiv.org/abs/2505.09388; the norms: Dehghani et al. 2023,
https://arxiv.org/abs/2302.05442. Shapes: B batch, T tokens, D model, H query heads, K kv heads,
E head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sloth.kernels.context import BlockContext
from sloth.linear import OpModule, ProjectionFactory, dense_projection
from sloth.models.config import FULL, SLIDING, KeyReader, LayerSpec
from sloth.models.decoder import Decoder, DecoderStack, Embedding, RMSNorm
from sloth.models.rope import RopeParameters


@dataclass(frozen=True)
class Qwen3Config:
    """The numbers of config.json that the mathematics depends on, under their own names.

    sliding_window: None unless `use_sliding_window`. layer_types: of each layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeParameters
    attention_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], ignore: Iterable[str] = ()) -> Qwen3Config:
        """Read a config.json, in the Transformers 4 or 5 spelling. Raises UnsupportedConfig."""
        keys = KeyReader(config, ignore)
        hidden_size = keys.take("hidden_size")
        num_heads = keys.take("num_attention_heads")
        head_dim = keys.take("head_dim", 128)
        num_layers = keys.take("num_hidden_layers")
        max_positions = keys.take("max_position_embeddings", 32768)
        keys.expect("hidden_act", ("silu",), "silu")
        keys.expect("attention_dropout", (0.0,), 0.0)
        window = keys.take_nullable("sliding_window", 4096)
        if not keys.take("use_sliding_window", False):
            window = None  # files state one that was never used
        first = num_layers if window is None else keys.take("max_window_layers", 28)
        layer_types = keys.take_layer_types(
            [SLIDING if index >= first else FULL for index in range(num_layers)], window
        )
        keys.take("max_window_layers", 28)  # said in the layer types by now, or without effect
        built = cls(
            vocab_size=keys.take("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.take("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=keys.take("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.take("rms_norm_eps", 1e-6),
            rope=keys.take_rope(head_dim, max_positions),
            attention_bias=keys.take("attention_bias", False),
            sliding_window=window,
            layer_types=layer_types,
            tie_word_embeddings=keys.take("tie_word_embeddings", False),
        )
        keys.finish()
        return built

    def to_hf(self) -> dict[str, Any]:
        """The Transformers 5 config.json of this model, without token ids and dtype."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": self.sliding_window is not None,
            "vocab_size": self.vocab_size,
        }

    def layers(self) -> list[LayerSpec]:
        """One rotary table; the window where a layer has one."""
        windows = {FULL: None, SLIDING: self.sliding_window}
        return [LayerSpec(self.rope, windows[kind]) for kind in self.layer_types]


class Attention(OpModule):
    """Causal grouped-query attention; q and k normed per head, then rotated."""

    def __init__(self, config: Qwen3Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        dim, bias = config.hidden_size, config.attention_bias
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(f"{path}.q_proj", dim, q_dim, bias)
        self.k_proj = linear(f"{path}.k_proj", dim, kv_dim, bias)
        self.v_proj = linear(f"{path}.v_proj", dim, kv_dim, bias)
        self.o_proj = linear(f"{path}.o_proj", q_dim, dim, bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: BlockContext) -> Tensor:
        heads = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BTHE = self.q_norm(self.q_proj(x_BTD).view(heads))
        k_BTKE = self.k_norm(self.k_proj(x_BTD).view(heads))
        v_BKTE = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BTHE, k_BTKE = self.ops.rope(q_BTHE, k_BTKE, context.cos, context.sin)
        q_BHTE, k_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2)
        if context.cache is not None:
            k_BKTE, v_BKTE = context.cache.append(k_BKTE, v_BKTE)
        out_BHTE = self.ops.attention(q_BHTE, k_BKTE, v_BKTE, self.scale, context.layout)
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))


class MLP(OpModule):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        dim, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(f"{path}.gate_proj", dim, ffn, False)
        self.up_proj = linear(f"{path}.up_proj", dim, ffn, False)
        self.down_proj = linear(f"{path}.down_proj", ffn, dim, False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.ops.glu(self.gate_proj(x_BTD), self.up_proj(x_BTD), "silu"))


class Block(OpModule):
    """One layer: attention, then MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: Qwen3Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, f"{path}.self_attn", linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, f"{path}.mlp", linear)

    def forward(self, hidden_BTD: Tensor, context: BlockContext) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_BTD), context)
        normed, hidden_BTD = self.post_attention_layernorm.add(attended, hidden_BTD)
        return hidden_BTD + self.mlp(normed)


class Qwen3Decoder(Decoder):
    """Qwen 3 with Hugging Face's parameter names.

    linear: what stores each projection, asked as linear(path, in_features, out_features, bias).
    """

    model_type = "qwen3"

    def __init__(self, config: Qwen3Config, linear: ProjectionFactory = dense_projection) -> None:
        stack = DecoderStack(
            Embedding(config.vocab_size, config.hidden_size),
            [
                Block(config, f"model.layers.{index}", linear)
                for index in range(config.num_hidden_layers)
            ],
            RMSNorm(config.hidden_size, config.rms_norm_eps),
        )
        head = None
        if not config.tie_word_embeddings:
            head = dense_projection("lm_head", config.hidden_size, config.vocab_size, False)
        super().__init__(config, stack, head, config.layers())
