"""One row -> tokens and labels: what the model reads, and which of its tokens it is trained on.

    {"messages": [...], "tools": [...]}     assistant turns, with the token that ends each turn
    {"prompt": ..., "completion": ...}      the completion; both texts (then + end-of-text) or both
    messages {"text": ...}                           everything, + end-of-text

A chat is rendered once and masked by token offsets. Where an assistant turn begins and ends comes
from rendering the conversation up to it, as generation would, so the mask holds for any template.
A template that writes earlier turns differently once later ones follow (it may drop old reasoning)
has no one rendering; such a row becomes one example per assistant turn, each as the model would
meet it. Labels sit at their token's own index (the loss shifts them); -100 is not trained. They
are set by position, never by token id, so a padding id that equals end-of-text stays trained where
it ends a turn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sloth.errors import DataError, SlothError, TokenizerMissing

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

UNTRAINED = -100

KINDS = ("messages", "prompt/completion", "text")

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """tokens and labels of equal length."""

    tokens: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """Labels that the loss sees; the first token is never a target."""
        return sum(label != UNTRAINED for label in self.labels[1:])


def kind_of(row: Any, where: str) -> str:
    """Which of KINDS a row is. Raises DataError, saying what was expected."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {_name(row)}")
    if "messages" in row:
        return "messages"
    if "prompt" in row or "completion" in row:
        for field in ("prompt", "completion"):
            if field not in row:
                raise DataError(f"{where}: field {field!r} is missing beside the other of the pair")
        return "prompt/completion"
    if "text" in row:
        return "text"
    found = ", ".join(repr(str(key)) for key in list(row)[:8]) or "no field at all"
    raise DataError(
        f'{where}: expected "messages", "prompt" and "completion", or "text"; found {found}'
    )


def encode_row(tokenizer: Tokenizer, row: dict[str, Any], where: str) -> list[Example]:
    """A row's examples, one unless the template needs more. Raises DataError, TokenizerMissing."""
    kind = kind_of(row, where)
    if kind == "messages":
        messages = _messages(row["messages"], f"{where}: messages")
        return _encode_chat(tokenizer, messages, _tools(row, where), 0, where)
    if kind == "text":
        return [_encode_text(tokenizer, _text(row["text"], f"{where}: text"), where)]
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, f"{where}: prompt")
        after = _messages(completion, f"{where}: completion")
        return _encode_chat(tokenizer, before + after, _tools(row, where), len(before), where)
    prompt = _text(prompt, f"{where}: prompt", "a text, like the completion")
    completion = _text(completion, f"{where}: completion", "a text, like the prompt")
    return [_encode_completion(tokenizer, prompt, completion, where)]


# -- text ----------------------------------------------------------------------------------------


def _encode_text(tokenizer: Tokenizer, text: str, where: str) -> Example:
    ids = _ended(_encode_open(tokenizer, text, where), _eos(tokenizer, where))
    return Example(ids, list(ids))


def _encode_completion(tokenizer: Tokenizer, prompt: str, completion: str, where: str) -> Example:
    """Encoded together where the prompt keeps its own tokens, as generation will give it; else
    apart.
    """
    before = _encode_open(tokenizer, prompt, where)
    ids = _encode_open(tokenizer, prompt + completion, where)
    if ids[: len(before)] != before:
        ids = before + tokenizer.encode(completion, add_special_tokens=False)
    if len(ids) == len(before) or ids[-1] != tokenizer.eos_id:
        ids = [*ids, _eos(tokenizer, where)]
    return Example(ids, [UNTRAINED] * len(before) + ids[len(before) :])


def _encode_open(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    """Ids with the special tokens that begin a text, but no end-of-text that it does not hold."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    eos = _eos(tokenizer, where)
    if ids and ids[-1] == eos:
        bare = tokenizer.encode(text, add_special_tokens=False)
        if not bare or bare[-1] != eos:
            return ids[:-1] if ids != [tokenizer.bos_id] else ids
    return ids


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _eos(tokenizer: Tokenizer, where: str) -> int:
    if tokenizer.eos_id is None:
        raise DataError(
            f"{where}: the tokenizer names no end-of-text token, so a model trained on this row "
            "could never stop; use a model whose tokenizer_config.json has eos_token"
        )
    return tokenizer.eos_id


# -- chat ----------------------------------------------------------------------------------------


class _Conversation:
    """Renderings of one row up to each of its messages."""

    def __init__(
        self, tokenizer: Tokenizer, messages: list[Message], tools: list[Any] | None, where: str
    ) -> None:
        if tokenizer.chat is None:
            raise TokenizerMissing(
                f"{where} holds chat messages, but the model has no chat template; train its chat "
                "model, or give rows of prompt and completion"
            )
        self.tokenizer, self.chat = tokenizer, tokenizer.chat
        self.messages, self.tools, self.where = messages, tools, where

    def render(self, count: int, for_generation: bool = False) -> str:
        """The first `count` messages as text."""
        if count == 0:
            return ""
        try:
            return self.chat.render(
                self.messages[:count], tools=self.tools, add_generation_prompt=for_generation
            )
        except (SlothError, ValueError) as error:
            raise DataError(
                f"{self.where}: the chat template refuses the messages: {error}"
            ) from error

    def turn_start(self, index: int, through: str) -> int:
        """Character at which the assistant's message `index` begins in `through`, its rendering.

        That is where the text that generation would be given ends. A generation prompt that writes
        more than the turn keeps (an opened reasoning block) counts as far as they agree.
        """
        before = self.render(index)
        given = self.render(index, for_generation=True)
        if not through.startswith(before):
            raise DataError(
                f"{self.where}: the chat template writes messages[:{index}] in another way once "
                f"messages[{index}] follows, so no mask can be given; split the row there"
            )
        if through.startswith(given):
            return len(given)
        agreed = len(os.path.commonprefix([given, through]))
        content = self.messages[index].get("content")
        found = through.find(content.strip(), len(before)) if isinstance(content, str) else -1
        return max(len(before), min(agreed, found) if found >= 0 else agreed)

    def example(self, text: str, spans: list[tuple[int, int]]) -> Example:
        """`text` encoded; trained where a token lies whole in one of the character spans."""
        ids, offsets = self.tokenizer.encode_with_offsets(text, add_special_tokens=False)
        labels = [UNTRAINED] * len(ids)
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a >= start and b <= end]
            for i in inside[: self._turn_end(text, ids, offsets, inside)]:
                labels[i] = ids[i]
        return Example(ids, labels)

    def _turn_end(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], inside: list[int]
    ) -> int:
        """How many of a turn's tokens are trained: not the white space after the token that ends
        it.
        """
        end = len(inside)
        while end and text[slice(*offsets[inside[end - 1]])].isspace():
            end -= 1
        is_marker = end > 0 and self.tokenizer.decode([ids[inside[end - 1]]]) == ""
        return end if is_marker else len(inside)


def _encode_chat(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: list[Any] | None,
    first_trained: int,
    where: str,
) -> list[Example]:
    """Examples of a conversation, trained on the assistant's messages from `first_trained` on."""
    conversation = _Conversation(tokenizer, messages, tools, where)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= first_trained:
            through = conversation.render(index + 1)
            turns.append((through, conversation.turn_start(index, through)))
    whole = conversation.render(len(messages))
    if all(whole.startswith(through) for through, _ in turns):
        return [conversation.example(whole, [(start, len(text)) for text, start in turns])]
    return [conversation.example(text, [(start, len(text))]) for text, start in turns]


# -- fields --------------------------------------------------------------------------------------


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a non-empty list of messages, got {_name(value)}")
    for index, message in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise DataError(
                f"{place}: expected an object with role and content, got {_name(message)}"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise DataError(f"{place}.role: expected system, user, assistant or tool, got {role!r}")
        content = message.get("content")
        may_lack = content is None and bool(message.get("tool_calls"))
        if not isinstance(content, str) and not may_lack:
            raise DataError(f"{place}.content: expected a text, got {_name(content)}")
    return value


def _tools(row: dict[str, Any], where: str) -> list[Any] | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools: expected a list, got {_name(tools)}")
    return tools


def _text(value: Any, where: str, expected: str = "a text") -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {expected}, got {_name(value)}")
    return value


def _name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        type(None): "null",
    }
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), f"a {type(value).__name__}")
