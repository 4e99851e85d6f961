"""A chat as text, and which of its characters are trained: for any template, from its renderings.

Where an assistant turn begins and ends comes from rendering the conversation up to it, as
generation would: it begins where the text that generation is given ends, and ends where the
rendering with it ends. That is exact for any template and costs three renderings a turn
(`Conversation.renderings`).

Most rows need one. What a template writes around the contents depends on the roles alone, as a
rule, so it is learned once for each sequence of roles, from a conversation of marks
(`TemplateShapes`). A row whose rendering is, letter for letter, that frame around its own contents
has its spans by arithmetic. A row that is not is rendered by prefixes, and so are the first rows of
each shape and every 256th after them, to be compared.

A template that writes earlier turns differently once later ones follow (it may drop old reasoning)
has no one rendering; such a row becomes one example per assistant turn, each as the model would
meet it. Some write what was asked differently once it is answered (Mistral's put the system text
into the last message, if that is the user's): there an example is the text that generation is
given, and the answer as the template writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sloth.data.row_fields import Message
from sloth.errors import DataError, SlothError

if TYPE_CHECKING:
    from sloth.text.chat import ChatTemplate

Span = tuple[int, int]

LEARN_AT = 3  # sightings of a shape: learning costs as much as a few rows, and many come once
CHECK_FIRST, CHECK_EACH = 4, 256
MAX_SHAPES = 4096
MAX_BETWEEN = 32  # characters between what is asked and the words of the answer


class MaskDisagreement(DataError):
    """A template whose prefixes do not follow from its whole renderings, found by the sample."""


@dataclass(frozen=True)
class Rendering:
    """The first `count` messages as text; spans: characters [start, end) of trained turns."""

    text: str
    spans: tuple[Span, ...]
    count: int


class Conversation:
    """Renderings of one row up to each of its messages."""

    def __init__(
        self,
        chat: ChatTemplate,
        messages: Sequence[Message],
        tools: list[Any] | None,
        where: str,
    ) -> None:
        self.chat, self.messages, self.tools, self.where = chat, list(messages), tools, where
        self._rendered: dict[tuple[int, bool], str] = {}

    def render(self, count: int, for_generation: bool = False) -> str:
        """The first `count` messages as text."""
        if count == 0:
            return ""
        key = count, for_generation
        if key not in self._rendered:
            try:
                self._rendered[key] = self.chat.render(
                    self.messages[:count], tools=self.tools, add_generation_prompt=for_generation
                )
            except SlothError as error:  # says of itself that it is the template
                silent = any(m.get("content") is None for m in self.messages[:count])
                hint = "; a message is a tool call without words, which it may not know" * silent
                raise DataError(f"{self.where}: {error}{hint}") from error
            except ValueError as error:
                raise DataError(
                    f"{self.where}: the chat template refuses the messages: {error}"
                ) from error
        return self._rendered[key]

    def renderings(self, trained: Sequence[int]) -> list[Rendering]:
        """By prefixes: one rendering, or one per trained turn. trained: indices of messages."""
        turns = [self._turn(index) for index in trained]
        count = len(self.messages)
        whole = self.render(count)
        if all(whole.startswith(turn.text) for turn in turns):
            return [Rendering(whole, tuple(turn.spans[0] for turn in turns), count)]
        return turns

    def _turn(self, index: int) -> Rendering:
        """The messages up to the assistant's `index`, as the model would meet and write them."""
        through, before = self.render(index + 1), self.render(index)
        if through.startswith(before):
            return Rendering(through, ((self._turn_start(index), len(through)),), index + 1)
        given = self.render(index, for_generation=True)
        answer = through[self._answer_start(index, given) :]
        return Rendering(given + answer, ((len(given), len(given + answer)),), index + 1)

    def _turn_start(self, index: int) -> int:
        """Character at which the assistant's message `index` begins.

        That is where the text that generation would be given ends. A generation prompt that writes
        more than the turn keeps (an opened reasoning block) counts as far as they agree. Before a
        first message generation is given nothing; there the turn begins with its words.
        """
        if index == 0:
            return self._words_start(index)
        through, before = self.render(index + 1), self.render(index)
        given = self.render(index, for_generation=True)
        if through.startswith(given):
            return len(given)
        agreed = len(os.path.commonprefix([given, through]))
        content = self.messages[index].get("content")
        found = through.find(content.strip(), len(before)) if isinstance(content, str) else -1
        return max(len(before), min(agreed, found) if found >= 0 else agreed)

    def _words_start(self, index: int) -> int:
        """Character up to which the message is written as one with other words would be."""
        content = self.messages[index].get("content")
        first = content.strip()[:1] if isinstance(content, str) else ""
        other = {"role": self.messages[index]["role"], "content": "Yq" if first == "X" else "Xq"}
        otherwise = Conversation(
            self.chat, [*self.messages[:index], other], self.tools, self.where
        ).render(index + 1)
        return len(os.path.commonprefix([self.render(index + 1), otherwise]))

    def _answer_start(self, index: int, given: str) -> int:
        """Character of the rendering through `index` from which on it is the answer: where what
        comes before ends as `given` does, with all of the message that is answered.
        """
        through, asked = self.render(index + 1), self.messages[index - 1].get("content")
        words, least = self._words_start(index), len(asked.strip()) if asked else 1

        def agreed(at: int) -> int:
            return len(os.path.commonprefix([through[:at][::-1], given[::-1]]))

        # A template may write a space between the two, which belongs to the answer.
        places = range(words, max(0, words - MAX_BETWEEN) - 1, -1)
        start = max(places, key=agreed)
        if agreed(start) < least:
            raise DataError(
                f"{self.where}: the chat template writes messages[:{index}] in another way once "
                f"messages[{index}] follows, so no mask can be given; split the row there"
            )
        return start


@dataclass(frozen=True)
class _Frame:
    """What stands around the contents of the first `count` messages: count + 1 pieces.

    anchors: (piece, characters after its beginning) of each span's start and end.
    """

    pieces: list[str]
    anchors: list[tuple[tuple[int, int], tuple[int, int]]]
    count: int

    def fill(self, contents: Sequence[str]) -> Rendering:
        """The rendering that these contents would have."""
        parts: list[str] = []
        starts, length = [], 0
        for piece, content in zip_longest(self.pieces, contents[: self.count], fillvalue=""):
            starts.append(length)
            length += len(piece) + len(content)
            parts += (piece, content)
        spans = (tuple(starts[i] + after for i, after in anchors) for anchors in self.anchors)
        return Rendering("".join(parts), tuple(spans), self.count)  # type: ignore[arg-type]


@dataclass
class _Shape:
    """The frames of one sequence of roles: one, or one per trained turn. seen: rows that fitted."""

    frames: list[_Frame]
    seen: int = 0

    def renderings(self, talk: Conversation) -> list[Rendering] | None:
        """From one rendering each; None where the template did something else with this row."""
        contents = [str(message["content"]) for message in talk.messages]
        stripped = [content.strip() for content in contents]  # what some templates do
        for written in (contents, stripped) if stripped != contents else (contents,):
            filled = [frame.fill(written) for frame in self.frames]
            if all(talk.render(one.count) == one.text for one in filled):
                return filled
        return None


class TemplateShapes:
    """Renderings with their spans, learning on the way. num_by_prefixes: rows that needed those.

    is_trusting: False renders every row by prefixes.
    """

    def __init__(self, is_trusting: bool = True) -> None:
        self.is_trusting = is_trusting
        self.num_by_prefixes = 0
        self._sightings: dict[Any, int] = {}
        self._shapes: dict[Any, _Shape | None] = {}

    def renderings(self, talk: Conversation, trained: tuple[int, ...]) -> list[Rendering]:
        """As `Conversation.renderings`. Raises MaskDisagreement, DataError."""
        key = _key(talk, trained) if self.is_trusting else None
        shape = self._shape(key, talk, trained) if key is not None else None
        found = shape.renderings(talk) if shape is not None else None
        if shape is None or found is None:
            self.num_by_prefixes += 1
            return talk.renderings(trained)
        shape.seen += 1
        if shape.seen <= CHECK_FIRST or shape.seen % CHECK_EACH == 0:
            exact = talk.renderings(trained)
            if exact != found:
                if shape.seen > CHECK_FIRST:
                    raise MaskDisagreement(
                        f"{talk.where}: the chat template renders this row as others of its roles, "
                        "but its prefixes in another way"
                    )
                self._shapes[key] = None
            return exact
        return found

    def _shape(self, key: Any, talk: Conversation, trained: tuple[int, ...]) -> _Shape | None:
        if key in self._shapes:
            return self._shapes[key]
        if len(self._sightings) >= MAX_SHAPES and key not in self._sightings:
            return None
        self._sightings[key] = self._sightings.get(key, 0) + 1
        if self._sightings[key] < LEARN_AT:
            return None
        self._shapes[key] = _learn(talk, trained)
        return self._shapes[key]


def _key(talk: Conversation, trained: tuple[int, ...]) -> Any:
    """What a frame depends on; None for messages that are more than a role and a text."""
    for message in talk.messages:
        if not isinstance(message["content"], str) or message.keys() - {*_PLAIN}:
            return None
    tools = json.dumps(talk.tools, sort_keys=True) if talk.tools else ""
    return tuple(message["role"] for message in talk.messages), trained, tools


_PLAIN = ("role", "content", "weight")


def _learn(talk: Conversation, trained: Sequence[int]) -> _Shape | None:
    """Render marks in place of contents, and see what is written around them."""
    marks = [f"Zq{index}xW" for index in range(len(talk.messages))]
    marked = [{**m, "content": mark} for m, mark in zip(talk.messages, marks, strict=True)]
    try:
        rendered = Conversation(talk.chat, marked, talk.tools, talk.where).renderings(trained)
        return _Shape([_frame(one, marks[: one.count]) for one in rendered])
    except (DataError, LookupError):
        return None


def _frame(rendering: Rendering, marks: Sequence[str]) -> _Frame:
    """Raises LookupError where a mark is not written exactly once, in order."""
    text, pieces, starts, at = rendering.text, [], [], 0
    for mark in marks:
        found = text.find(mark, at)
        if found < 0 or text.count(mark) != 1:
            raise LookupError(mark)
        pieces.append(text[at:found])
        starts.append(at)
        at = found + len(mark)
    pieces.append(text[at:])
    starts.append(at)

    def anchor(place: int) -> tuple[int, int]:
        for index, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
            if start <= place <= start + len(piece):
                return index, place - start
        raise LookupError(place)

    anchors = [(anchor(start), anchor(end)) for start, end in rendering.spans]
    return _Frame(pieces, anchors, rendering.count)
