"""Mistral: Llama's block with a sliding window; also Ministral, which says per layer who has one.

    h = h + o_proj(attention(s rope(q), rope(k), v))    q, k, v = projections of norm(h)
    h = h + down_proj(silu(gate) * up)                  gate, up = projections of norm(h)

Three model types share this wiring. `mistral`: every layer sees the last `sliding_window` keys, or
all of them where that is null (every release after 7B v0.1). `ministral`: `layer_types` names the
layers that have the window. `ministral3`: no window as a rule, YaRN, and queries times a factor s
that grows with position (`QueryScale`). Head sizes are stated apart from the width: Nemo and the
24B models have heads of 128 where hidden_size / num_attention_heads is 160.

Paper: Jiang et al. 2023, https://arxiv.org/abs/2310.06825. Shapes: B batch, T tokens, D model,
H query heads, K kv heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sloth.errors import UnsupportedConfig
from sloth.kernels.context import BlockContext
from sloth.linear import OpModule, ProjectionFactory, dense_projection
from sloth.models.config import FULL, SLIDING, KeyReader, LayerSpec
from sloth.models.decoder import Decoder, DecoderStack, Embedding, RMSNorm
from sloth.models.rope import DEFAULT_THETA, QueryScale, RopeParameters
from sloth.models.values import checked

_HF_CLASSES = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
}
# What a file that leaves the key out means; null means no window.
_DEFAULT_WINDOWS = {"mistral": 4096, "ministral": 4096, "ministral3": None}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@dataclass(frozen=True)
class MistralConfig:
    """The numbers of config.json that the mathematics depends on, under their own names.

    query_scale: from `llama_4_scaling_beta` of ministral3's rotary parameters.
    """

    model_type: str
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
    query_scale: QueryScale | None
    sliding_window: int | None
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], ignore: Iterable[str] = ()) -> MistralConfig:
        """Read a config.json, in the Transformers 4 or 5 spelling. Raises UnsupportedConfig."""
        keys = KeyReader(config, ignore)
        model_type = keys.model_type
        is_ministral3 = model_type == "ministral3"
        hidden_size = keys.take("hidden_size")
        num_heads = keys.take("num_attention_heads")
        head_dim = keys.take("head_dim", 128 if is_ministral3 else hidden_size // num_heads)
        num_layers = keys.take("num_hidden_layers")
        max_positions = keys.take("max_position_embeddings", 262144 if is_ministral3 else 131072)
        keys.expect("hidden_act", ("silu",), "silu")
        keys.expect("attention_dropout", (0.0,), 0.0)
        window = keys.take_nullable("sliding_window", _DEFAULT_WINDOWS[model_type])
        layer_types: tuple[str, ...] = (FULL if window is None else SLIDING,) * num_layers
        if model_type == "ministral":
            layer_types = keys.take_layer_types(layer_types, window)
        entry = keys.take_rope_entry()
        beta = None
        if is_ministral3:
            entry = entry or dict(_MINISTRAL3_ROPE)
            beta = checked("llama_4_scaling_beta", entry.pop("llama_4_scaling_beta", None))
            entry.pop("max_position_embeddings", None)  # repeats the model's own
        rope = RopeParameters.from_hf(entry, DEFAULT_THETA, head_dim, max_positions, keys.ignore)
        built = cls(
            model_type=model_type,
            vocab_size=keys.take("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.take("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=keys.take("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.take("rms_norm_eps", 1e-5 if is_ministral3 else 1e-6),
            rope=rope,
            query_scale=None if beta is None else _query_scale(float(beta), rope),
            sliding_window=window,
            layer_types=layer_types,
            tie_word_embeddings=keys.take("tie_word_embeddings", False),
        )
        keys.finish()
        return built

    def to_hf(self) -> dict[str, Any]:
        """The Transformers 5 config.json of this model, without token ids and dtype."""
        rope = self.rope.to_hf()
        if self.query_scale is not None:
            rope["llama_4_scaling_beta"] = self.query_scale.beta
        config = {
            "architectures": [_HF_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }
        if self.model_type == "ministral":
            config["layer_types"] = list(self.layer_types)
        return config

    def layers(self) -> list[LayerSpec]:
        """One rotary table; the window where a layer has one."""
        windows = {FULL: None, SLIDING: self.sliding_window}
        return [LayerSpec(self.rope, windows[kind], self.query_scale) for kind in self.layer_types]


def _query_scale(beta: float, rope: RopeParameters) -> QueryScale:
    original = rope.get("original_max_position_embeddings")
    if original is None:
        raise UnsupportedConfig(
            "config.json sets llama_4_scaling_beta without original_max_position_embeddings, the "
            "length from which on queries are scaled"
        )
    return QueryScale(beta, int(original))


class Attention(OpModule):
    """Causal grouped-query attention with rotary positions, over a window where there is one."""

    def __init__(self, config: MistralConfig, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        dim = config.hidden_size
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(f"{path}.q_proj", dim, q_dim, False)
        self.k_proj = linear(f"{path}.k_proj", dim, kv_dim, False)
        self.v_proj = linear(f"{path}.v_proj", dim, kv_dim, False)
        self.o_proj = linear(f"{path}.o_proj", q_dim, dim, False)

    def forward(self, x_BTD: Tensor, context: BlockContext) -> Tensor:
        heads = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BTHE = self.q_proj(x_BTD).view(heads)
        k_BTKE = self.k_proj(x_BTD).view(heads)
        v_BKTE = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BTHE, k_BTKE = self.ops.rope(q_BTHE, k_BTKE, context.cos, context.sin)
        if context.query_scale is not None:
            q_BTHE = q_BTHE * context.query_scale
        q_BHTE, k_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2)
        if context.cache is not None:
            k_BKTE, v_BKTE = context.cache.append(k_BKTE, v_BKTE)
        out_BHTE = self.ops.attention(q_BHTE, k_BKTE, v_BKTE, self.scale, context.layout)
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))


class MLP(OpModule):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MistralConfig, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        dim, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(f"{path}.gate_proj", dim, ffn, False)
        self.up_proj = linear(f"{path}.up_proj", dim, ffn, False)
        self.down_proj = linear(f"{path}.down_proj", ffn, dim, False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.ops.glu(self.gate_proj(x_BTD), self.up_proj(x_BTD), "silu"))


class Block(OpModule):
    """One layer: attention, then MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: MistralConfig, path: str, linear: ProjectionFactory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, f"{path}.self_attn", linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, f"{path}.mlp", linear)

    def forward(self, hidden_BTD: Tensor, context: BlockContext) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_BTD), context)
        normed, hidden_BTD = self.post_attention_layernorm.add(attended, hidden_BTD)
        return hidden_BTD + self.mlp(normed)


class MistralDecoder(Decoder):
    """Mistral, Ministral and Ministral 3 with Hugging Face's parameter names.

    linear: what stores each projection, asked as linear(path, in_features, out_features, bias).
    """

    def __init__(self, config: MistralConfig, linear: ProjectionFactory = dense_projection) -> None:
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
        self.model_type = config.model_type
