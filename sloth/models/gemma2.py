"""Gemma 2: norms before and after each half, alternating windows, softcaps on scores and logits.

    h = sqrt(D) E[tokens]                               the factor rounded to the weights' dtype
    h = h + norm(o_proj(attention(rope(q), rope(k), v)))     q, k, v = projections of norm(h)
    h = h + norm(down_proj(gelu(gate) * up))                 gate, up = projections of norm(h)
    attention scores: c tanh(q k / (c sqrt(query_pre_attn_scalar))), c = 50
    logits: c tanh(E norm(h) / c), c = 30
    norm(x) = x / rms(x) * (1 + w), multiplied in fp32 and cast once

Serves every `Gemma2ForCausalLM` checkpoint: 2B, 9B, 27B. Even layers, the first included, see
`sliding_window` keys, odd ones all. The scores' scale is no function of the head size: 27B has
heads of 128 and a scalar of 144. `post_attention_layernorm` is what its name says here, the norm of
the attention's output; in Llama it is the norm before the MLP.

Paper: Gemma Team 2024, https://arxiv.org/abs/2408.00118. Shapes: B batch, T tokens, D model,
H query heads, K kv heads, E head dim.
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
class Gemma2Config:
    """The numbers of config.json that the mathematics depends on, under their own names.

    attn_logit_softcapping, final_logit_softcapping: None for none. layer_types: of each layer.
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
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    sliding_window: int | None
    layer_types: tuple[str, ...]
    attention_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], ignore: Iterable[str] = ()) -> Gemma2Config:
        """Read a config.json, in the Transformers 4 or 5 spelling. Raises UnsupportedConfig."""
        keys = KeyReader(config, ignore)
        hidden_size = keys.take("hidden_size")
        num_heads = keys.take("num_attention_heads")
        head_dim = keys.take("head_dim", 256)
        num_layers = keys.take("num_hidden_layers")
        max_positions = keys.take("max_position_embeddings", 8192)
        for key in ("hidden_act", "hidden_activation"):
            keys.expect(key, ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        keys.expect("use_bidirectional_attention", (False,), False)
        keys.expect("attention_dropout", (0.0,), 0.0)
        window = keys.take_nullable("sliding_window", 4096)
        keys.expect("sliding_window_size", (window,), window)  # the first files say it twice
        layer_types = keys.take_layer_types(
            [FULL if index % 2 else SLIDING for index in range(num_layers)], window
        )
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
            query_pre_attn_scalar=keys.take("query_pre_attn_scalar", 256),
            attn_logit_softcapping=keys.take_nullable("attn_logit_softcapping", 50.0),
            final_logit_softcapping=keys.take_nullable("final_logit_softcapping", 30.0),
            sliding_window=window,
            layer_types=layer_types,
            attention_bias=keys.take("attention_bias", False),
            tie_word_embeddings=keys.take("tie_word_embeddings", True),
        )
        keys.finish()
        return built

    def to_hf(self) -> dict[str, Any]:
        """The Transformers 5 config.json of this model, without token ids and dtype."""
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": self.attn_logit_softcapping,
            "final_logit_softcapping": self.final_logit_softcapping,
            "head_dim": self.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }

    def layers(self) -> list[LayerSpec]:
        """One rotary table; the window where a layer has one."""
        windows = {FULL: None, SLIDING: self.sliding_window}
        return [LayerSpec(self.rope, windows[kind]) for kind in self.layer_types]


class Attention(OpModule):
    """Causal grouped-query attention with rotary positions and capped scores."""

    def __init__(self, config: Gemma2Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        dim, bias = config.hidden_size, config.attention_bias
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(f"{path}.q_proj", dim, q_dim, bias)
        self.k_proj = linear(f"{path}.k_proj", dim, kv_dim, bias)
        self.v_proj = linear(f"{path}.v_proj", dim, kv_dim, bias)
        self.o_proj = linear(f"{path}.o_proj", q_dim, dim, bias)

    def forward(self, x_BTD: Tensor, context: BlockContext) -> Tensor:
        heads = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BTHE = self.q_proj(x_BTD).view(heads)
        k_BTKE = self.k_proj(x_BTD).view(heads)
        v_BKTE = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BTHE, k_BTKE = self.ops.rope(q_BTHE, k_BTKE, context.cos, context.sin)
        q_BHTE, k_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2)
        if context.cache is not None:
            k_BKTE, v_BKTE = context.cache.append(k_BKTE, v_BKTE)
        out_BHTE = self.ops.attention(
            q_BHTE, k_BKTE, v_BKTE, self.scale, context.layout, self.softcap
        )
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))


class MLP(OpModule):
    """GeGLU: down(gelu(gate(x)) * up(x)), gelu in its tanh form."""

    def __init__(self, config: Gemma2Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        dim, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(f"{path}.gate_proj", dim, ffn, False)
        self.up_proj = linear(f"{path}.up_proj", dim, ffn, False)
        self.down_proj = linear(f"{path}.down_proj", ffn, dim, False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        return self.down_proj(self.ops.glu(gate, up, "gelu_tanh"))


class Block(OpModule):
    """One layer: attention, then MLP, each between two norms and added to the residual stream."""

    def __init__(self, config: Gemma2Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(dim, eps, offset=1.0)
        self.self_attn = Attention(config, f"{path}.self_attn", linear)
        self.post_attention_layernorm = RMSNorm(dim, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(dim, eps, offset=1.0)
        self.mlp = MLP(config, f"{path}.mlp", linear)
        self.post_feedforward_layernorm = RMSNorm(dim, eps, offset=1.0)

    def forward(self, hidden_BTD: Tensor, context: BlockContext) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_BTD), context)
        attended = self.post_attention_layernorm(attended)
        normed, hidden_BTD = self.pre_feedforward_layernorm.add(attended, hidden_BTD)
        return hidden_BTD + self.post_feedforward_layernorm(self.mlp(normed))


class Gemma2Decoder(Decoder):
    """Gemma 2 with Hugging Face's parameter names.

    linear: what stores each projection, asked as linear(path, in_features, out_features, bias).
    """

    model_type = "gemma2"

    def __init__(self, config: Gemma2Config, linear: ProjectionFactory = dense_projection) -> None:
        stack = DecoderStack(
            Embedding(config.vocab_size, config.hidden_size, config.hidden_size**0.5),
            [
                Block(config, f"model.layers.{index}", linear)
                for index in range(config.num_hidden_layers)
            ],
            RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0),
        )
        head = None
        if not config.tie_word_embeddings:
            head = dense_projection("lm_head", config.hidden_size, config.vocab_size, False)
        super().__init__(config, stack, head, config.layers())
        self.final_softcap = config.final_logit_softcapping
