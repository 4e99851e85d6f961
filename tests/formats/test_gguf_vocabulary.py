"""Tokenizers written as GGUF metadata: the keys that converters write, the same ids once read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from sloth.errors import UnsupportedConfig
from sloth.formats.gguf_header import read_header
from sloth.formats.gguf_tokenizer import PRE_TOKENIZERS, rebuild_tokenizer
from sloth.formats.gguf_vocabulary import vocabulary_metadata
from sloth.text.tokenizer import Tokenizer
from tests.assets import llama_cpp_vocabulary, smollm2
from tests.formats.test_gguf_tokenizer import byte_level_metadata, sentencepiece_metadata
from tests.text.test_tokenizer import CORPUS, TEXTS, byte_level_folder, sentencepiece_model

ROWS = 360  # more than any small vocabulary here has tokens


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_files(rebuild_tokenizer(metadata))


def key(metadata: dict[str, Any], name: str) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}")


def json_of(fast: FastTokenizer, **config: Any) -> Tokenizer:
    return Tokenizer.from_files(
        {"tokenizer.json": fast.to_str(), "tokenizer_config.json": json.dumps(config)}
    )


def byte_level(pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    fast = FastTokenizer(models.BPE(ignore_merges=ignore_merges))
    fast.pre_tokenizer, fast.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        fast.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    return json_of(fast, eos_token="</s>")


def sentencepiece_folder(folder: Path, **config: Any) -> Tokenizer:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


# -- the same ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "sentencepiece as json"])
def test_ids_are_the_same_after_the_round_trip(kind: str, tmp_path: Path) -> None:
    if kind == "byte level":
        tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path / "t"))
    elif kind == "sentencepiece":
        tokenizer = sentencepiece_folder(tmp_path / "t")
    else:
        tokenizer = tokenizer_of(sentencepiece_metadata(sentencepiece_model()))
    again = tokenizer_of(vocabulary_metadata(tokenizer, ROWS))
    for text in TEXTS:
        for special in (True, False):
            assert again.encode(text, special) == tokenizer.encode(text, special), text
        ids = tokenizer.encode(text)
        assert again.decode(ids) == tokenizer.decode(ids), text
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.stop_ids == tokenizer.stop_ids and again.vocab_size == ROWS


def test_sentencepiece_pieces_scores_and_types_are_the_librarys(tmp_path: Path) -> None:
    got = vocabulary_metadata(sentencepiece_folder(tmp_path / "t"), ROWS)
    expected = sentencepiece_metadata(sentencepiece_model())
    size = len(key(expected, "tokens"))
    for name in ("tokens", "scores", "token_type"):
        assert key(got, name)[:size] == key(expected, name), name
    assert key(got, "token_type")[size:] == [5] * (ROWS - size)
    assert key(got, "tokens")[-1] == f"[PAD{ROWS - 1}]"
    assert key(got, "add_space_prefix") is True and key(got, "add_bos_token") is True
    assert key(got, "unknown_token_id") == 0


def test_user_defined_spaces_are_written_as_spaces(tmp_path: Path) -> None:
    """Programs look for user-defined tokens in the text as it is."""
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model(user_defined_symbols=["\u2581\u2581", "<tool>"], add_dummy_prefix=False)
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    got = vocabulary_metadata(tokenizer, ROWS)
    user_defined = {
        text
        for text, kind in zip(key(got, "tokens"), key(got, "token_type"), strict=True)
        if kind == 4
    }
    assert user_defined == {"  ", "<tool>"}
    assert key(got, "bos_token_id") == 1 and key(got, "add_space_prefix") is False
    again = tokenizer_of(got)
    for text in ("a  b", "    a<tool> b", " a"):
        assert again.encode(text) == tokenizer.encode(text)


def test_added_tokens_keep_their_kind(tmp_path: Path) -> None:
    decoder = {
        "341": {"content": "<tool>", "special": False},
        "342": {"content": "<end>", "special": True},
    }
    tokenizer = sentencepiece_folder(tmp_path / "t", added_tokens_decoder=decoder)
    got = vocabulary_metadata(tokenizer, ROWS)
    assert key(got, "tokens")[341:343] == ["<tool>", "<end>"]
    assert key(got, "token_type")[341:343] == [4, 3]
    again = tokenizer_of(got)
    assert again.id_of("<tool>") == 341 and again.id_of("<end>") == 342


def test_tokens_without_a_row_are_left_out() -> None:
    tokenizer = tokenizer_of(byte_level_metadata())
    fast = FastTokenizer.from_str(json.dumps(tokenizer.source()))
    size = fast.get_vocab_size()
    fast.add_special_tokens([AddedToken("<image>")])
    more = json_of(fast, eos_token="</s>", image_token="<image>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = vocabulary_metadata(more, size)
    assert len(key(got, "tokens")) == size and "<image>" not in key(got, "tokens")


# -- names of splits -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_split_that_is_read_is_written_under_a_name_of_the_same_split(name: str) -> None:
    tokenizer = tokenizer_of(byte_level_metadata(pre=name))
    got = vocabulary_metadata(tokenizer, ROWS)
    assert PRE_TOKENIZERS[key(got, "pre")] == PRE_TOKENIZERS[name]
    for text in TEXTS:
        assert tokenizer_of(got).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_common_splits_keep_their_name(name: str) -> None:
    assert (
        key(vocabulary_metadata(tokenizer_of(byte_level_metadata(pre=name)), ROWS), "pre") == name
    )


def test_an_unknown_split_is_refused_with_the_known_names() -> None:
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(UnsupportedConfig, match=r"Punctuation.*known are .*llama-bpe"):
        vocabulary_metadata(byte_level(pre), ROWS)


@pytest.mark.parametrize(
    "tokenizer, says",
    [
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()), "NFKC"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), None, True), "ignore_merges"),
    ],
    ids=["prefix space", "normalizer", "ignore merges"],
)
def test_a_known_split_with_something_beside_it_is_refused(tokenizer: Tokenizer, says: str) -> None:
    with pytest.raises(UnsupportedConfig, match=says):
        vocabulary_metadata(tokenizer, ROWS)


def test_other_kinds_of_vocabulary_are_refused_by_name() -> None:
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedConfig, match="WordPiece"):
        vocabulary_metadata(json_of(fast), 2)


def test_a_tokenizer_that_would_give_other_ids_is_refused() -> None:
    """Merges that are not those of the scores: every second one is missing."""
    source = tokenizer_of(sentencepiece_metadata(sentencepiece_model())).source()
    assert isinstance(source, dict)
    source["model"]["merges"] = source["model"]["merges"][::2]
    tokenizer = json_of(FastTokenizer.from_str(json.dumps(source)), eos_token="</s>")
    with pytest.raises(UnsupportedConfig, match="would become"):
        vocabulary_metadata(tokenizer, ROWS)


def test_other_ids_after_a_special_token_are_warned_of(tmp_path: Path) -> None:
    tokenizer = sentencepiece_folder(tmp_path / "t", legacy=False)
    with pytest.warns(UserWarning, match="the text after <s> otherwise"):
        vocabulary_metadata(tokenizer, ROWS)


# -- special tokens and templates ------------------------------------------------------------------


def test_ends_of_answers_and_templates(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "t", chat_template="T", pad_token="<pad>")
    ids = Tokenizer.from_folder(folder)
    end = ids.id_of("<|end|>")
    settings = {"eos_token_id": [ids.eos_id, end]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    got = vocabulary_metadata(Tokenizer.from_folder(folder), ROWS)
    assert key(got, "eos_token_id") == 1 and key(got, "eot_token_id") == end
    assert key(got, "eom_token_id") is None and key(got, "padding_token_id") == 2
    assert key(got, "add_bos_token") is True and key(got, "add_eos_token") is False
    assert got["tokenizer.chat_template"] == "T"


def test_llama_31s_end_of_message_has_a_key_of_its_own(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "t")
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens([AddedToken("<|eom_id|>"), AddedToken("<|eot_id|>")])
    fast.save(str(folder / "tokenizer.json"))
    eom, eot = fast.token_to_id("<|eom_id|>"), fast.token_to_id("<|eot_id|>")
    settings = {"eos_token_id": [1, eom, eot]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(folder)
    got = vocabulary_metadata(tokenizer, ROWS)
    assert (key(got, "eos_token_id"), key(got, "eot_token_id")) == (1, eot)
    assert key(got, "eom_token_id") == eom
    assert set(tokenizer_of(got).stop_ids) == {1, eom, eot}


def test_more_ends_than_keys_are_warned_of(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "t")
    settings = {"eos_token_id": [1, 5, 6, 7]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"\[7\] are left out"):
        vocabulary_metadata(Tokenizer.from_folder(folder), ROWS)


# -- real vocabularies -----------------------------------------------------------------------------

# Names of the same split, as programs know them.
SAME_SPLIT = {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm"}


@pytest.mark.parametrize(
    "name",
    "llama-spm llama-bpe qwen2 gpt-2 starcoder refact command-r deepseek-coder".split(),
)
def test_llama_cpps_own_metadata_come_back(name: str) -> None:
    path, texts, expected_ids = llama_cpp_vocabulary(name)
    original = read_header(path).metadata
    tokenizer = tokenizer_of(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = vocabulary_metadata(tokenizer, len(key(original, "tokens")))
    for part in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert key(got, part) == key(original, part), part
    pre = key(original, "pre")
    assert key(got, "pre") == SAME_SPLIT.get(pre, pre)
    if key(original, "model") == "llama":
        pairs = zip(
            key(original, "scores"), key(got, "scores"), key(got, "token_type"), strict=True
        )
        unmerged = min(key(got, "scores"))  # single characters, whose score is never asked for
        ranked = sorted((t, o) for t, o, kind in pairs if kind == 1 and o > unmerged)
        assert [ours for _, ours in ranked] == sorted(ours for _, ours in ranked)
    again = tokenizer_of(got)
    for text, ids in zip(texts, expected_ids, strict=True):
        assert again.encode(text, add_special_tokens=False) == ids, text


def test_smollm2s_own_metadata_come_back() -> None:
    original = read_header(smollm2()).metadata
    got = vocabulary_metadata(tokenizer_of(original), len(key(original, "tokens")))
    for name in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"):
        assert key(got, name) == key(original, name), name
    assert got["tokenizer.chat_template"] == original["tokenizer.chat_template"]
