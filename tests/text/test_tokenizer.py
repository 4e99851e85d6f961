"""Ids and text agree with transformers and sentencepiece; files come out as they went in."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from sloth.errors import TokenizerMissing, UnsupportedConfig
from sloth.text.tokenizer import Tokenizer
from tests.oracles import hf_tokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces and\ttabs\n\n\nlines  ",
    "gr\u00fc\u00dfe \u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
    "I'm 12345, aren't YOU? ($1.50)",
    "<s>turn one</s> turn two<|user|>x<|end|>\n",
    "<s><s></s>",
    "a <|user|>  b",
]
CORPUS = ["hello world, the turn of the user in two lines", "I'm one and you aren't 12"] * 20


def byte_level_folder(folder: Path, **config: Any) -> Path:
    """A byte-level BPE with a bos by post-processor, added tokens, and truncation left on."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_special_tokens([AddedToken("<|user|>"), AddedToken("<|end|>")])
    bos = [("<s>", fast.token_to_id("<s>"))]
    fast.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=bos),
        ]
    )
    fast.enable_truncation(8)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


def sentencepiece_model(**settings: Any) -> bytes:
    """A small Llama-like model: BPE with byte fallback, nothing normalised."""
    stream = io.BytesIO()
    options = dict(
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=stream, **(options | settings)
    )
    return stream.getvalue()


@pytest.fixture(scope="module")
def spm() -> bytes:
    return sentencepiece_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("byte_level") / "base")


CONFIGS: dict[str, dict[str, Any]] = {
    "post_processor": {},
    "explicit bos": {"add_bos_token": True, "add_eos_token": True},
    "explicit none": {"add_bos_token": False},
    "pad": {"pad_token": "<pad>", "unk_token": "<|end|>"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "t", **CONFIGS[name])
    ours, theirs = Tokenizer.from_folder(folder), hf_tokenizer(folder)
    for text in [*TEXTS, " ".join(TEXTS) * 3]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), (text, special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_id == theirs.pad_token_id and ours.vocab_size == len(theirs)


def test_truncation_of_the_file_is_not_ours(folder: Path) -> None:
    """tokenizer.json keeps the settings of whoever saved it last."""
    assert len(Tokenizer.from_folder(folder).encode("hello world " * 50)) > 50


def assert_offsets_cover(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(offsets)
    at = 0
    for start, end in offsets:
        assert start <= at <= end and start < end <= len(text), (text, offsets)
        at = end
    assert at == len(text)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_every_character(folder: Path, spm: bytes, text: str) -> None:
    assert_offsets_cover(Tokenizer.from_folder(folder), text)
    for legacy in (True, False):
        config = json.dumps({"legacy": legacy})
        files = {"tokenizer.model": spm, "tokenizer_config.json": config}
        assert_offsets_cover(Tokenizer.from_files(files), text)


def test_offsets_with_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids, offsets = tokenizer.encode_with_offsets("hello", add_special_tokens=True)
    assert ids == tokenizer.encode("hello") and ids[0] == tokenizer.bos_id
    assert offsets[0] == (0, 0) and offsets[-1][1] == 5 and len(ids) == len(offsets)


def test_text_of_a_prefix_is_a_prefix_of_the_text(folder: Path, spm: bytes) -> None:
    """What streaming relies on: only U+FFFD at the end may still change."""
    for tokenizer in (
        Tokenizer.from_folder(folder),
        Tokenizer.from_files({"tokenizer.model": spm}),
    ):
        for text in TEXTS:
            ids = tokenizer.encode(text)
            whole = tokenizer.decode(ids)
            for count in range(len(ids) + 1):
                assert whole.startswith(tokenizer.decode(ids[:count]).rstrip("\ufffd"))


# -- tokenizer.model -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_ids_and_text_equal_the_librarys(model_type: str) -> None:
    model = sentencepiece_model(model_type=model_type, vocab_size=320)
    ours = Tokenizer.from_files({"tokenizer.model": model})
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        if "<" not in text:
            ids = theirs.encode(text)
            assert ours.encode(text, add_special_tokens=False) == ids
            assert ours.encode(text) == [theirs.bos_id(), *ids]
            assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.vocab_size == theirs.get_piece_size()


def test_sentencepiece_finds_control_and_added_tokens(spm: bytes) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=spm)
    size = library.get_piece_size()
    files = {
        "tokenizer.model": spm,
        "tokenizer_config.json": json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "<|end|>",
                "add_bos_token": False,
                "added_tokens_decoder": {
                    str(size): {"content": "<|user|>", "special": True},
                    str(size + 1): {"content": "<|end|>", "special": True, "rstrip": True},
                },
            }
        ),
        "added_tokens.json": json.dumps({"<plain>": size + 2}),
    }
    tokenizer = Tokenizer.from_files(files)
    text = "<s><|user|>hello<|end|>\n\nworld<plain></s>"
    ids = tokenizer.encode(text)
    hello, world = library.encode("hello"), library.encode("world")
    assert ids == [1, size, *hello, size + 1, *world, size + 2, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, size + 1, size + 3)
    assert tokenizer.decode(ids) == "hello world<plain>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("\n", "")
    assert tokenizer.decode([*hello, 99999]) == "hello"


def test_dummy_space_comes_once_unless_legacy(spm: bytes) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=spm)
    for legacy, text in ((True, "<s>hello</s>hello"), (False, "hello</s>hello")):
        config = json.dumps({"legacy": legacy, "add_bos_token": False})
        files = {"tokenizer.model": spm, "tokenizer_config.json": config}
        tokenizer = Tokenizer.from_files(files)
        pieces = [library.id_to_piece(index) for index in tokenizer.encode(text)]
        assert "".join(pieces).count("\u2581") == (2 if legacy else 1)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


# -- files -----------------------------------------------------------------------------------------


def test_stop_ids_are_the_generation_configs_and_eos(folder: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    plain = Tokenizer.from_files(files)
    assert plain.stop_ids == (plain.eos_id,) and plain.pad_id is None
    files["generation_config.json"] = json.dumps({"eos_token_id": [7, 9], "pad_token_id": 5})
    several = Tokenizer.from_files(files)
    assert several.stop_ids == (7, 9, several.eos_id) and several.pad_id == 5
    files["generation_config.json"] = json.dumps({"eos_token_id": several.eos_id})
    assert Tokenizer.from_files(files).stop_ids == (several.eos_id,)


def test_stop_ids_are_the_models_without_a_generation_config(folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    for config in (dict(eos_token_id=[7, 9]), dict(text_config=dict(eos_token_id=[7, 9]))):
        (base / "config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_folder(base)
        assert tokenizer.stop_ids == (7, 9, tokenizer.eos_id)
        tokenizer.save(tmp_path / "saved")  # where no config.json goes along
        assert Tokenizer.from_folder(tmp_path / "saved").stop_ids == tokenizer.stop_ids
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.from_folder(base).stop_ids == (7, tokenizer.eos_id)


def test_special_tokens_come_from_either_file(folder: Path) -> None:
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    bare = Tokenizer.from_files(files)
    assert bare.eos_id is None and bare.stop_ids == () and bare.special_tokens == {}
    tokens = {"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|user|>"]}
    files["special_tokens_map.json"] = json.dumps(tokens).encode()
    assert Tokenizer.from_files(files).special_tokens == {"eos_token": "</s>"}
    files["tokenizer_config.json"] = json.dumps({"eos_token": "<|end|>"}).encode()
    assert Tokenizer.from_files(files).special_tokens == {"eos_token": "<|end|>"}


MORE = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize(
    "config, extra, plain, with_tools",
    [
        (None, {}, None, None),
        ("A", {}, "A", "A"),
        ("A", {"chat_template.jinja": "B"}, "B", "B"),
        ("A", {MORE: "T"}, "A", "T"),
        (
            [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
            {},
            "D",
            "T",
        ),
        ([{"name": "only", "template": "O"}], {}, "O", "O"),
    ],
)
def test_where_chat_templates_come_from(
    folder: Path, tmp_path: Path, config: Any, extra: dict[str, str], plain: Any, with_tools: Any
) -> None:
    copy = byte_level_folder(tmp_path / "t", chat_template=config)
    for name, text in extra.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    chat = Tokenizer.from_folder(copy).chat
    if plain is None:
        assert chat is None
        return
    assert chat is not None and chat.render([]) == plain
    assert chat.render([], tools=[{"name": "t"}]) == with_tools


def test_save_writes_every_file_unchanged(folder: Path, spm: bytes, tmp_path: Path) -> None:
    copy = byte_level_folder(tmp_path / "in")
    (copy / "tokenizer.model").write_bytes(spm)
    (copy / "generation_config.json").write_text('{"eos_token_id":   2}')
    (copy / "chat_template.jinja").write_text("x \n")
    (copy / MORE).parent.mkdir()
    (copy / MORE).write_text("y")
    (copy / "config.json").write_text("{}")
    Tokenizer.from_folder(copy).save(tmp_path / "out")
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    del before[Path("config.json")]
    out = tmp_path / "out"
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerMissing, match="tokenizer.model"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.model", "nothing"),
        ("generation_config.json", "nothing"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: str) -> None:
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()} | {name: content}
    if name == "tokenizer.model":
        del files["tokenizer.json"]
    with pytest.raises(UnsupportedConfig, match=name):
        Tokenizer.from_files(files)
