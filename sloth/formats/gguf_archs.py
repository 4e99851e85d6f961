"""The architectures of GGUF files: one row each, read by gguf.py and written by gguf_write.py.

A row says how a file of that architecture differs from the Hugging Face folder of the same model:

    names        `model.layers.0.self_attn.q_proj.weight` <-> `blk.0.attn_q.weight`
    interleaved  llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows
                 (i, i + E/2). Files for its neighbour kind hold the rows of q and k reordered, per
                 head [2, E/2] -> [E/2, 2], biases too; the other kind is stored as it is.
    norm_offset  Gemma's checkpoints hold norm weights less one, its GGUF files whole.
    implied      what the program computes without reading it from the file (which layers have a
                 window, how queries are scaled): added to what is read, demanded of what is
                 written.

Sources: the GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the name
tables of the `gguf` package (gguf.constants, gguf.tensor_mapping).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Config = dict[str, Any]

GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = "model.layers."
_BLOCK = "blk."

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
# Four norms a layer: what stands before the MLP in Llama stands after the attention here.
_SANDWICH_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class GGUFArch:
    """One architecture.

    name: general.architecture. model_type, hf_class: what such a file is read as. also: other
    model_types that are written as it, their mathematics being the same. names: module inside a
    layer -> name inside a block. biased: modules that may have a bias. states_biases: whether
    config.json of this type has attention_bias and mlp_bias. keys: hyper-parameters beside the
    common ones -> their name in config.json. keys_have_defaults: the program has values of its own
    for absent ones, so that None cannot be said. states_head_dim: whether config.json has head_dim.
    rope_keys: the same for what config.json says among its rotary parameters.
    always_tied: the program reads no head. llama3_rope: it reads the divisors of the frequencies.
    local_rope: layers with a window have a rotary table of their own. window_pattern: all layers
    have a window but every so many-th.
    """

    name: str
    model_type: str
    hf_class: str
    also: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=lambda: _NAMES)
    interleaved: bool = False
    norm_offset: float = 0.0
    biased: tuple[str, ...] = ()
    states_biases: bool = False
    activation: str = "silu"
    activation_key: str = "hidden_act"
    keys: dict[str, str] = field(default_factory=dict)
    keys_have_defaults: bool = False
    rope_keys: dict[str, str] = field(default_factory=dict)
    states_head_dim: bool = True
    always_tied: bool = False
    llama3_rope: bool = False
    local_rope: bool = False
    window_pattern: int | None = None
    implied: Callable[[Config], Config] = lambda config: {}

    # -- names -----------------------------------------------------------------------------------

    def hf_name(self, name: str) -> str:
        """A tensor's name in config.json's world; a name without counterpart stays."""
        path, _, leaf = name.rpartition(".")
        for ours, theirs in GLOBAL_NAMES.items():
            if path == theirs:
                return f"{ours}.{leaf}"
        parts = name.split(".")
        if len(parts) == 4 and name.startswith(_BLOCK):
            for ours, theirs in self.names.items():
                if parts[2] == theirs:
                    return f"{_LAYER}{parts[1]}.{ours}.{leaf}"
        return name

    def gguf_name(self, name: str) -> str | None:
        """A tensor's name in the file, None for one that such files do not hold."""
        path, _, leaf = name.rpartition(".")
        module = path
        if path.startswith(_LAYER):
            index, _, module = path.removeprefix(_LAYER).partition(".")
        if leaf == "bias" and module not in self.biased:
            return None
        if module in GLOBAL_NAMES and not (module == "lm_head" and self.always_tied):
            return f"{GLOBAL_NAMES[module]}.{leaf}"
        if module in self.names and path != module:
            return f"{_BLOCK}{index}.{self.names[module]}.{leaf}"
        return None

    # -- values ----------------------------------------------------------------------------------

    def to_file(self, name: str, value: Tensor, config: Config) -> Tensor:
        """Hugging Face's tensor `name` as the file holds it."""
        value = self.rows_to_file(name, value, config)
        return value + self.norm_offset if name.endswith("norm.weight") else value

    def from_file(self, name: str, value: Tensor, config: Config) -> Tensor:
        """The file's tensor as Hugging Face has it, under Hugging Face's name."""
        heads = self._reordered_heads(name, config)
        value = uninterleave(value, heads) if heads else value
        return value - self.norm_offset if name.endswith("norm.weight") else value

    def rows_to_file(self, name: str, value: Tensor, config: Config) -> Tensor:
        """Output rows of a projection in the file's order; the rows of a LoRA B follow them."""
        heads = self._reordered_heads(name, config)
        return interleave(value, heads) if heads else value

    def _reordered_heads(self, name: str, config: Config) -> int:
        """Number of heads whose rows are reordered in tensor `name`; 0 for none."""
        if not self.interleaved:
            return 0
        if ".q_proj." in name:
            return int(config["num_attention_heads"])
        return int(config["num_key_value_heads"]) if ".k_proj." in name else 0


def interleave(value: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from order 0, 1, ... to 0, E/2, 1, E/2 + 1, ...; [rows, in] or [rows]."""
    heads = value.reshape(num_heads, 2, -1, *value.shape[1:])
    return heads.transpose(1, 2).reshape(value.shape).contiguous()


def uninterleave(value: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from order 0, E/2, 1, E/2 + 1, ... to 0, 1, ...; [rows, in] or [rows]."""
    heads = value.reshape(num_heads, -1, 2, *value.shape[1:])
    return heads.transpose(1, 2).reshape(value.shape).contiguous()


# -- what the program computes without being told --------------------------------------------------


def layer_types(is_sliding: list[bool]) -> list[str]:
    """`layer_types` of config.json."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]


def _query_scale(config: Config, whole_width_layers: tuple[int, ...]) -> Config:
    """Queries are scaled by the head's size; in the 27B models, which the program knows by their
    number of layers, by the model's width over the heads."""
    by_width = config["num_hidden_layers"] in whole_width_layers
    width = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": width if by_width else config["head_dim"]}


def _smollm3_rope_layers(config: Config) -> Config:
    """Every fourth layer has no rotary embedding."""
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]}


_ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
_MLP = tuple(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))

LLAMA = GGUFArch(
    name="llama",
    model_type="llama",
    hf_class="LlamaForCausalLM",
    also=("mistral", "ministral"),
    interleaved=True,
    biased=_ATTENTION + _MLP,
    states_biases=True,
    llama3_rope=True,
)
# Small 3.x and Ministral 3. The program takes YaRN's mscale for 1, and the length from which on
# queries grow for YaRN's own.
MISTRAL3 = GGUFArch(
    name="mistral3",
    model_type="ministral3",
    hf_class="Ministral3ForCausalLM",
    interleaved=True,
    rope_keys={
        "attention.temperature_scale": "llama_4_scaling_beta",
        "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    },
    llama3_rope=True,
)
QWEN2 = GGUFArch(
    name="qwen2",
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    biased=_ATTENTION[:3],
    states_head_dim=False,
)
QWEN3 = GGUFArch(
    name="qwen3",
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    names=_NAMES | _QK_NORMS,
)
GEMMA = GGUFArch(
    name="gemma",
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    norm_offset=1.0,
    activation=_GELU,
    always_tied=True,
)
GEMMA2 = GGUFArch(
    name="gemma2",
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    names=_SANDWICH_NAMES,
    norm_offset=1.0,
    activation=_GELU,
    activation_key="hidden_activation",
    keys={
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    keys_have_defaults=True,
    always_tied=True,
    window_pattern=2,
    implied=lambda config: _query_scale(config, (46,)),
)
GEMMA3 = GGUFArch(
    name="gemma3",
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    names=_SANDWICH_NAMES | _QK_NORMS,
    norm_offset=1.0,
    activation=_GELU,
    activation_key="hidden_activation",
    keys={
        "attention.sliding_window": "sliding_window",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    local_rope=True,
    window_pattern=6,
    implied=lambda config: _query_scale(config, (62,)),
)
SMOLLM3 = GGUFArch(
    name="smollm3",
    model_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    interleaved=True,
    states_biases=True,
    states_head_dim=False,
    implied=_smollm3_rope_layers,
)

_ALL = (LLAMA, MISTRAL3, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, SMOLLM3)
GGUF_ARCHS = {arch.name: arch for arch in _ALL}


def arch_of_model(model_type: str) -> GGUFArch | None:
    """The architecture that a model of this type is written as."""
    for arch in GGUF_ARCHS.values():
        if model_type == arch.model_type or model_type in arch.also:
            return arch
    return None
