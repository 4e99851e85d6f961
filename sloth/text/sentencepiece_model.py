"""tokenizer.model, run by sentencepiece, with the tokens that sentencepiece itself does not look
for in a text.

The library never yields a control token for the text "<s>", and knows nothing of tokens added
later; so the text is cut at those first, longest first, and the segments between are encoded each
by itself. Before a segment comes the model's dummy space, either before every one ("legacy" in
tokenizer_config.json: how most Llama 2 models were trained) or only at the very beginning."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence

import sentencepiece
from tokenizers import AddedToken

from sloth.errors import UnsupportedConfig

Offsets = list[tuple[int, int]]

# Protocol buffers merge what is appended: normalizer_spec (3) { add_dummy_prefix (3): false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """A sentencepiece model. added: id -> token beside its own; add_bos, add_eos: the wrapping."""

    def __init__(
        self,
        model: bytes,
        added: dict[int, AddedToken],
        *,
        prefix_every_segment: bool,
        add_bos: bool,
        add_eos: bool,
    ) -> None:
        try:
            self._plain = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise UnsupportedConfig(f"tokenizer.model cannot be read: {error}") from error
        self.added = dict(added)
        self._model = model
        self._prefix_every_segment = prefix_every_segment
        self._num_pieces = self._plain.get_piece_size()
        self._tokens = {
            index: AddedToken(self._plain.id_to_piece(index), special=True, normalized=False)
            for index in range(self._num_pieces)
            if self._plain.is_control(index) or self._plain.is_unknown(index)
        } | added
        self._ids = {token.content: index for index, token in self._tokens.items()}
        self._pattern = re.compile(
            "|".join(
                (r"\s*" if token.lstrip else "")
                + f"({re.escape(token.content)})"
                + (r"\s*" if token.rstrip else "")
                for token in sorted(self._tokens.values(), key=lambda token: -len(token.content))
            )
        )
        self.num_tokens = max([self._num_pieces, *(index + 1 for index in self._tokens)])
        self._before = [self._plain.bos_id()] if add_bos and self._plain.bos_id() >= 0 else []
        self._after = [self._plain.eos_id()] if add_eos and self._plain.eos_id() >= 0 else []

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        for start, end, token in self._segments(text):
            if token is not None:
                ids.append(self._ids[token])
                offsets.append((start, end))
            else:
                bare = start > 0 and not self._prefix_every_segment
                processor = self._bare if bare else self._plain
                serialized = processor.encode(text[start:end], out_type="serialized_proto")
                for index, first, last in _pieces(serialized, text[start:end]):
                    ids.append(index)
                    offsets.append((start + first, start + last))
        return ids, offsets

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        return [self.encode(text) for text in texts]

    def encode_wrapped(self, text: str) -> list[int]:
        return [*self._before, *self.encode(text)[0], *self._after]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        texts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            bare = bool(texts) and not self._prefix_every_segment
            texts.append((self._bare if bare else self._plain).decode(run))
            run.clear()

        for index in ids:
            token = self._tokens.get(index)
            if token is None and 0 <= index < self._num_pieces:
                run.append(index)
            elif token is not None and not (skip_special_tokens and token.special):
                flush()
                texts.append(token.content)
        flush()
        return "".join(texts)

    def id_of(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        index = self._plain.piece_to_id(token)
        return None if index == self._plain.unk_id() else index

    def pieces(self) -> list[tuple[str, float, int]]:
        """(text, score, type) of the library's own pieces, by id.

        Types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Message ModelProto:
        pieces (1) of { piece (1), score (2), type (3) }."""
        found: list[tuple[str, float, int]] = []
        for number, content in _fields(self._model):
            if number == 1 and isinstance(content, bytes):
                piece = dict(_fields(content))
                score = piece.get(2, b"\0\0\0\0")
                assert isinstance(score, bytes)
                text = self._plain.id_to_piece(len(found))
                found.append((text, struct.unpack("<f", score)[0], int(piece.get(3, 1))))
        return found

    def _segments(self, text: str) -> Iterator[tuple[int, int, str | None]]:
        """(start, end, token) of what makes up the text; token is None for text between tokens."""
        at = 0
        for found in self._pattern.finditer(text) if self._tokens else ():
            if found.start() > at:
                yield at, found.start(), None
            yield found.start(), found.end(), found.group(found.lastindex or 0)
            at = found.end()
        if at < len(text):
            yield at, len(text), None


# -- the library's answer with offsets -------------------------------------------------------------


def _pieces(serialized: bytes, text: str) -> Iterator[tuple[int, int, int]]:
    """(id, start, end) in characters, from a serialized SentencePieceText.

    Message: pieces (2) of { id (2), begin (4), end (5) }, offsets in UTF-8 bytes. The library's own
    way to offsets in characters has another name in each of its versions; the serialized form is in
    all of them."""
    starts = [0]  # byte at which each character begins, and the end
    for letter in text:
        starts.append(starts[-1] + len(letter.encode()))
    character = {byte: index for index, byte in enumerate(starts)}
    for number, content in _fields(serialized):
        if number == 2 and isinstance(content, bytes):
            piece = dict(_fields(content))
            first, last = character[int(piece.get(4, 0))], character[int(piece.get(5, 0))]
            # All but the last byte of a character that is spelled in bytes come with no extent.
            yield int(piece.get(2, 0)), first, min(max(last, first + 1), len(text))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer; 32-bit values come as their bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            length = 4 if tag & 7 == 5 else varint()
            yield tag >> 3, message[at : at + length]
            at += length
