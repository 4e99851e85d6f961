"""Reading config.json: known keys are taken, a written list is irrelevant, anything else is
refused.

A key that would change the mathematics must never be ignored in silence, so every architecture
names what it understands and `KeyReader` refuses the rest with the way out (`load(...,
ignore_config=[...])`). Old (Transformers 4) and new (Transformers 5) spellings are both read; the
new one is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sloth.errors import UnsupportedConfig
from sloth.models.rope import DEFAULT_THETA, QueryScale, RopeParameters
from sloth.models.values import checked

# Keys that name the file's history, a tool's bookkeeping, sampling defaults or classification
# heads: none of them changes the logits of a causal language model.
IRRELEVANT_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    add_cross_attention architectures attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length max_sequence_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads quantization_config remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
)

# Of keys that only some types read: what leaves the others' mathematics as it is.
NEUTRAL_VALUES: dict[str, Any] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved"), False),
    **dict.fromkeys(("use_bidirectional_attention", "use_mrope", "use_sliding_window"), False),
    "partial_rotary_factor": 1.0,
}

# Keys that name code inside the repository. sloth never runs it; on a supported type it has its
# own.
REMOTE_CODE_KEYS = frozenset({"auto_map", "model_file", "custom_pipelines"})


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer: its rotary table and how far back it sees.

    rope: parameters of the layer's rotary embedding, None for a layer without one.
    window: keys a query sees, itself included; None for all of them.
    query_scale: a factor on the queries that grows with position, None for none.
    """

    rope: RopeParameters | None
    window: int | None = None
    query_scale: QueryScale | None = None


# What config.json's `layer_types` says of a layer.
FULL, SLIDING = "full_attention", "sliding_attention"
_HEADS = ("num_attention_heads", "num_key_value_heads")
# Positions before a scaling, and the rotary types for which it may stand beside `rope_scaling`.
_ORIGINAL_LENGTH, _READ_IT = "original_max_position_embeddings", ("llama3", "yarn")


class KeyReader:
    """Hands out the keys of one config.json and refuses what nobody asked for.

    Raises UnsupportedConfig for a missing required key, a value the architecture does not compute,
    and, in `finish`, for keys that are neither known nor irrelevant.
    """

    def __init__(self, config: dict[str, Any], ignore: Iterable[str] = ()) -> None:
        self.config = config
        self.ignore = frozenset(ignore)
        self.model_type = str(config.get("model_type"))
        self._taken: dict[str, Any] = {}

    def take(self, key: str, default: Any = ...) -> Any:
        """Value of `key`; `default` if the key is absent or null; required without a default."""
        value = self.config.get(key)
        if value is None:
            if default is ...:
                raise UnsupportedConfig(f"config.json of a {self.model_type} model lacks {key!r}")
            value = default
        return self._given(key, value)

    def take_nullable(self, key: str, default: Any) -> Any:
        """Value of `key`, null included; `default` only where the key is absent.

        For keys with which null says "switched off", such as a window or a softcap.
        """
        return self._given(key, self.config.get(key, default))

    def _given(self, key: str, value: Any) -> Any:
        self._taken[key] = checked(key, value)
        return value

    def take_rope(
        self, head_dim: int, max_positions: int, theta: float = DEFAULT_THETA
    ) -> RopeParameters:
        """The rotary table of every layer, in the old spelling or the new; `theta` if unsaid."""
        entry = self.take_rope_entry()
        return RopeParameters.from_hf(entry, theta, head_dim, max_positions, self.ignore)

    def take_rope_entry(self) -> dict[str, Any]:
        """What the file says of rotary positions, as one `rope_parameters` entry; {} if nothing.

        A length of pretraining beside it goes before the one inside, as in Transformers, which
        reads it of the scalings that need one.
        """
        new, old = self.take("rope_parameters", None), self.take("rope_scaling", None)
        theta = self.take("rope_theta", None)
        entry = ({} if theta is None else {"rope_theta": theta}) | dict(old or new or {})
        original = self.take(_ORIGINAL_LENGTH, None)
        if original is not None and entry.get("rope_type", entry.get("type")) in _READ_IT:
            entry[_ORIGINAL_LENGTH] = original
        return entry

    def take_layer_types(
        self, default: Sequence[str], window: int | None, key: str = "layer_types"
    ) -> tuple[str, ...]:
        """Kind of each layer, FULL or SLIDING; `default`, one a layer, if unsaid.

        window: what sliding layers see; there must be one.
        """
        types = tuple(self.take(key, default))
        if len(types) != len(default) or any(kind not in (FULL, SLIDING) for kind in types):
            raise UnsupportedConfig(
                f"config.json sets {key}={types!r}; expected {len(default)} entries, one a layer, "
                f"of {FULL!r} and {SLIDING!r}"
            )
        if SLIDING in types and window is None:
            raise UnsupportedConfig(f"config.json names {SLIDING!r} layers but no sliding_window")
        return types

    def expect(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """Value of `key`, which must be one of `allowed`, unless the user ignores it by name."""
        value = self.take(key, default)
        if value not in allowed and key not in self.ignore:
            raise UnsupportedConfig(
                f"config.json sets {key}={value!r}; {self.model_type} computes only "
                f"{' or '.join(map(repr, allowed))}. To load it all the same: "
                f"sloth.load(..., ignore_config=[{key!r}])"
            )
        return value if value in allowed else default

    def finish(self) -> None:
        """Refuse what is left over, and numbers that do not go together."""
        heads, kv_heads = (self._taken.get(key) for key in _HEADS)
        if heads and kv_heads and heads % kv_heads:
            raise UnsupportedConfig(
                f"config.json sets num_attention_heads={heads} and num_key_value_heads={kv_heads}; "
                "expected a multiple, since each of the latter serves as many of the former"
            )
        for key in sorted(REMOTE_CODE_KEYS & self.config.keys()):
            warnings.warn(
                f"config.json names code of its own ({key}); sloth does not run it and uses its "
                f"own {self.model_type}",
                stacklevel=2,
            )
        known = self._taken.keys() | IRRELEVANT_KEYS | REMOTE_CODE_KEYS | self.ignore
        unknown = sorted(
            key
            for key in self.config.keys() - known
            if self.config[key] not in (None, NEUTRAL_VALUES.get(key))
        )
        if unknown:
            raise UnsupportedConfig(
                f"config.json of a {self.model_type} model has keys that sloth does not know: "
                f"{', '.join(unknown)}. If they do not change the mathematics, load with "
                f"sloth.load(..., ignore_config={unknown!r})"
            )
