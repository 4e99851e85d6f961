"""A tokenizer as GGUF metadata: what gguf_tokenizer.py reads, written.

    gpt2   byte-level BPE: tokens and merges. The split into words is only named
           (`tokenizer.ggml.pre`), so a split that has no name is refused.
    llama  sentencepiece BPE: pieces and scores. tokenizer.json ranks its merges instead; a piece's
           score is then less the rank of the first merge that gives it, which puts all merges in
           the same order.

Every token has a type: 1 normal, 2 unknown, 3 control, 4 user-defined (found in the text before
anything else), 5 unused, 6 byte. The vocabulary has as many tokens as the embedding has rows.
What was formed is turned back into a tokenizer and asked for the ids of probe texts.
"""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

from sloth.errors import UnsupportedConfig
from sloth.formats.gguf_tokenizer import IGNORE_MERGES, PRE_TOKENIZERS, SPACE, rebuild_tokenizer
from sloth.text.sentencepiece_model import SentencePieceTokenizer
from sloth.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_END_OF_MESSAGE = "<|eom_id|>"  # Llama 3.1: the answer goes on after a tool has been called

# Words, numbers, runs of spaces, line ends, contractions, code, scripts of one to four bytes.
PROBE_TEXTS = (
    "Hello world, it's the year 2024 and they'll pay $1,234,567.89!",
    "def f(x):\n    return {'a': [x ** 2 + 0x1F, \"b\"]}  # done\n\n\n\tend",
    "  two  spaces   three\t\ttabs\r\nA  B ",
    "na\u00efve \u00e9l\u00e8ve \u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u0440\u0443\u0441",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631",
    "\U0001f600\U0001f469\u200d\U0001f4bb e\u0301 \u00bd \u2028 ...!?",
    "HTTPServer camelCase SHOUTING_snake I'M WE'RE don't",
)

Vocabulary = list[tuple[str, float, int]]  # (text, score, type) by id


def vocabulary_metadata(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a model whose embedding has `num_rows` rows.

    Values are int, bool, str, or lists of one of str, int, float. Raises UnsupportedConfig for a
    tokenizer that GGUF programs would run otherwise.
    """
    source = tokenizer.source()
    if isinstance(source, SentencePieceTokenizer):
        vocabulary = _of_sentencepiece(source)
        found: dict[str, Any] = {"model": "llama", "pre": "default"}
    elif _is_byte_level(source):
        vocabulary = _of_tokenizer_json(source)
        merges = [" ".join(pair) for pair in _merges(source)]
        found = {"model": "gpt2", "pre": _name_of_split(source), "merges": merges}
    elif source["model"]["type"] == "BPE" and source["model"].get("byte_fallback"):
        vocabulary = _scored(source)
        found = {"model": "llama", "pre": "default"}
    else:
        raise UnsupportedConfig(
            f"a {source['model']['type']} tokenizer cannot be written to a GGUF file; known are "
            "byte-level BPE and sentencepiece BPE with byte fallback"
        )
    vocabulary = _as_many_as(vocabulary, num_rows)
    found["tokens"] = [text for text, _, _ in vocabulary]
    found["token_type"] = [kind for _, _, kind in vocabulary]
    if found["model"] == "llama":
        found["scores"] = [score for _, score, _ in vocabulary]
        found["add_space_prefix"] = _puts_a_space_first(tokenizer, found["tokens"])
    found |= _special_ids(tokenizer, num_rows)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    metadata |= _chat_templates(tokenizer)
    _check(tokenizer, metadata)
    return metadata


# -- tokens ----------------------------------------------------------------------------------------


def _is_byte_level(source: dict[str, Any]) -> bool:
    steps = _steps(source.get("pre_tokenizer"), "pretokenizers")
    return source["model"]["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps)


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a (nested) sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[inner] for step in _steps(each, inner)]


def _name_of_split(source: dict[str, Any]) -> str:
    """The name GGUF programs know a byte-level tokenizer's split into words by."""

    def plain(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """trim_offsets moves offsets only, never ids."""
        return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]

    steps = plain(_steps(source["pre_tokenizer"], "pretokenizers"))
    normalizers = _steps(source.get("normalizer"), "normalizers")
    ignores_merges = bool(source["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        # "qwen2" files are read with NFC; no other named split comes with a normalizer.
        expected = [{"type": "NFC"}] if name == "qwen2" else []
        same = plain(known) == steps and expected == normalizers
        if same and (name in IGNORE_MERGES) == ignores_merges:
            return name
    what = json.dumps({"normalizer": normalizers, "pre_tokenizer": steps}, ensure_ascii=False)
    raise UnsupportedConfig(
        f"this tokenizer's split into words has no name in GGUF files: {what}, ignore_merges "
        f"{ignores_merges}; known are {', '.join(PRE_TOKENIZERS)}"
    )


def _merges(source: dict[str, Any]) -> list[list[str]]:
    """Pairs; older files write each as one text."""
    merges = source["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _of_tokenizer_json(source: dict[str, Any]) -> Vocabulary:
    texts = {index: text for text, index in source["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for token in source["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    size = max(texts) + 1
    return [(texts.get(i, ""), 0.0, kinds.get(i, UNUSED)) for i in range(size)]


def _scored(source: dict[str, Any]) -> Vocabulary:
    """Pieces of a tokenizer.json with the scores that order its merges."""
    ranks: dict[str, int] = {}
    merges = _merges(source)
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = source["model"].get("unk_token")
    added = {token["id"]: token for token in source["added_tokens"]}
    found: Vocabulary = []
    for index, (text, _, kind) in enumerate(_of_tokenizer_json(source)):
        if text == unknown:
            kind = UNKNOWN
        elif _BYTE_PIECE.fullmatch(text):
            kind = BYTE
        elif kind == USER_DEFINED and SPACE in text:
            # Looked for in the text as it is, where there is no such character, it is never found:
            # merges give it. Looked for after spaces became it, it stands for spaces.
            if added[index]["normalized"]:
                text = text.replace(SPACE, " ")
            else:
                kind = NORMAL
        # Pieces that no merge gives are single characters, whose score is never asked for.
        score = float(-ranks.get(text, len(merges))) if kind == NORMAL else 0.0
        found.append((text, score, kind))
    return found


def _of_sentencepiece(source: SentencePieceTokenizer) -> Vocabulary:
    found = [
        (text.replace(SPACE, " ") if kind == USER_DEFINED else text, score, kind)
        for text, score, kind in source.pieces()
    ]
    for index, token in sorted(source.added.items()):
        found += [("", 0.0, UNUSED)] * (index + 1 - len(found))
        kind = CONTROL if token.special else USER_DEFINED
        if found[index][2] not in (UNKNOWN, CONTROL):
            found[index] = (token.content, 0.0, kind)
    return found


def _as_many_as(vocabulary: Vocabulary, num_rows: int) -> Vocabulary:
    """Unused tokens for rows without one; tokens without a row are left out."""
    padded = vocabulary[:num_rows] + [("", 0.0, UNUSED)] * (num_rows - len(vocabulary))
    return [
        (f"[PAD{index}]" if kind == UNUSED and not text else text, score, kind)
        for index, (text, score, kind) in enumerate(padded)
    ]


def _puts_a_space_first(tokenizer: Tokenizer, tokens: list[str]) -> bool:
    return tokens[tokenizer.encode("a", add_special_tokens=False)[0]].startswith(SPACE)


# -- special tokens and templates ------------------------------------------------------------------


def _special_ids(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    """Ids by role. What ends an answer beside eos is an end of turn, or of a message."""
    ends = [index for index in tokenizer.stop_ids if index < num_rows]
    around_nothing = tokenizer.encode("")
    # A tokenizer.model alone names no special token, and begins texts with its own all the same.
    bos = next(iter(around_nothing), None) if tokenizer.bos_id is None else tokenizer.bos_id
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(ends), None)
    others = [index for index in ends if index != eos]
    eom = tokenizer.id_of(_END_OF_MESSAGE)
    turns = [index for index in others if index != eom]
    unknown = tokenizer.special_tokens.get("unk_token")
    found = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "eot_token_id": next(iter(turns), None),
        "eom_token_id": eom if eom in others else next(iter(turns[1:]), None),
        "padding_token_id": tokenizer.pad_id,
        "unknown_token_id": None if unknown is None else tokenizer.id_of(unknown),
    }
    return {key: index for key, index in found.items() if index is not None} | {
        "add_bos_token": bos is not None and around_nothing[:1] == [bos],
        "add_eos_token": eos is not None and around_nothing[-1:] == [eos] != [bos],
    }


def _chat_templates(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.chat is None:
        return {}
    found: dict[str, Any] = {"tokenizer.chat_template": tokenizer.chat.source}
    if tokenizer.chat.named:
        found["tokenizer.chat_templates"] = sorted(tokenizer.chat.named)
        for name, text in tokenizer.chat.named.items():
            found[f"tokenizer.chat_template.{name}"] = text
    return found


# -- the check -------------------------------------------------------------------------------------


def _check(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Rebuild the tokenizer from the metadata; it must give the ids of the one in use."""
    again = Tokenizer.from_files(rebuild_tokenizer(metadata))
    for text in ("", *PROBE_TEXTS):
        if again.encode(text) != tokenizer.encode(text):
            raise UnsupportedConfig(
                f"this tokenizer cannot be written to a GGUF file: {text!r} would become "
                f"{again.encode(text)} and is {tokenizer.encode(text)}"
            )
    if set(again.stop_ids) < set(tokenizer.stop_ids):
        lost = sorted(set(tokenizer.stop_ids) - set(again.stop_ids))
        warnings.warn(
            f"a GGUF file names three tokens that end an answer; {lost} are left out (the "
            "Modelfile names all)",
            stacklevel=3,
        )
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    for mark in dict.fromkeys(tokenizer.special_tokens.values()):
        index = tokenizer.id_of(mark)
        text = f"{mark}hello"
        if index is None or index >= num_tokens:
            continue
        if again.encode(text, False) != tokenizer.encode(text, False):
            warnings.warn(
                f"programs that run GGUF files split the text after {mark} otherwise than this "
                "tokenizer does (they begin it anew, with a space where texts begin with one); "
                "chat prompts get other tokens there than in training",
                stacklevel=3,
            )
            return
