"""The tokenizer of a GGUF file as Hugging Face files: tokenizer.json and its configs, from the
metadata.

Two kinds of vocabulary (`tokenizer.ggml.model`) are rebuilt:

    gpt2   byte-level BPE: tokens and merges are stored; the split into words is only named
           (`tokenizer.ggml.pre`), so the splits are a table here and an unknown name is refused.
    llama  sentencepiece BPE: pieces and scores are stored. A pair is merged when its union is a
    piece, best
           score first, so the merges are all splits of each piece into two pieces, ordered by
           score. Spaces become U+2581, one is put before every text, unknown characters fall back
           to bytes.

The regular expressions are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.text.tokenizer_json import (
    added_token,
    bpe,
    byte_level,
    merges_of,
    pre_tokenizer,
    split,
    split_into_bytes,
    template,
)

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{ending}}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{ending}}|"
)
_TEKKEN = _CASED.replace("{ending}", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
_GPT4O = (
    _CASED.replace("{ending}", f"{_CONTRACTION}?")
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _REST
)

_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2_STEPS = [byte_level(use_regex=True)]
_SMOLLM_STEPS = [_DIGITS, byte_level(use_regex=True)]
_DEFAULT_STEPS = [
    split(r"[\p{P}\$\+<=>\^~\|]+"),
    split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
    split(r"\p{N}+"),
    split("[0-9][0-9][0-9]"),
    byte_level(use_regex=False),
]
_DEEPSEEK_CODER_STEPS = [
    split("[\r\n]"),
    split(r"\s?\p{L}+"),
    split(r"\s?\p{P}+"),
    split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
    _DIGITS,
    byte_level(use_regex=False),
]
# name in tokenizer.ggml.pre -> steps of the pre-tokenizer
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": _DEFAULT_STEPS,
    "gpt-2": _GPT2_STEPS,
    "smollm": _SMOLLM_STEPS,
    "starcoder": _SMOLLM_STEPS,
    "refact": _SMOLLM_STEPS,
    "command-r": _SMOLLM_STEPS,
    "llama-bpe": split_into_bytes(_LLAMA3),
    "llama3": split_into_bytes(_LLAMA3),
    "llama-v3": split_into_bytes(_LLAMA3),
    "falcon3": split_into_bytes(_LLAMA3),
    "pixtral": split_into_bytes(_LLAMA3),
    "smaug-bpe": split_into_bytes(_LLAMA3),
    "qwen2": split_into_bytes(_QWEN2),
    "deepseek-r1-qwen": split_into_bytes(_QWEN2),
    "tekken": split_into_bytes(_TEKKEN),
    "gpt-4o": split_into_bytes(_GPT4O),
    "llama4": split_into_bytes(_GPT4O),
    "deepseek-coder": _DEEPSEEK_CODER_STEPS,
}
# A word that is itself a token is not split and merged again; a text begins with bos unless the
# file says no.
IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
_BEGINS_WITH_BOS = IGNORE_MERGES


def rebuild_tokenizer(metadata: dict[str, Any]) -> dict[str, str]:
    """File name -> text of tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises UnsupportedConfig for a vocabulary that cannot be rebuilt, CheckpointMismatch for a
    damaged one.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedConfig(
            f"the GGUF tokenizer {kind!r} is not supported; supported: gpt2 (byte-level BPE) and "
            "llama (sentencepiece BPE)"
        )
    tokens = _strings(metadata, "tokens")
    if len(set(tokens)) != len(tokens):
        raise CheckpointMismatch("the GGUF vocabulary holds a token twice")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointMismatch(
            f"the GGUF file has {len(tokens)} tokens and {len(types)} token types"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if kind == "gpt2":
        parts, begins_with_bos = _byte_level_bpe(metadata, vocab)
    else:
        parts, begins_with_bos = _sentencepiece_bpe(metadata, vocab, types), True
    special = _special_tokens(metadata, tokens)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", begins_with_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    before = special.get("bos_token") if add_bos else None
    after = special.get("eos_token") if add_eos else None
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "post_processor": template(before, after, vocab),
        **parts,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": before is not None,
        "add_eos_token": after is not None,
        **special,
    }
    chat = _chat_template(metadata)
    if chat is not None:
        config["chat_template"] = chat
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        "generation_config.json": json.dumps(_generation_config(metadata), indent=2) + "\n",
    }


def _byte_level_bpe(metadata: dict[str, Any], vocab: dict[str, int]) -> tuple[dict[str, Any], bool]:
    """tokenizer.json without its added tokens and post-processor; whether texts begin with bos."""
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        warnings.warn(
            "the GGUF file does not say how its tokenizer splits words (tokenizer.ggml.pre); "
            "llama.cpp's default is used, which may split text otherwise than in training",
            stacklevel=2,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedConfig(
            f"the GGUF file's pre-tokenizer {name!r} is not known; known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Load the model's Hugging Face folder instead"
        )
    merges = [merge.split(" ") for merge in _strings(metadata, "merges")]
    bad = next((merge for merge in merges if len(merge) != 2), None)
    if bad is not None:
        raise CheckpointMismatch(f"the GGUF merge {' '.join(bad)!r} is no pair")
    parts = {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": pre_tokenizer(PRE_TOKENIZERS[name]),
        "decoder": byte_level(use_regex=True),
        "model": bpe(vocab, merges, ignore_merges=name in IGNORE_MERGES),
    }
    return parts, name in _BEGINS_WITH_BOS


def _sentencepiece_bpe(
    metadata: dict[str, Any], vocab: dict[str, int], types: list[int]
) -> dict[str, Any]:
    tokens = list(vocab)
    scores = metadata.get("tokenizer.ggml.scores", [])
    pieces = [index for index, token in enumerate(tokens) if _is_piece(token, types[index])]
    if len(scores) != len(tokens) or len({scores[index] for index in pieces}) < 2:
        raise UnsupportedConfig(
            "the GGUF file's sentencepiece vocabulary has no usable scores; load the Hugging Face "
            "folder of the model instead"
        )
    unknown = tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else tokens[0]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    merges = _merges_by_score(tokens, pieces, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _is_piece(token: str, kind: int) -> bool:
    """Whether merging can give this token; runs of spaces are often stored as user-defined."""
    return kind == _NORMAL or (kind == _USER_DEFINED and not token.strip(SPACE))


def _merges_by_score(tokens: list[str], pieces: list[int], scores: list[float]) -> list[list[str]]:
    """Every split of every piece in two pieces, best score first."""
    best_first = sorted(pieces, key=lambda index: (-scores[index], index))
    ids = {tokens[index]: index for index in pieces}
    return merges_of((tokens[index] for index in best_first), ids)


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens found in the text before anything else: control tokens and user-defined ones."""
    return [
        added_token(index, token, special=types[index] != _USER_DEFINED)
        for index, token in enumerate(tokens)
        if types[index] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        and not _is_piece(token, types[index])
    ]


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found: dict[str, str] = {}
    for name, stored in named.items():
        index = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise CheckpointMismatch(
                f"tokenizer.ggml.{stored}_token_id is {index}, but there are {len(tokens)} tokens"
            )
        found[name] = tokens[index]
    return found


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Token ids; every token that ends a turn or a text is one that generation stops at."""
    config: dict[str, Any] = {}
    for name, stored in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        index = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if index is not None:
            config[name] = index
    stops = [metadata.get(f"tokenizer.ggml.{stored}_token_id") for stored in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(index for index in stops if index is not None))
    if unique:
        config["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return config


def _chat_template(metadata: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """One template, or a list of named ones as Hugging Face writes them."""
    default = metadata.get("tokenizer.chat_template")
    named = [
        {"name": name, "template": metadata[f"tokenizer.chat_template.{name}"]}
        for name in metadata.get("tokenizer.chat_templates", [])
        if f"tokenizer.chat_template.{name}" in metadata
    ]
    if not named:
        return default
    return [*([{"name": "default", "template": default}] if default else []), *named]


def _strings(metadata: dict[str, Any], name: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointMismatch(f"the GGUF file lacks tokenizer.ggml.{name}")
    return values
