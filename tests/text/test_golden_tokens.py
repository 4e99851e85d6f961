"""The families' real vocabularies give the ids that their own programs give.

Texts and ids come with llama.cpp, made by the original tokenizers; for Mistral's files
mistral-common gives the ids here. Each is read from every kind of file sloth knows it in.
"""

from __future__ import annotations

import base64
import functools
import json
import random
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from sloth.errors import TokenizerMissing, UnsupportedConfig
from sloth.formats.gguf_header import read_header
from sloth.formats.gguf_vocabulary import PROBE_TEXTS, vocabulary_metadata
from sloth.text.tekken import tokenizer_json_of_tekken
from sloth.text.tokenizer import Tokenizer
from tests.assets import llama_cpp_vectors, llama_cpp_vocabulary
from tests.text.families import FAMILIES, MISTRAL_FILES, mistral_ids
from tests.text.test_tokenizer import TEXTS, assert_offsets_cover

# One family for each vocabulary with golden ids.
WITH_VECTORS = ("llama-3", "qwen-3", "gemma-3")
MISTRAL_TEXTS = (*PROBE_TEXTS, *(text for text in TEXTS if "<" not in text))


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    """A family's tokenizer from its vocabulary file alone."""
    file, path = FAMILIES[name].vocabulary()
    config = json.dumps({"legacy": False})
    return Tokenizer.from_files({file: path.read_bytes(), "tokenizer_config.json": config})


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_tokenizer_json_gives_llama_cpps_golden_ids(name: str) -> None:
    tokenizer = tokenizer_of(name)
    texts, expected = llama_cpp_vectors(FAMILIES[name].vectors or "")
    assert len(texts) == len(expected) >= 46
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if unicodedata.is_normalized("NFC", text):  # Qwen's normaliser
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_offsets_of_real_vocabularies_cover_every_character(name: str) -> None:
    """Masks are made from them."""
    tokenizer = tokenizer_of(name)
    for text in (*PROBE_TEXTS, *TEXTS):
        if unicodedata.is_normalized("NFC", text):
            assert_offsets_cover(tokenizer, text)


# -- Llama 2 ---------------------------------------------------------------------------------------


def test_llama_2s_tokenizer_model_gives_llama_cpps_golden_ids() -> None:
    """No package has the file, so it is put together from the pieces and scores of the GGUF."""
    path, texts, expected = llama_cpp_vocabulary("llama-spm")
    model = sentencepiece_file(read_header(path).metadata)
    tokenizer = Tokenizer.from_files({"tokenizer.model": model})
    assert tokenizer.vocab_size == 32000
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text


def sentencepiece_file(metadata: dict[str, Any]) -> bytes:
    """ModelProto as Llama's file has it: pieces (1) of { piece (1), score (2), type (3) },
    trainer_spec (2) { model_type (3): BPE, byte_fallback (35) }, normalizer_spec (3) { identity }.
    """

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    columns = [metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    pieces = b"".join(
        field(
            1,
            field(1, text.encode())
            + varint(2 << 3 | 5)
            + struct.pack("<f", score)
            + varint(3 << 3)
            + varint(kind),
        )
        for text, score, kind in zip(*columns, strict=True)
    )
    trainer = varint(3 << 3) + varint(2) + varint(35 << 3) + varint(1)
    keeps_spaces = varint(4 << 3) + varint(0)  # remove_extra_whitespaces: false
    return pieces + field(2, trainer) + field(3, field(1, b"identity") + keeps_spaces)


# -- Mistral ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISTRAL_FILES)
def test_mistrals_files_give_mistral_commons_ids(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in MISTRAL_TEXTS:
        ids = mistral_ids(MISTRAL_FILES[name], text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text


def test_tekkens_merging_by_rank_on_random_texts() -> None:
    """Where neighbouring pairs compete: repeated letters, runs of spaces, many scripts."""
    tokenizer, rng = tokenizer_of("mistral-tekken"), random.Random(0)
    alphabets = ("ab", " a", "aAb .", "\n\t ", "\u00e9\u6f22\u5b57", "0123", "-=*/", "\u0915\u094d")
    for _ in range(500):
        alphabet = rng.choice(alphabets)
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == mistral_ids(MISTRAL_FILES["mistral-tekken"], text), repr(text)


def test_tekken_names_its_special_tokens() -> None:
    tokenizer = tokenizer_of("mistral-tekken")
    assert tokenizer.vocab_size == 131072
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 11)
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.encode("<s>[INST]a[/INST]", False)[:2] == [1, 3]
    assert tokenizer.id_of("[SYSTEM_PROMPT]") == 17 and tokenizer.id_of("<SPECIAL_999>") == 999
    assert tokenizer.decode([1, 3, 4]) == ""
    assert tokenizer.encode("") == [1]


def tiny_tekken(**changes: Any) -> dict[str, Any]:
    words = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"never"]
    content = {
        "config": {
            "pattern": r"\w+|\W",
            "default_vocab_size": 3 + 258,
            "default_num_special_tokens": 3,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode()}
            for rank, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": 0, "token_str": "<unk>", "is_control": True},
            {"rank": 1, "token_str": "<s>", "is_control": True},
            {"rank": 2, "token_str": "[SAY]", "is_control": False},
        ],
    }
    return content | changes


def test_a_tekken_file_is_read_by_rank_and_saved_as_it_is(tmp_path: Path) -> None:
    content = json.dumps(tiny_tekken())
    (tmp_path / "tekken.json").write_text(content)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("abcab") == [1, 3 + 257, 3 + 256]
    assert tokenizer.encode("[SAY]never", False)[:2] == [2, 3 + ord("n")], "past the last row"
    assert tokenizer.decode([1, 2, 3 + 257]) == "[SAY]abc", "control tokens alone are left out"
    assert tokenizer.vocab_size == 261 and tokenizer.eos_id is None
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "tekken.json").read_text() == content
    (tmp_path / "tekken.json").unlink()
    with pytest.raises(TokenizerMissing, match="tekken.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"config": {}}, "default_num_special_tokens"),
        ({"vocab": []}, "258 different tokens are announced, 0 found"),
        ({"vocab": [{"rank": 0}] * 300}, "token_bytes"),
        ({"special_tokens": [{"rank": 0, "token_str": "x", "is_control": True}]}, "<s>"),
    ],
)
def test_a_damaged_tekken_file_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedConfig, match=says):
        tokenizer_json_of_tekken(tiny_tekken(**changes))


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split",
    [
        ("llama-3", "llama-bpe"),
        ("qwen-3", "qwen2"),
        ("gemma-3", "default"),
        ("mistral-v3", "default"),
        ("mistral-tekken", "tekken"),
    ],
)
def test_real_vocabularies_have_a_name_in_gguf_files(name: str, split: str) -> None:
    """Writing rebuilds the tokenizer, and is refused where it gives probe texts other ids."""
    tokenizer = tokenizer_of(name)
    metadata = vocabulary_metadata(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == split
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
