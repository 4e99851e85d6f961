"""The parts of a tokenizer.json, for vocabularies that come in another form of file.

Keys and their defaults are those that `tokenizers` writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    """A token that is found in the text, as it is written there, before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


def split(pattern: str) -> dict[str, Any]:
    """A step of a pre-tokenizer: each match of a regular expression is a word of its own."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """Bytes as printable characters: a step of a pre-tokenizer, or the decoder. use_regex: split as
    GPT-2 does, too.
    """
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split_into_bytes(pattern: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer that splits by one regular expression, into bytes then."""
    return [split(pattern), byte_level(use_regex=False)]


def pre_tokenizer(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps one after another."""
    return {"type": "Sequence", "pretokenizers": steps}


def bpe(vocab: Mapping[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    """The model: tokens with their ids, and the pairs that are merged, best first. changes: of its
    other keys.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
        **changes,
    }


def merges_of(tokens: Iterable[str], ranks: Mapping[str, int]) -> list[list[str]]:
    """The merges of a vocabulary that lists none: every split of each of `tokens`, best first, into
    two tokens that have a rank. Those of one token come in the order of their parts' ranks.
    """
    merges: list[list[str]] = []
    for token in tokens:
        splits = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def template(
    before: str | None, after: str | None, vocab: Mapping[str, int]
) -> dict[str, Any] | None:
    """The post-processor that puts one token before and one after a text; None for neither."""
    special = [token for token in (before, after) if token is not None]
    if not special:
        return None

    def item(token: str | None) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": 0}}] if token is not None else []

    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    single = [*item(before), text, *item(after)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second],
        "special_tokens": {
            token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in special
        },
    }
