"""New tokens in the files of a tokenizer: found whole in any text, with ids behind the others.

tokenizer.json gets them in its `added_tokens`; a vocabulary in another form that `tokenizers` runs
is written in that form first. Beside a tokenizer.model they stand in tokenizer_config.json's
`added_tokens_decoder`, which is also where older programs look.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

_JSON, _CONFIG, _DECODER = "tokenizer.json", "tokenizer_config.json", "added_tokens_decoder"
# Read in place of tokenizer.json where that is missing; it would not hold the new tokens.
_OTHER_FORMS = ("tekken.json",)


def with_added_tokens(
    files: Mapping[str, bytes],
    vocabulary: dict[str, Any] | None,
    num_tokens: int,
    tokens: Sequence[str],
    special: bool,
) -> dict[str, bytes]:
    """The files with `tokens` added in their order.

    vocabulary: a tokenizer.json that holds every token there is, None for sentencepiece, whose new
    tokens come behind its `num_tokens`. special: tokens that a decoder may leave out.
    """
    result = dict(files)
    config = json.loads(result.get(_CONFIG, b"{}"))
    if vocabulary is None:
        ids = list(range(num_tokens, num_tokens + len(tokens)))
    else:
        content = json.loads(result[_JSON]) if _JSON in result else vocabulary
        ids = _following_ids(vocabulary, tokens, special)
        entries = [
            {"id": index, **_entry(token, special)}
            for index, token in zip(ids, tokens, strict=True)
        ]
        # The file alone may lack tokens that tokenizer_config.json adds, and these come first.
        known = {entry["content"] for entry in content["added_tokens"]}
        earlier = [e for e in vocabulary["added_tokens"] if e["content"] not in known]
        content["added_tokens"] += earlier + entries
        result[_JSON] = _written(content)
        for name in _OTHER_FORMS:
            result.pop(name, None)
    if vocabulary is None or _DECODER in config:
        added = {
            str(index): _entry(token, special) for index, token in zip(ids, tokens, strict=True)
        }
        config[_DECODER] = {**config.get(_DECODER, {}), **added}
        result[_CONFIG] = _written(config)
    return result


def _following_ids(vocabulary: dict[str, Any], tokens: Sequence[str], special: bool) -> list[int]:
    """The ids that `tokenizers` gives them, which depend on those already added."""
    fast = FastTokenizer.from_str(json.dumps(vocabulary, ensure_ascii=False))
    fast.add_tokens([AddedToken(t, special=special, normalized=not special) for t in tokens])
    found = [fast.token_to_id(token) for token in tokens]
    return [index for index in found if index is not None]


def _entry(token: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"content": token, **flags, "normalized": not special, "special": special}


def _written(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
