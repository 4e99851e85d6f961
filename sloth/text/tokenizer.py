"""Text to token ids and back, from the tokenizer files of a Hugging Face folder.

tokenizer.json is run by `tokenizers`; without it tekken.json is brought into its form, and
tokenizer.model is run by `sentencepiece`, with the added and control tokens found in the text
first. tokenizer_config.json, special_tokens_map.json and generation_config.json name the special
tokens and where generation stops; the chat template is chat_template.jinja, or stands in
tokenizer_config.json as a text or a list of named ones. Every file read is kept and written again
by `save`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from sloth.errors import TokenizerMissing, UnsupportedConfig
from sloth.text.added import with_added_tokens
from sloth.text.chat import ChatTemplate
from sloth.text.sentencepiece_model import SentencePieceTokenizer
from sloth.text.tekken import SPECIAL_TOKENS, tokenizer_json_of_tekken

GENERATION = "generation_config.json"
_VOCABULARIES = ("tokenizer.json", "tekken.json", "tokenizer.model")
FILE_NAMES = (
    "tokenizer.json",
    "tekken.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_MORE_TEMPLATES = "additional_chat_templates"

Offsets = list[tuple[int, int]]


class _Backend(Protocol):
    """What runs the vocabulary. Special tokens inside a text are always found."""

    num_tokens: int

    def encode(self, text: str) -> tuple[list[int], Offsets]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]: ...

    def encode_wrapped(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def id_of(self, token: str) -> int | None: ...


class Tokenizer:
    """The tokenizer of one model.

    bos_id, eos_id, pad_id: None where the model has none. stop_ids: all that end an answer.
    special_tokens: name -> text, such as "bos_token" -> "<s>". chat: None without a template.
    vocab_size: number of tokens, added ones included; the model's embedding may have more rows.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)
        config = self._json("tokenizer_config.json")
        generation = self._json(GENERATION)
        vocabulary = next(name for name in _VOCABULARIES if name in self._files)
        given = SPECIAL_TOKENS if vocabulary == "tekken.json" else {}
        self.special_tokens = given | _special_tokens(config, self._json("special_tokens_map.json"))
        self._backend = self._build(vocabulary, config)
        self.vocab_size = self._backend.num_tokens
        self.bos_id = self._special_id("bos", generation)
        self.eos_id = self._special_id("eos", generation)
        self.pad_id = self._special_id("pad", generation)
        stops = [*_ids(generation.get("eos_token_id")), self.eos_id]
        self.stop_ids = tuple(dict.fromkeys(index for index in stops if index is not None))
        self.chat = self._chat_template(config)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a folder. Raises TokenizerMissing if no file in it holds a vocabulary.

        Without generation_config.json the ends that config.json names count, as in transformers.
        """
        folder = Path(path)
        found = {name: folder / name for name in FILE_NAMES if (folder / name).is_file()}
        for file in sorted((folder / _MORE_TEMPLATES).glob("*.jinja")):
            found[f"{_MORE_TEMPLATES}/{file.name}"] = file
        contents = {name: file.read_bytes() for name, file in found.items()}
        tokenizer = cls._checked(contents, str(folder))
        if GENERATION not in found:
            tokenizer._end_at(_ends_of_model(folder / "config.json"))
        return tokenizer

    @classmethod
    def from_files(cls, files: Mapping[str, str | bytes]) -> Tokenizer:
        """From file names and contents, such as `GGUFFile.tokenizer_files()` gives them."""
        contents = {
            name: content.encode() if isinstance(content, str) else content
            for name, content in files.items()
        }
        return cls._checked(contents, "the model")

    @classmethod
    def _checked(cls, files: dict[str, bytes], where: str) -> Tokenizer:
        if not any(name in files for name in _VOCABULARIES):
            raise TokenizerMissing(
                f"{where} has none of {', '.join(_VOCABULARIES)}; copy the base model's"
            )
        try:
            return cls(files)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # From strangers: what is of another type than it should be shows where it is used.
            raise UnsupportedConfig(
                f"the tokenizer files of {where} cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _end_at(self, ids: list[int]) -> None:
        """Let these ids end an answer, too, and say so in a file that goes along."""
        if not set(ids) <= set(self.stop_ids):
            self._files[GENERATION] = json.dumps({"eos_token_id": ids}).encode()
            self.stop_ids = tuple(dict.fromkeys([*ids, *self.stop_ids]))

    # -- text and ids ------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; add_special_tokens puts around it what the model expects.

        With tokenizer.json its post-processor says what that is, whatever add_bos_token in
        tokenizer_config.json says, as in transformers. Special tokens written in the text, as a
        chat template does, are found either way.
        """
        if add_special_tokens:
            return self._backend.encode_wrapped(text)
        return self._backend.encode(text)[0]

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[list[int], Offsets]:
        """Ids and, for each, the characters [start, end) it came from.

        Tokens that are parts of one character each have the whole character. Added special tokens
        are (0, 0) before the text, (len, len) after it."""
        ids, offsets = self._backend.encode(text)
        if add_special_tokens:
            whole = self.encode(text)
            first = next((i for i in range(len(whole)) if whole[i : i + len(ids)] == ids), 0)
            after = len(whole) - first - len(ids)
            return whole, [(0, 0)] * first + offsets + [(len(text), len(text))] * after
        return ids, offsets

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        """`encode_with_offsets` of many texts; other Python threads run meanwhile."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that no token has are left out.

        The text of a prefix is a prefix of the text, but for U+FFFD at its end, in place of a
        character whose tokens have not all come: enough to stream an answer."""
        return self._backend.decode(list(ids), skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        """Id of a token's text, None where the vocabulary has no such token."""
        return self._backend.id_of(token)

    def source(self) -> dict[str, Any] | SentencePieceTokenizer:
        """What runs the vocabulary: a tokenizer.json that holds every added token, or
        sentencepiece."""
        if isinstance(self._backend, _JsonTokenizer):
            return self._backend.content()
        assert isinstance(self._backend, SentencePieceTokenizer)
        return self._backend

    def with_tokens(self, tokens: Sequence[str], special: bool = False) -> Tokenizer:
        """A tokenizer that has these new tokens as well; see `Model.add_tokens`."""
        source = self.source()
        vocabulary = source if isinstance(source, dict) else None
        return Tokenizer(
            with_added_tokens(self._files, vocabulary, self.vocab_size, tokens, special)
        )

    def fingerprint(self) -> str:
        """sha256 over every file the tokenizer came from."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write every file the tokenizer came from, unchanged."""
        for name, content in self._files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    # -- from files --------------------------------------------------------------------------------

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            return {}
        try:
            content = json.loads(self._files[name])
        except (ValueError, RecursionError) as error:
            raise UnsupportedConfig(f"{name} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise UnsupportedConfig(f"{name} holds a {type(content).__name__}, expected an object")
        return content

    def _build(self, vocabulary: str, config: dict[str, Any]) -> _Backend:
        added = _added_tokens(config)
        if vocabulary != "tokenizer.model":
            content = self._json(vocabulary)
            if vocabulary == "tekken.json":
                content = tokenizer_json_of_tekken(content)
            return _JsonTokenizer(content, added, list(self.special_tokens.values()))
        for token, index in self._json("added_tokens.json").items():
            added.setdefault(index, AddedToken(token, normalized=False))
        return SentencePieceTokenizer(
            self._files["tokenizer.model"],
            added,
            # Absent in folders written before the flag existed, which behaved as legacy does.
            prefix_every_segment=bool(config.get("legacy", True)),
            add_bos=bool(config.get("add_bos_token", True)),
            add_eos=bool(config.get("add_eos_token", False)),
        )

    def _special_id(self, kind: str, generation: dict[str, Any]) -> int | None:
        token = self.special_tokens.get(f"{kind}_token")
        if token is not None:
            return self._backend.id_of(token)
        return next(iter(_ids(generation.get(f"{kind}_token_id"))), None)

    def _chat_template(self, config: dict[str, Any]) -> ChatTemplate | None:
        named: dict[str, str] = {}
        given = config.get("chat_template")
        if isinstance(given, str):
            named["default"] = given
        elif isinstance(given, list):
            named |= {str(item.get("name")): str(item.get("template")) for item in given}
        for name, content in self._files.items():
            if name.startswith(_MORE_TEMPLATES):
                named[Path(name).stem] = content.decode()
        if "chat_template.jinja" in self._files:
            named["default"] = self._files["chat_template.jinja"].decode()
        default = named.pop("default", None)
        if default is None and len(named) == 1:
            _, default = named.popitem()
        if default is None:
            return None
        return ChatTemplate(default, self.special_tokens, named)


class _JsonTokenizer:
    """tokenizer.json, run by `tokenizers`."""

    def __init__(
        self, content: dict[str, Any], added: dict[int, AddedToken], special: list[str]
    ) -> None:
        content = {**content, "truncation": None, "padding": None}
        _keep_whole_offsets(content.get("post_processor"))
        try:
            self._fast = FastTokenizer.from_str(json.dumps(content, ensure_ascii=False))
        except Exception as error:  # what the library raises has no narrower type
            raise UnsupportedConfig(f"tokenizer.json cannot be read: {error}") from error
        for index, token in sorted(added.items()):
            if self._fast.token_to_id(token.content) is None:
                self._fast.add_tokens([token])
                if self._fast.token_to_id(token.content) != index:
                    raise UnsupportedConfig(
                        f"tokenizer_config.json gives {token.content!r} the id {index}, which does "
                        "not follow tokenizer.json's"
                    )
        known = {token.content for token in self._fast.get_added_tokens_decoder().values()}
        self._fast.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token in dict.fromkeys(special)
                if token not in known and self._fast.token_to_id(token) is not None
            ]
        )
        self.num_tokens = self._fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        found = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in found]

    def encode_wrapped(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=True).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def content(self) -> dict[str, Any]:
        return json.loads(self._fast.to_str())


def _keep_whole_offsets(post_processor: Any) -> None:
    """Let offsets hold the space before a word: a token belongs to all characters it stands for."""
    if not isinstance(post_processor, dict):
        return
    if "trim_offsets" in post_processor:
        post_processor["trim_offsets"] = False
    for inner in post_processor.get("processors") or []:
        _keep_whole_offsets(inner)


def _special_tokens(config: dict[str, Any], tokens_map: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; either file may give a text or an object with its content."""
    found: dict[str, str] = {}
    for name, value in (tokens_map | {k: v for k, v in config.items() if v is not None}).items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def _added_tokens(config: dict[str, Any]) -> dict[int, AddedToken]:
    """added_tokens_decoder of tokenizer_config.json: id -> token."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        int(index): AddedToken(
            str(token["content"]), **{flag: bool(token.get(flag, False)) for flag in flags}
        )
        for index, token in (config.get("added_tokens_decoder") or {}).items()
    }


def _ids(value: Any) -> list[int]:
    """Token ids in generation_config.json: one, several or none."""
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _ends_of_model(file: Path) -> list[int]:
    """The eos_token_id of a config.json, if there is one, or of the text model inside."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        text = config.get("text_config") or {}
        found = _ids(config.get("eos_token_id", text.get("eos_token_id")))
    except (OSError, ValueError, AttributeError):  # whoever loads the model says what is wrong
        return []
    return [index for index in found if isinstance(index, int)]
