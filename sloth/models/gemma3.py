"""Gemma 3, text: norms before and after each half and on q and k, five windowed layers to one full.

    h = sqrt(D) E[tokens]                               the factor rounded to the weights' dtype
    h = h + norm(o_proj(attention(rope(q_norm(q)), rope(k_norm(k)), v)))    of norm(h)
    h = h + norm(down_proj(gelu(gate) * up))                                of norm(h)
    norm(x) = x / rms(x) * (1 + w), multiplied in fp32 and cast once; q_norm, k_norm per head

Serves every `Gemma3ForCausalLM` checkpoint (270M, 1B, FunctionGemma, MedGemma 27B text) and the
text tower of the multimodal ones. Every sixth layer sees all keys, the others `sliding_window`.
The two kinds have rotary tables of their own: base 1e6 and on the larger models positions divided
by 8 for full layers, base 1e4 for windowed ones. Scores are scaled by query_pre_attn_scalar ** -0.5
and, unlike Gemma 2's, not capped: q_norm and k_norm bound them.

Paper: Gemma Team 2025, https://arxiv.org/abs/2503.19786. Shapes: B batch, T tokens, D model,
H query heads, K kv heads, E head dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sloth.errors import UnsupportedConfig
from sloth.kernels.context import BlockContext
from sloth.linear import OpModule, ProjectionFactory, dense_projection
from sloth.models.config import FULL, SLIDING, KeyReader, LayerSpec
from sloth.models.decoder import Decoder, DecoderStack, Embedding, RMSNorm
from sloth.models.rope import RopeParameters
from sloth.models.values import OBJECT, checked

FULL_THETA, LOCAL_THETA = 1e6, 1e4


@dataclass(frozen=True)
class Gemma3Config:
    """The numbers of config.json that the mathematics depends on, under their own names.

    rope, local_rope: of full and of windowed layers. final_logit_softcapping: None for none.
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
    local_rope: RopeParameters
    query_pre_attn_scalar: float
    final_logit_softcapping: float | None
    sliding_window: int | None
    layer_types: tuple[str, ...]
    attention_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], ignore: Iterable[str] = ()) -> Gemma3Config:
        """Read a config.json, in the Transformers 4 or 5 spelling. Raises UnsupportedConfig."""
        keys = KeyReader(config, ignore)
        head_dim = keys.take("head_dim", 256)
        num_layers = keys.take("num_hidden_layers")
        max_positions = keys.take("max_position_embeddings", 131072)
        for key in ("hidden_act", "hidden_activation"):
            keys.expect(key, ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        keys.expect("use_bidirectional_attention", (False,), False)
        keys.expect("attention_dropout", (0.0,), 0.0)
        window = keys.take_nullable("sliding_window", 4096)
        keys.take("_sliding_window_pattern", None)  # how layer_types, beside it, came about
        pattern = keys.take("sliding_window_pattern", 6)
        layer_types = keys.take_layer_types(
            [SLIDING if (index + 1) % pattern else FULL for index in range(num_layers)], window
        )
        if keys.take("attn_logit_softcapping", None) is not None:
            warnings.warn(
                "config.json sets attn_logit_softcapping, which Transformers does not read of this "
                "type; sloth caps no scores either",
                stacklevel=2,
            )
        full, local = _rope_entries(keys)
        built = cls(
            vocab_size=keys.take("vocab_size", 262208),
            hidden_size=keys.take("hidden_size"),
            intermediate_size=keys.take("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=keys.take("num_attention_heads", 8),
            num_key_value_heads=keys.take("num_key_value_heads", 4),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.take("rms_norm_eps", 1e-6),
            rope=RopeParameters.from_hf(full, FULL_THETA, head_dim, max_positions, keys.ignore),
            local_rope=RopeParameters.from_hf(
                local, LOCAL_THETA, head_dim, max_positions, keys.ignore
            ),
            query_pre_attn_scalar=keys.take("query_pre_attn_scalar", 256),
            final_logit_softcapping=keys.take("final_logit_softcapping", None),
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
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
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
            "rope_parameters": {FULL: self.rope.to_hf(), SLIDING: self.local_rope.to_hf()},
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }

    def layers(self) -> list[LayerSpec]:
        """Windowed and full layers, each kind with its rotary table."""
        specs = {
            FULL: LayerSpec(self.rope),
            SLIDING: LayerSpec(self.local_rope, self.sliding_window),
        }
        return [specs[kind] for kind in self.layer_types]


def _rope_entries(keys: KeyReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary settings of full and of windowed layers.

    New files have one entry for each; older ones `rope_theta` with `rope_scaling` for full layers
    and `rope_local_base_freq` for windowed ones.
    """
    new = keys.take("rope_parameters", {})
    if unknown := new.keys() - {FULL, SLIDING}:
        raise UnsupportedConfig(
            f"config.json sets {', '.join(sorted(unknown))} in rope_parameters; {keys.model_type} "
            f"has one entry for {FULL!r} and one for {SLIDING!r} layers"
        )
    full, local = (dict(checked(kind, new.get(kind), OBJECT) or {}) for kind in (FULL, SLIDING))
    full |= keys.take("rope_scaling", {})
    full.setdefault("rope_theta", keys.take("rope_theta", FULL_THETA))
    local.setdefault("rope_theta", keys.take("rope_local_base_freq", LOCAL_THETA))
    return full, local


class Attention(OpModule):
    """Causal grouped-query attention; q and k normed per head, then rotated."""

    def __init__(self, config: Gemma3Config, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        dim, bias = config.hidden_size, config.attention_bias
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(f"{path}.q_proj", dim, q_dim, bias)
        self.k_proj = linear(f"{path}.k_proj", dim, kv_dim, bias)
        self.v_proj = linear(f"{path}.v_proj", dim, kv_dim, bias)
        self.o_proj = linear(f"{path}.o_proj", q_dim, dim, bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, offset=1.0)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, offset=1.0)

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
    """GeGLU: down(gelu(gate(x)) * up(x)), gelu in its tanh form."""

    def __init__(self, config: Gemma3Config, path: str, linear: ProjectionFactory) -> None:
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

    def __init__(self, config: Gemma3Config, path: str, linear: ProjectionFactory) -> None:
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


class Gemma3Decoder(Decoder):
    """Gemma 3 with Hugging Face's parameter names.

    linear: what stores each projection, asked as linear(path, in_features, out_features, bias).
    """

    model_type = "gemma3_text"

    def __init__(self, config: Gemma3Config, linear: ProjectionFactory = dense_projection) -> None:
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
