"""tekken.json, the only tokenizer file of some Mistral models, as the content of a tokenizer.json.

A byte-level BPE that lists no merges. Every token has a rank, and of all neighbouring pairs whose
union is a token the one of the lowest rank is merged first. tokenizer.json ranks pairs: all splits
of every token into two tokens, in the order of the tokens' ranks, merge alike. A word that is a
token is never split.

    ids     the special tokens, then rank + number of special tokens
    vocab   more ranks than the model has rows: those past `default_vocab_size` are left out
    special named in the file; the first files leave the names out, and mean NAMES_OF_OLD_FILES

Source: the files themselves and mistral-common's documentation,
https://mistralai.github.io/mistral-common
"""

from __future__ import annotations

import base64
from typing import Any

from tokenizers import pre_tokenizers

from sloth.errors import UnsupportedConfig
from sloth.text.tokenizer_json import (
    added_token,
    bpe,
    byte_level,
    merges_of,
    pre_tokenizer,
    split_into_bytes,
    template,
)

BOS = "<s>"
# What tokenizer_config.json would say.
SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
NAMES_OF_OLD_FILES = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


def tokenizer_json_of_tekken(content: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json from tekken.json. Raises UnsupportedConfig for what is no such file."""
    try:
        config = content["config"]
        num_special = int(config["default_num_special_tokens"])
        num_ranks = int(config["default_vocab_size"]) - num_special
        words = _words(content["vocab"], num_ranks)
        special = _special(content.get("special_tokens"), num_special)
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedConfig(
            f"tekken.json is not what it should be: {type(error).__name__}: {error}"
        ) from error
    if BOS not in (token["content"] for token in special):
        raise UnsupportedConfig(f"tekken.json has no special token {BOS}")
    vocab = {token["content"]: token["id"] for token in special}
    ranks = {word: rank for rank, word in enumerate(words)}
    vocab |= {word: num_special + rank for word, rank in ranks.items()}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(split_into_bytes(pattern)),
        "post_processor": template(BOS, None, vocab),
        "decoder": byte_level(use_regex=True),
        "model": bpe(vocab, merges_of(words, ranks), ignore_merges=True),
    }


def _words(entries: list[dict[str, Any]], count: int) -> list[str]:
    """Tokens by rank, each byte written as the character that byte-level vocabularies have."""
    letters = _byte_letters()
    words = [
        "".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"]))
        for entry in sorted(entries, key=lambda entry: entry["rank"])[:count]
    ]
    if len(set(words)) != count:
        raise ValueError(f"{count} different tokens are announced, {len(set(words))} found")
    return words


def _byte_letters() -> list[str]:
    """The character of each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(rest)}
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letters[byte] for byte in range(256)]


def _special(entries: list[dict[str, Any]] | None, count: int) -> list[dict[str, Any]]:
    """added_tokens; ids that have no name get one that no text has."""
    if entries is None:
        named = {rank: (name, True) for rank, name in enumerate(NAMES_OF_OLD_FILES)}
    else:
        named = {
            int(entry["rank"]): (str(entry["token_str"]), bool(entry["is_control"]))
            for entry in entries
        }
    found = []
    for rank in range(count):
        name, is_control = named.get(rank, (f"<SPECIAL_{rank}>", True))
        found.append(added_token(rank, name, special=is_control))
    return found
