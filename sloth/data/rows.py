"""What a row of data means: its format is told by its fields, and it becomes a chat, a completion
or a text.

    messages            {"messages": [{"role", "content"}, ...], "tools": [...]}     chat
    sharegpt            {"conversations": [{"from", "value"}, ...], "system": ...}   chat
    alpaca              {"instruction", "input", "output"}       chat; completion without a template
                        with "history" ([[question, answer], ...], the turns before)           chat
    prompt/completion   {"prompt", "completion"}, both texts or both messages    completion, or chat
    preference          {"prompt", "chosen", "rejected"}       two of them; preference.py reads it
    text                {"text"}                                                               text

`columns` says which column holds which field where a file uses other names. A field that is null is
none: files of columns have every field in every row. Nothing is guessed in silence: a row that fits
no format is refused with the columns found and the mapping they suggest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sloth.data.row_fields import (
    Message,
    as_history,
    as_list,
    as_messages,
    as_text,
    as_tools,
    as_turns,
    name_of,
)
from sloth.errors import DataError

# Columns by which others call a field, for the mapping that an error suggests.
ALSO_CALLED = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "dialogs"),
    "prompt": ("question", "query", "instruction", "input", "problem", "context", "q", "source"),
    "completion": ("answer", "response", "output", "solution", "target", "reply", "a", "summary"),
    "text": ("content", "body", "document", "sentence", "markdown", "code"),
}


# Fields that a row may lack beside others of the same file.
OPTIONAL_FIELDS = frozenset(("system", "tools", "input", "history"))


@dataclass(frozen=True)
class Chat:
    """Messages of which assistant turns from first_trained on may be trained."""

    messages: list[Message]
    tools: list[Any] | None = None
    first_trained: int = 0


@dataclass(frozen=True)
class Completion:
    """A text, and the text that should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text to be learned as it is."""

    text: str


Content = Chat | Completion | Text


def kind_of(row: Any, where: str) -> str:
    """The row's format by name. Raises DataError, saying what was expected and found."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {name_of(row)}")
    filled = {field: value for field, value in row.items() if value is not None}
    try:
        return _kind_of(filled, where)
    except DataError:
        if len(filled) == len(row):
            raise
    return _kind_of(row, where)  # whose fields would be right, were they not null


def _kind_of(row: Mapping[str, Any], where: str) -> str:
    if "chosen" in row or "rejected" in row:
        _require(row, ("chosen", "rejected"), where)
        return "preference"
    for field in ("messages", "conversations"):
        if field in row:
            turns = as_list(row[field], f"{where}: {field}")
            first = turns[0] if turns else None
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if "prompt" in row or "completion" in row:
        _require(row, ("prompt", "completion"), where)
        return "prompt/completion"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    found = ", ".join(repr(str(key)) for key in list(row)[:8]) or "no field at all"
    raise DataError(
        f'{where}: expected "messages", "conversations", "prompt" and "completion", "instruction" '
        f'and "output", or "text"; found {found}{_suggestion(row)}'
    )


def read_row(row: Any, where: str, has_template: bool) -> tuple[str, Content]:
    """(format, content) of a row. Raises DataError."""
    kind = kind_of(row, where)
    if kind == "preference":
        raise DataError(
            f"{where}: a preference pair (chosen, rejected) compares two answers, which "
            "objective='dpo' or 'orpo' trains on; to train on the chosen ones alone give "
            f"columns={_chosen(row)}"
        )
    if kind in ("messages", "sharegpt"):
        return kind, _chat(row, kind, where)
    if kind == "text":
        _refuse_fields(row, ("system", "tools"), kind, where)
        return kind, Text(as_text(row["text"], f"{where}: text"))
    if kind == "alpaca":
        return kind, _alpaca(row, where, has_template)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = as_messages(prompt, f"{where}: prompt")
        after = as_messages(completion, f"{where}: completion")
        before = opened_by_system(row, before, where)
        return kind, Chat(before + after, as_tools(row, where), len(before))
    earlier = ("history",) if isinstance(row.get("history"), list) else ()
    _refuse_fields(row, ("tools", *earlier), "prompt/completion of texts", where)
    prompt = as_text(prompt, f"{where}: prompt", "a text, like the completion")
    completion = as_text(completion, f"{where}: completion", "a text, like the prompt")
    return kind, Completion(text_after_system(row, prompt, where), completion)


def opened_by_system(row: Mapping[str, Any], messages: list[Message], where: str) -> list[Message]:
    """The messages after the row's system message, if it has one and they do not."""
    if not row.get("system") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": as_text(row["system"], f"{where}: system")}, *messages]


def text_after_system(row: Mapping[str, Any], text: str, where: str) -> str:
    """The text after the row's system text, if it has one."""
    if not row.get("system"):
        return text
    return f"{as_text(row['system'], f'{where}: system')}\n\n{text}"


def _refuse_fields(row: Mapping[str, Any], fields: tuple[str, ...], kind: str, where: str) -> None:
    """Raise DataError for a field that such a row has no place for."""
    for field in fields:
        if as_tools(row, where) if field == "tools" else row.get(field):
            raise DataError(
                f"{where}: a row of {kind} has no place for {field!r}; give messages, write it "
                "into the text, or name the columns to read in `columns`"
            )


def _chat(row: Mapping[str, Any], kind: str, where: str) -> Chat:
    field = "messages" if row.get("messages") is not None else "conversations"
    place = f"{where}: {field}"
    turns = as_list(row[field], place)
    messages = as_turns(turns, place) if kind == "sharegpt" else as_messages(turns, place)
    return Chat(opened_by_system(row, messages, where), as_tools(row, where))


def _alpaca(row: Mapping[str, Any], where: str, has_template: bool) -> Content:
    """The input follows the instruction; a model without a template sees them as plain text, which
    earlier turns have no place in. Their answers may be trained, like those of any chat.
    """
    prompt = as_text(row["instruction"], f"{where}: instruction")
    output = as_text(row["output"], f"{where}: output")
    if row.get("input"):
        prompt = f"{prompt}\n\n{as_text(row['input'], f'{where}: input')}"
    system = as_text(row.get("system") or "", f"{where}: system")
    earlier = as_history(row, where)
    if not has_template and not earlier:
        return Completion(f"{system}\n\n{prompt}\n\n".lstrip("\n"), output)
    opening = [{"role": "system", "content": system}] if system else []
    last = [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]
    return Chat([*opening, *earlier, *last], first_trained=len(opening) + 1)


def is_empty(content: Content) -> bool:
    """Whether what would be trained is blank."""
    if isinstance(content, Text):
        return not content.text.strip()
    if isinstance(content, Completion):
        return not content.completion.strip()
    answers = [m for m in content.messages[content.first_trained :] if m["role"] == "assistant"]
    return not any(m.get("tool_calls") or (m["content"] or "").strip() for m in answers)


# -- columns -------------------------------------------------------------------------------------


class MissingColumn(DataError):
    """A column that `columns` names and the data lack."""


def map_columns(row: Any, columns: Mapping[str, str], where: str) -> Any:
    """The row under the fields' own names; columns that are not mapped are left out, and optional
    ones that it lacks. Raises DataError, with the columns found.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {name_of(row)}")
    missing = [
        column
        for field, column in columns.items()
        if column not in row and field not in OPTIONAL_FIELDS
    ]
    if missing:
        found = ", ".join(map(repr, row)) or "none"
        raise MissingColumn(
            f"{where}: no column {missing[0]!r}, which columns={dict(columns)} names; the columns "
            f"are {found}{_suggestion(row)}"
        )
    return {field: row[column] for field, column in columns.items() if column in row}


def _suggestion(row: Mapping[str, Any]) -> str:
    """A mapping that would read this row, as the end of a sentence."""
    texts = [str(key) for key, value in row.items() if isinstance(value, str)]
    lists = [str(key) for key, value in row.items() if isinstance(value, list)]
    guess: dict[str, str] = {}
    for field, names in ALSO_CALLED.items():
        candidates = lists if field == "messages" else texts
        by_name = {name.lower(): name for name in candidates if name not in guess.values()}
        found = next((by_name[name] for name in (field, *names) if name in by_name), None)
        if found is not None:
            guess[field] = found
    for fields in (("messages",), ("prompt", "completion"), ("text",)):
        if all(field in guess for field in fields):
            return f"; perhaps columns={json.dumps({field: guess[field] for field in fields})}"
    if len(texts) == 2:
        pair = {"prompt": texts[0], "completion": texts[1]}
        return f"; perhaps columns={json.dumps(pair)}"
    return f"; perhaps columns={json.dumps({'text': texts[0]})}" if len(texts) == 1 else ""


def _chosen(row: Mapping[str, Any]) -> str:
    if isinstance(row["chosen"], list):
        return '{"messages": "chosen"}'
    has_prompt = isinstance(row.get("prompt"), str)
    pair = {"prompt": "prompt", "completion": "chosen"} if has_prompt else {"text": "chosen"}
    return json.dumps(pair)


def _require(row: Mapping[str, Any], fields: tuple[str, str], where: str) -> None:
    for field in fields:
        if field not in row:
            raise DataError(
                f"{where}: field {field!r} is missing beside the other of the pair"
                f"{_suggestion(row)}"
            )
