"""config.json <-> the hyper-parameters of a GGUF file, for every row of gguf_archs.py.

Both ways are strict: a key of the file that nothing here understands goes to the config, which
refuses it by name; a setting of the config that a file of this architecture cannot state, and the
program does not compute on its own, is refused too.

A Llama 3 rotary scaling is stored as the divisors of the frequencies (`rope_freqs.weight`), not as
its numbers. They are recovered and the divisors computed from them must match the stored ones, else
UnsupportedConfig. A window that the architecture has no key for is kept by stating it as the
context length: up to there the two compute the same.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.formats.gguf_archs import GGUF_ARCHS, Config, GGUFArch, layer_types
from sloth.models.rope import DEFAULT_THETA, Rope, RopeParameters

ROPE_DIVISORS = "rope_freqs.weight"

_COMMON = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_PATTERN = "attention.sliding_window_pattern"

# fp32 divisors written by programs that formed them in fp32 or fp64.
_DIVISOR_RELATIVE_ERROR = 1e-5
# Llama 3.1 to 3.3 use 8192; low and high frequency factors are 1 and 4 in all of them.
_LLAMA3_ORIGINAL_LENGTHS = (8192, *(2**n for n in range(4, 21)))

# What programs take for YaRN's mscale, which no file states, where they read mscale_all_dim.
_MSCALE = 1.0

# Keys that say nothing config.json needs.
_IRRELEVANT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
# Values that leave the computation as it is; any other value goes to the config, which refuses it
# by name.
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


def arch_of_file(metadata: dict[str, Any]) -> GGUFArch:
    """The row of a file's architecture. Raises UnsupportedConfig."""
    name = metadata.get("general.architecture")
    if name not in GGUF_ARCHS:
        raise UnsupportedConfig(
            f"GGUF architecture {name!r} is not supported; supported: {', '.join(GGUF_ARCHS)}"
        )
    return GGUF_ARCHS[name]


# -- from a file -----------------------------------------------------------------------------------


class _Keys:
    """The metadata of one architecture; knows what was asked for."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self.prefix = f"{architecture}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in metadata.items()
            if key.startswith(self.prefix)
        }
        self.left = dict(self.values)

    def take(self, key: str, default: Any = ...) -> Any:
        self.left.pop(key, None)
        if key in self.values:
            return self.values[key]
        if default is ...:
            raise UnsupportedConfig(f"the GGUF file lacks {self.prefix}{key}")
        return default

    def same_for_all_layers(self, key: str, default: Any = ...) -> int:
        value = self.take(key, default)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) != 1:
            raise UnsupportedConfig(f"{self.prefix}{key} differs from layer to layer")
        return int(values.pop())

    def leftovers(self) -> dict[str, Any]:
        """Keys nobody asked for whose value could change the result, under their full names."""
        return {
            f"{self.prefix}{key}": value
            for key, value in self.left.items()
            if key not in _IRRELEVANT and not (key in _NEUTRAL and value == _NEUTRAL[key])
        }


def read_config(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], divisors: Tensor | None
) -> Config:
    """The config.json of a file; `shapes` by Hugging Face names, `divisors` its rope_freqs."""
    arch = arch_of_file(metadata)
    if "model.embed_tokens.weight" not in shapes:
        raise CheckpointMismatch(
            "the GGUF file holds no token_embd.weight; it may be a vocabulary only"
        )
    keys = _Keys(metadata, arch.name)
    num_heads = keys.same_for_all_layers("attention.head_count")
    config: Config = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        arch.activation_key: arch.activation,
        "hidden_size": keys.take("embedding_length"),
        "intermediate_size": keys.same_for_all_layers("feed_forward_length"),
        "max_position_embeddings": keys.take("context_length"),
        "num_attention_heads": num_heads,
        "num_hidden_layers": keys.take("block_count"),
        "num_key_value_heads": keys.same_for_all_layers("attention.head_count_kv", num_heads),
        "rms_norm_eps": _shortest(keys.take("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
    }
    config["head_dim"] = head_dim = _head_dim(keys, config)
    if arch.states_biases:
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    for key, name in arch.keys.items():
        value = keys.take(key, None)
        if value is not None:
            config[name] = _shortest(value) if isinstance(value, float) else value
    if arch.window_pattern is not None:
        config["layer_types"] = _layer_types(
            keys.take(_PATTERN, arch.window_pattern), config["num_hidden_layers"]
        )
    rope = _rope_parameters(keys, head_dim, config["max_position_embeddings"], divisors)
    rope |= _further_rope_parameters(keys, arch)
    if arch.local_rope:
        theta = _shortest(keys.take("rope.freq_base_swa", DEFAULT_THETA))
        local = {"rope_type": "default", "rope_theta": theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    config["rope_parameters"] = rope
    config |= arch.implied(config)
    if not arch.states_head_dim and head_dim * num_heads == config["hidden_size"]:
        del config["head_dim"]
    for kind, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if index is not None:
            config[f"{kind}_token_id"] = index
    return config | keys.leftovers()


def _head_dim(keys: _Keys, config: Config) -> int:
    plain = config["hidden_size"] // config["num_attention_heads"]
    head_dim = keys.take("attention.key_length", plain)
    for key in _HEAD_SIZES[1:]:
        if keys.take(key, head_dim) != head_dim:
            raise UnsupportedConfig(
                f"{keys.prefix}{key} is {keys.take(key)} with heads of {head_dim}; they must be "
                "equal"
            )
    return int(head_dim)


def _layer_types(pattern: int | list[bool], num_layers: int) -> list[str]:
    """A list says which layers have a window; a number that all have but every so many-th."""
    if isinstance(pattern, list):
        return layer_types([bool(item) for item in pattern])
    return layer_types([(index + 1) % pattern != 0 for index in range(num_layers)])


def _rope_parameters(
    keys: _Keys, head_dim: int, max_positions: int, divisors: Tensor | None
) -> dict[str, Any]:
    theta = _shortest(keys.take("rope.freq_base", DEFAULT_THETA))
    kind = keys.take("rope.scaling.type", "none")
    factor = keys.take("rope.scaling.factor", None)
    old_factor = keys.take("rope.scale_linear", None)  # files of 2023
    if old_factor not in (None, 1.0):
        kind, factor = "linear", old_factor
    original = keys.take("rope.scaling.original_context_length", None)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "yarn"):
        if factor is None:
            raise UnsupportedConfig(
                f"{keys.prefix}rope.scaling.type is {kind!r}, but its factor is missing"
            )
        found |= {"rope_type": kind, "factor": _shortest(factor)}
    elif kind != "none":
        raise UnsupportedConfig(f"{keys.prefix}rope.scaling.type {kind!r} is not supported")
    if kind == "yarn":
        if original is not None:
            found["original_max_position_embeddings"] = original
        for key in ("beta_fast", "beta_slow"):
            value = keys.take(f"rope.scaling.yarn_{key}", None)
            if value is not None:
                found[key] = _shortest(value)
    if divisors is None or bool((divisors == 1).all()):
        return found
    if found["rope_type"] != "default":
        raise UnsupportedConfig(
            f"the GGUF file scales its rotary embedding twice: {kind} and {ROPE_DIVISORS}"
        )
    return _llama3_rope(divisors, theta, head_dim, max_positions)


def _further_rope_parameters(keys: _Keys, arch: GGUFArch) -> dict[str, Any]:
    """What this architecture's files state of rotary positions beside the common keys; 0 is off."""
    stated = {name: keys.take(key, 0.0) for key, name in arch.rope_keys.items()}
    found = {name: _shortest(value) for name, value in stated.items() if value != 0}
    return found | ({"mscale": _MSCALE} if "mscale_all_dim" in found else {})


def _llama3_rope(
    divisors: Tensor, theta: float, head_dim: int, max_positions: int
) -> dict[str, Any]:
    """The llama3 scaling whose plain over scaled frequencies are `divisors` [head_dim / 2]."""
    for original in _LLAMA3_ORIGINAL_LENGTHS:
        found = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": _shortest(float(divisors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = _divisors(found, head_dim, max_positions)
        if expected.shape == divisors.shape and torch.allclose(
            expected, divisors, rtol=_DIVISOR_RELATIVE_ERROR, atol=0.0
        ):
            return found
    raise UnsupportedConfig(
        f"the rotary divisors of {ROPE_DIVISORS} are not those of a llama3 scaling with low and "
        "high frequency factors 1 and 4; load the model's Hugging Face folder instead"
    )


def _divisors(rope: dict[str, Any], head_dim: int, max_positions: int) -> Tensor:
    """Plain over scaled frequencies [head_dim / 2] of a `rope_parameters` entry."""
    theta = rope["rope_theta"]
    plain = Rope(RopeParameters("default", theta, head_dim, max_positions)).frequencies
    scaled = RopeParameters.from_hf(rope, theta, head_dim, max_positions)
    return plain / Rope(scaled).frequencies


def _shortest(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 9.99999975e-06 -> 1e-05."""
    value = float(value)
    packed = struct.pack("<f", value)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == packed:
            return short
    return value


# -- to a file -------------------------------------------------------------------------------------


def head_dim_of(config: Config) -> int:
    """Size of a head; config.json leaves it out where it is the width over the heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def hyperparameters(arch: GGUFArch, config: Config) -> dict[str, Any]:
    """What a file of `arch` says about the model of a (Transformers 5) config.json.

    Key without the architecture's prefix -> int, float or str. Raises UnsupportedConfig.
    """
    head_dim = head_dim_of(config)
    found: dict[str, Any] = {key: config[name] for key, name in _COMMON.items()}
    found["context_length"] = context_length(arch, config)
    found["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    found |= dict.fromkeys(_HEAD_SIZES, head_dim)
    for key, name in arch.keys.items():
        value = config.get(name)
        if value is None and arch.keys_have_defaults:
            raise UnsupportedConfig(f"a {arch.name} GGUF file cannot say that {name} is off")
        if value is not None:
            found[key] = value
    rope = config["rope_parameters"]
    if arch.local_rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local["rope_type"] != "default":
            raise UnsupportedConfig(
                f"rope_type {local['rope_type']!r} of the layers with a window cannot be written "
                "to a GGUF file"
            )
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    return found | _rope_keys(arch, rope)


def context_length(arch: GGUFArch, config: Config) -> int:
    """Positions a file of `arch` may promise: a window it cannot state ends them."""
    positions = int(config["max_position_embeddings"])
    has_window = config.get("use_sliding_window", True) and config.get("sliding_window")
    kinds = config.get("layer_types") or ["sliding_attention"]
    if (
        "attention.sliding_window" in arch.keys
        or not has_window
        or "sliding_attention" not in kinds
    ):
        return positions
    return min(positions, int(config["sliding_window"]))


def _rope_keys(arch: GGUFArch, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    found |= {key: float(rope[name]) for key, name in arch.rope_keys.items() if rope.get(name)}
    if "llama_4_scaling_beta" in rope and kind != "yarn":
        raise UnsupportedConfig(
            f"a {arch.name} GGUF file states the length from which on queries grow for yarn alone, "
            f"not for a rope_type of {kind!r}"
        )
    if kind == "default" or (kind == "llama3" and arch.llama3_rope):
        return found
    if kind not in ("linear", "yarn"):
        raise UnsupportedConfig(f"rope_type {kind!r} cannot be written to a {arch.name} GGUF file")
    found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "linear":
        return found
    unsaid = _unsaid_of_yarn(arch, rope)
    if unsaid:
        raise UnsupportedConfig(
            f"a {arch.name} GGUF file cannot state {', '.join(unsaid)} of a yarn scaling"
        )
    found["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            found[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return found


def _unsaid_of_yarn(arch: GGUFArch, rope: dict[str, Any]) -> list[str]:
    """Settings that would be lost: the program forms the factor on cos and sin from the scaling
    factor alone, or, where its files state mscale_all_dim, from that and an mscale of 1."""
    keys = ["attention_factor", "mscale", "mscale_all_dim", "truncate"]
    if "mscale_all_dim" in arch.rope_keys.values() and rope.get("mscale_all_dim"):
        keys.remove("mscale_all_dim")
        if rope.get("mscale") == _MSCALE:
            keys.remove("mscale")
        elif rope.get("mscale") is None:
            return ["mscale_all_dim without mscale"]
    return [key for key in keys if rope.get(key) is not None and rope[key] is not True]


def rope_divisors(config: Config) -> Tensor | None:
    """rope_freqs.weight [head_dim / 2] in fp32, for a llama3 scaling; else None."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    return _divisors(rope, head_dim_of(config), int(config["max_position_embeddings"]))
