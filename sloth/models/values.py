"""What a value of config.json must be: said in words, and checked where it is read.

A size that is a text, or no heads at all, would otherwise fail far from the file, in arithmetic
that names neither key nor value, or give a model that computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sloth.errors import UnsupportedConfig


@dataclass(frozen=True)
class Kind:
    """Values of one kind. words: what a message says was expected."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


COUNT = Kind("a positive whole number", lambda v: _is_whole(v) and v > 0)
INDEX = Kind("a whole number from 0 on", lambda v: _is_whole(v) and v >= 0)
WINDOW = Kind("a positive whole number, or null for no window", COUNT.fits)
POSITIVE = Kind("a positive number", lambda v: _is_number(v) and v > 0)
NUMBER = Kind("a number", _is_number)
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
LIST = Kind("a list", lambda v: isinstance(v, list | tuple))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))

# Keys of config.json, its rotary settings among them, that some architecture reads.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        """
        head_dim hidden_size intermediate_size max_position_embeddings no_rope_layer_interval
        num_attention_heads num_hidden_layers num_key_value_heads sliding_window_pattern vocab_size
        """.split(),
        COUNT,
    ),
    **dict.fromkeys(
        """
        attention_factor attn_logit_softcapping beta_fast beta_slow factor final_logit_softcapping
        high_freq_factor low_freq_factor original_max_position_embeddings partial_rotary_factor
        query_pre_attn_scalar rms_norm_eps rope_local_base_freq rope_theta
        """.split(),
        POSITIVE,
    ),
    **dict.fromkeys(("llama_4_scaling_beta", "mscale", "mscale_all_dim"), NUMBER),
    **dict.fromkeys(
        "attention_bias mlp_bias tie_word_embeddings truncate use_sliding_window".split(), SWITCH
    ),
    **dict.fromkeys(("layer_types", "no_rope_layers"), LIST),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
    "max_window_layers": INDEX,
    "sliding_window": WINDOW,
}


def checked(key: str, value: Any, kind: Kind | None = None) -> Any:
    """`value`, if it is null or of the kind that `key` has. Raises UnsupportedConfig."""
    kind = kind or KINDS.get(key)
    if value is None or kind is None or kind.fits(value):
        return value
    raise UnsupportedConfig(f"config.json sets {key}={value!r}; expected {kind.words}")
