"""Rows -> tokens and labels: what the model reads, and which of its tokens it is trained on.

    chat         assistant turns, with the token that ends each turn; or the last turn alone
    completion   the completion, then end-of-text
    text         everything, then end-of-text
    preference   two examples, chosen and rejected, each a chat or a completion: the answers

A chat is rendered once (masks.py), encoded once without added special tokens, as the template
writes its own, and masked by token offsets. Labels are set by position, never by token id, so a
padding id that equals end-of-text stays trained where it ends a turn. A text or prompt gets what
the tokenizer puts before one, unless it begins with it already: exactly one beginning-of-text.

Rendering is Python, encoding is not: rows go through in chunks, and while the tokenizer works on
one chunk in a thread, the next one is rendered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sloth.constants import IGNORE_INDEX
from sloth.data.examples import Example
from sloth.data.masks import Conversation, MaskDisagreement, Rendering, Span, TemplateShapes
from sloth.data.preference import PREFERENCE, read_pair
from sloth.data.row_fields import KNOWN_ROLES
from sloth.data.rows import (
    OPTIONAL_FIELDS,
    Chat,
    Completion,
    Content,
    MissingColumn,
    Text,
    is_empty,
    map_columns,
    read_row,
)
from sloth.data.settings import TrainOn
from sloth.data.sources import Malformed, Placed
from sloth.data.tool_calls import are_written, require_calls_written
from sloth.errors import DataError, TokenizerMissing

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

Encoding = tuple[list[int], list[tuple[int, int]]]

CHUNK_ROWS = 256


@dataclass(frozen=True)
class Encoded:
    """What one row became; a pair, the chosen example and the rejected one.

    turns: trained assistant turns; unstopped: of those, the ones whose last trained token would not
    end an answer; unwritten: the ones whose words the template does not write in full. lacks_bos:
    the template leaves out what the tokenizer puts before a text. has_same_answers: of a pair whose
    two examples are equal. unknown_roles: of its messages, those that no template is known for.
    lacks_tools: the template does not name the row's tools.
    """

    where: str
    kind: str
    examples: list[Example]
    is_empty: bool
    turns: int = 0
    unstopped: int = 0
    has_double_bos: bool = False
    lacks_bos: bool = False
    has_same_answers: bool = False
    unwritten: int = 0
    unknown_roles: tuple[str, ...] = ()
    lacks_tools: bool = False


@dataclass(frozen=True)
class _Prepared:
    """A row with the texts that it needs encoded; spans: of each text, for a chat; unwritten: as of
    `Encoded`.
    """

    where: str
    kind: str
    content: Content
    texts: list[str]
    spans: list[tuple[Span, ...]]
    unwritten: int = 0


class RowEncoder:
    """Encodes rows for one tokenizer. train_on: "assistant" (every assistant turn; a completion),
    "last" (the last assistant turn alone; a completion) or "everything". by_prefixes: render every
    chat up to each of its turns, trusting no learned frame. on_malformed: told of a row that cannot
    be read, which is then left out; None raises. pairs: rows are preference pairs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        train_on: TrainOn = "assistant",
        columns: dict[str, str] | None = None,
        by_prefixes: bool = False,
        on_malformed: Callable[[DataError], None] | None = None,
        pairs: bool = False,
    ) -> None:
        self._on_malformed, self.pairs = on_malformed, pairs
        self.tokenizer, self.train_on, self.columns = tokenizer, train_on, columns
        self.shapes = TemplateShapes(is_trusting=not by_prefixes)
        self._before, self._stops = _written_before(tokenizer), frozenset(tokenizer.stop_ids)
        self._markers: dict[int, bool] = {}
        self._unseen_fields = set(columns or ()) & OPTIONAL_FIELDS

    def encode(self, rows: Iterable[Placed]) -> Iterator[Encoded]:
        """What each row became, in order. Raises DataError, TokenizerMissing."""
        encoded = self._encoded(rows)
        return _in_pairs(encoded) if self.pairs else encoded

    def _encoded(self, rows: Iterable[Placed]) -> Iterator[Encoded]:
        """What each text became: two of a pair, one after the other."""
        prepared_rows = self._prepared(rows)
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[list[_Prepared], Future[list[Encoding]]] | None = None
            while chunk := list(islice(prepared_rows, CHUNK_ROWS)):
                texts = [text for prepared in chunk for text in prepared.texts]
                encodings = pool.submit(self.tokenizer.encode_batch, texts)
                if waiting is not None:
                    yield from self._finish(*waiting)
                waiting = chunk, encodings
            if waiting is not None:
                yield from self._finish(*waiting)

    def _prepared(self, rows: Iterable[Placed]) -> Iterator[_Prepared]:
        """The rows that can be read; the others are raised, or told of."""
        for where, row in rows:
            try:
                prepared = self._prepare(where, row)
                for text in (text for one in prepared for text in one.texts):
                    _require_unicode(text, where)
            except MaskDisagreement:  # of the template, not of the row
                raise
            except DataError as error:
                if self._on_malformed is None:
                    raise
                self._on_malformed(error)
            else:
                yield from prepared
        if self._unseen_fields and self.columns:
            column = self.columns[min(self._unseen_fields)]
            raise MissingColumn(
                f"no row has the column {column!r}, which columns={self.columns} names"
            )

    def _prepare(self, where: str, row: Any) -> list[_Prepared]:
        if isinstance(row, Malformed):
            raise row.error
        if self.columns is not None:
            row = map_columns(row, self.columns, where)
            self._unseen_fields -= row.keys()
        if self.pairs:
            pair = [self._of(one, PREFERENCE, where) for one in read_pair(row, where)]
            if any(len(one.spans) > 1 for one in pair):
                raise DataError(
                    f"{where}: the chat template writes earlier turns in another way once later "
                    "ones follow, so an answer of several turns has no one rendering; give an "
                    "answer of one turn"
                )
            return pair
        kind, content = read_row(row, where, self.tokenizer.chat is not None)
        return [self._of(content, kind, where)]

    def _of(self, content: Content, kind: str, where: str) -> _Prepared:
        if isinstance(content, Text):
            return _Prepared(where, kind, content, [content.text], [])
        if isinstance(content, Completion):
            whole = content.prompt + content.completion
            return _Prepared(where, kind, content, [content.prompt, whole], [])
        renderings, unwritten = self._renderings(content, where)
        last_one = renderings[-1]
        require_calls_written(content.messages[: last_one.count], last_one.text, where)
        texts, spans = [one.text for one in renderings], [one.spans for one in renderings]
        return _Prepared(where, kind, content, texts, spans, unwritten)

    def _renderings(self, content: Chat, where: str) -> tuple[list[Rendering], int]:
        """The texts with their trained spans, and how many of these lack words of the row."""
        chat = self.tokenizer.chat
        if chat is None:
            raise TokenizerMissing(
                f"{where} holds chat messages, but the model has no chat template; train its chat "
                "model, or give rows of prompt and completion"
            )
        talk = Conversation(chat, content.messages, content.tools, where)
        if self.train_on == "everything":
            text = talk.render(len(talk.messages))
            return [Rendering(text, ((0, len(text)),), len(talk.messages))], 0
        trained = [
            index
            for index, message in enumerate(content.messages)
            if message["role"] == "assistant"
            and index >= content.first_trained
            and message.get("weight") != 0
        ]
        if self.train_on == "last":
            trained = trained[-1:]
        found = self.shapes.renderings(talk, tuple(trained))
        written = [(one.text, span) for one in found for span in one.spans]
        lost = (
            not _is_written(content.messages[index]["content"], text, span)
            for index, (text, span) in zip(trained, written, strict=True)
        )
        return found, sum(lost)

    def _finish(
        self, rows: list[_Prepared], encodings: Future[list[Encoding]]
    ) -> Iterator[Encoded]:
        left = iter(encodings.result())
        for row in rows:
            own = list(islice(left, len(row.texts)))
            if isinstance(row.content, Chat):
                yield self._finish_chat(row, own)
                continue
            if isinstance(row.content, Text):
                example = self._text(own[0][0], row.where)
            else:
                example = self._completion(row.content, own[0][0], own[1][0], row.where)
            double = self._has_double_bos(example.tokens)
            yield Encoded(
                row.where, row.kind, [example], is_empty(row.content), has_double_bos=double
            )

    # -- text --------------------------------------------------------------------------------------

    def _text(self, bare: list[int], where: str) -> Example:
        ids = _ended(self._opened(bare), _eos(self.tokenizer, where))
        return Example(ids, list(ids))

    def _completion(
        self, content: Completion, prompt: list[int], whole: list[int], where: str
    ) -> Example:
        """Encoded together where the prompt keeps its own tokens, as generation will give it; else
        apart.
        """
        eos = _eos(self.tokenizer, where)
        before, ids = self._opened(prompt), self._opened(whole)
        if ids[: len(before)] != before:
            ids = before + self.tokenizer.encode(content.completion, add_special_tokens=False)
        if len(ids) == len(before) or ids[-1] != eos:
            ids = [*ids, eos]
        if self.train_on == "everything":
            return Example(ids, list(ids))
        return Example(ids, [IGNORE_INDEX] * len(before) + ids[len(before) :])

    def _opened(self, bare: list[int]) -> list[int]:
        """With what the tokenizer puts before a text, once."""
        before = self._before
        return bare if before and bare[: len(before)] == before else before + bare

    def _has_double_bos(self, ids: list[int]) -> bool:
        bos = self.tokenizer.bos_id
        return bos is not None and ids[:2] == [bos, bos]

    # -- chat --------------------------------------------------------------------------------------

    def _finish_chat(self, row: _Prepared, encodings: list[Encoding]) -> Encoded:
        examples: list[Example] = []
        turns, unstopped, double = 0, 0, False
        for (ids, offsets), spans, text in zip(encodings, row.spans, row.texts, strict=True):
            labels = [IGNORE_INDEX] * len(ids)
            starts = [start for start, _ in offsets]
            for start, end in spans:
                first = bisect_left(starts, start)
                last = bisect_left(starts, end, first)
                while last > first and offsets[last - 1][1] > end:
                    last -= 1
                if self.train_on != "everything":
                    last = self._turn_end(text, ids, offsets, first, last)
                    turns += 1
                    unstopped += last == first or ids[last - 1] not in self._stops
                labels[first:last] = ids[first:last]
            double |= self._has_double_bos(ids)
            examples.append(Example(ids, labels))
        bos = self.tokenizer.bos_id
        assert isinstance(row.content, Chat)
        roles = (message["role"] for message in row.content.messages)
        lacks = bos in self._before and any(e.tokens[:1] != [bos] for e in examples)
        return Encoded(
            row.where,
            row.kind,
            examples,
            is_empty(row.content),
            turns,
            unstopped,
            double,
            lacks,
            unwritten=row.unwritten,
            unknown_roles=tuple(role for role in roles if role not in KNOWN_ROLES),
            lacks_tools=not are_written(row.content.tools, row.texts[-1]),
        )

    def _turn_end(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], first: int, last: int
    ) -> int:
        """Where a turn's trained tokens end: not with white space after the token that ends it."""
        end = last
        while end > first and text[slice(*offsets[end - 1])].isspace():
            end -= 1
        return end if end > first and self._is_marker(ids[end - 1]) else last

    def _is_marker(self, token: int) -> bool:
        """Whether a token is a special one, without a text of its own."""
        if token not in self._markers:
            self._markers[token] = self.tokenizer.decode([token]) == ""
        return self._markers[token]


def encode_row(
    tokenizer: Tokenizer, row: dict[str, Any], where: str, train_on: TrainOn = "assistant"
) -> list[Example]:
    """One row's examples, one unless the template needs more. Raises DataError,
    TokenizerMissing.
    """
    (encoded,) = RowEncoder(tokenizer, train_on).encode([(where, row)])
    return encoded.examples


def _in_pairs(encoded: Iterator[Encoded]) -> Iterator[Encoded]:
    for chosen, rejected in zip(encoded, encoded, strict=True):
        yield Encoded(
            chosen.where,
            chosen.kind,
            chosen.examples + rejected.examples,
            chosen.is_empty or rejected.is_empty,
            chosen.turns + rejected.turns,
            chosen.unstopped + rejected.unstopped,
            chosen.has_double_bos or rejected.has_double_bos,
            chosen.lacks_bos or rejected.lacks_bos,
            chosen.examples == rejected.examples,
            chosen.unwritten + rejected.unwritten,
            chosen.unknown_roles + rejected.unknown_roles,
            chosen.lacks_tools or rejected.lacks_tools,
        )


def _is_written(content: str | None, text: str, span: Span) -> bool:
    """Whether a turn's words are in its span, or begin in the generation prompt before it; white
    space may differ.
    """
    start, end = span
    near = text[max(0, start - len(content or "")) : end]
    return (
        not content or content.strip() in near or "".join(content.split()) in "".join(near.split())
    )


def _require_unicode(text: str, where: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair ({text[error.start]!r}) in a text; write the "
            "character out, or both halves"
        ) from error


def _written_before(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    bare, whole = tokenizer.encode("a", False), tokenizer.encode("a", True)
    places = range(len(whole) - len(bare) + 1)
    first = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
    return whole[:first]


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _eos(tokenizer: Tokenizer, where: str) -> int:
    if tokenizer.eos_id is None:
        raise DataError(
            f"{where}: the tokenizer names no end-of-text token, so a model trained on this row "
            "could never stop; use a model whose tokenizer_config.json has eos_token"
        )
    return tokenizer.eos_id
