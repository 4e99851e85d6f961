"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers they were converted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.formats.gguf_header import read_header
from sloth.formats.gguf_tokenizer import rebuild_tokenizer
from sloth.text.tokenizer import Tokenizer
from tests.assets import llama_cpp_vocabulary
from tests.formats.gguf_files import byte_level_vocabulary
from tests.oracles import hf_tokenizer
from tests.text.test_tokenizer import TEXTS, sentencepiece_model


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokens, merges = byte_level_vocabulary(320)
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": merges,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kept = {key: value for key, value in (metadata | changes).items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in kept.items()}


def sentencepiece_metadata(model: bytes, **changes: Any) -> dict[str, Any]:
    """What a converter writes for a sentencepiece model."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = range(library.get_piece_size())

    def kind(index: int) -> int:
        if library.is_unknown(index):
            return 2
        if library.is_control(index):
            return 3
        return 6 if library.is_byte(index) else 1

    metadata = {
        "model": "llama",
        "tokens": [library.id_to_piece(index) for index in pieces],
        "scores": [library.get_score(index) for index in pieces],
        "token_type": [kind(index) for index in pieces],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_files(rebuild_tokenizer(metadata))


VOCABULARIES = {
    "byte level": lambda: byte_level_metadata(),
    "byte level with bos and eos": lambda: byte_level_metadata(
        pre="llama-bpe", add_bos_token=True, add_eos_token=True
    ),
    "sentencepiece": lambda: sentencepiece_metadata(sentencepiece_model()),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_transformers_reads_the_same_ids_from_the_rebuilt_files(name: str, tmp_path: Path) -> None:
    files = rebuild_tokenizer(VOCABULARIES[name]())
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    ours, theirs = Tokenizer.from_files(files), hf_tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert ours.chat is None


def test_sentencepiece_vocabulary_gives_the_librarys_ids() -> None:
    model = sentencepiece_model()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = tokenizer_of(sentencepiece_metadata(model))
    for text in [text for text in TEXTS if "<" not in text]:
        ids = library.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text
    from_model = Tokenizer.from_files({"tokenizer.model": model})
    for text in TEXTS:
        assert tokenizer.encode(text) == from_model.encode(text)


def test_no_space_is_put_before_a_text_when_the_file_says_so() -> None:
    model = sentencepiece_model(add_dummy_prefix=False)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = tokenizer_of(
        sentencepiece_metadata(model, add_space_prefix=False, add_bos_token=False)
    )
    for text in [text for text in TEXTS if "<" not in text]:
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(library.encode(text)) == text


@pytest.mark.parametrize(
    "pre, add, expected",
    [
        ("smollm", None, False),
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("llama-bpe", False, False),
        ("smollm", True, True),
    ],
)
def test_bos_is_added_as_the_file_or_the_kind_says(pre: str, add: Any, expected: bool) -> None:
    tokenizer = tokenizer_of(byte_level_metadata(pre=pre, add_bos_token=add))
    assert (tokenizer.encode("hello")[0] == tokenizer.bos_id) == expected


def test_every_end_of_turn_is_a_stop() -> None:
    tokenizer = tokenizer_of(byte_level_metadata(eot_token_id=5, padding_token_id=0))
    assert tokenizer.stop_ids == (2, 5) and tokenizer.pad_id == 0


def test_chat_templates_come_along() -> None:
    metadata = byte_level_metadata() | {"tokenizer.chat_template": "A"}
    chat = tokenizer_of(metadata).chat
    assert chat is not None and chat.render([]) == "A"
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "T"}
    chat = tokenizer_of(metadata).chat
    assert chat is not None and (chat.render([]), chat.render([], tools=[])) == ("A", "T")


def test_a_file_that_does_not_name_its_split_is_read_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre"):
        tokenizer = tokenizer_of(byte_level_metadata(pre=None))
    assert tokenizer.decode(tokenizer.encode("hello 12345 world!")) == "hello 12345 world!"


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"pre": "from-the-future"}, UnsupportedConfig, "from-the-future"),
        ({"model": "t5"}, UnsupportedConfig, "t5"),
        ({"model": "llama", "scores": [-1000.0] * 320}, UnsupportedConfig, "scores"),
        ({"tokens": None}, CheckpointMismatch, "tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, CheckpointMismatch, "twice"),
        ({"token_type": [1]}, CheckpointMismatch, "token types"),
        ({"merges": ["a b c"]}, CheckpointMismatch, "a b c"),
        ({"eos_token_id": 10**6}, CheckpointMismatch, "eos_token_id"),
    ],
)
def test_vocabularies_that_cannot_be_rebuilt_are_refused(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        rebuild_tokenizer(byte_level_metadata(**changes))


def test_rebuilt_files_are_valid_json_with_the_stop_token() -> None:
    files = rebuild_tokenizer(byte_level_metadata())
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"


# Every family whose words are split in another way.
@pytest.mark.parametrize(
    "name",
    "llama-spm llama-bpe qwen2 gpt-2 starcoder refact command-r deepseek-coder phi-3".split(),
)
def test_llama_cpp_golden_vectors(name: str) -> None:
    path, texts, expected = llama_cpp_vocabulary(name)
    tokenizer = tokenizer_of(read_header(path).metadata)
    assert len(texts) == len(expected) >= 46
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
