"""A preference row as two contents, one for each answer: which of them a reader liked better.

    {"prompt": text,     "chosen": text,     "rejected": text}            two completions
    {"prompt": messages, "chosen": messages, "rejected": messages}        two chats; an answer may
                                                                          be a text of the assistant
    {"chosen": messages, "rejected": messages}      whole conversations: what they share is asked
    {"chosen": text,     "rejected": text}          whole texts, likewise, up to a whole word

Messages may be in ShareGPT's spelling. `system` opens a conversation or a text; a prompt that the
answers repeat is asked once. Only what follows the prompt is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from sloth.data.row_fields import (
    Message,
    as_messages,
    as_tools,
    as_turns,
    name_of,
)
from sloth.data.rows import (
    ALSO_CALLED,
    Chat,
    Completion,
    Content,
    kind_of,
    opened_by_system,
    text_after_system,
)
from sloth.errors import DataError

PREFERENCE = "preference"

Side = str | list[Message]


def read_pair(row: Any, where: str) -> tuple[Content, Content]:
    """The chosen and the rejected one. Raises DataError, also for a row that is no pair."""
    kind = kind_of(row, where)
    if kind != PREFERENCE:
        raise DataError(
            f'{where}: expected a preference pair ("prompt", "chosen", "rejected"), got a {kind} '
            "row; objective='sft' trains on such rows"
        )
    prompt = _side(row["prompt"], f"{where}: prompt") if row.get("prompt") else None
    chosen, rejected = (_side(row[name], f"{where}: {name}") for name in ("chosen", "rejected"))
    if isinstance(prompt, list):
        chosen, rejected = _said(chosen), _said(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _chats(row, prompt, chosen, rejected, where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        assert not isinstance(prompt, list)
        return _completions(row, prompt, chosen, rejected, where)
    raise DataError(
        f"{where}: rejected: expected {name_of(chosen)}, like chosen, got {name_of(rejected)}"
    )


def _side(value: Any, where: str) -> Side:
    """A text, or messages in either spelling; files without lists hold these as JSON text."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return value
        try:
            value, text = json.loads(value), value
        except (ValueError, RecursionError):
            return value
        if not all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value):
            return text
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a text or a list of messages, got {name_of(value)}")
    is_sharegpt = bool(value) and isinstance(value[0], Mapping) and "from" in value[0]
    return as_turns(value, where) if is_sharegpt else as_messages(value, where)


def _said(answer: Side) -> list[Message]:
    """An answer to messages, as messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _chats(
    row: Mapping[str, Any],
    prompt: Side | None,
    chosen: list[Message],
    rejected: list[Message],
    where: str,
) -> tuple[Chat, Chat]:
    shared = _num_shared(chosen, rejected)
    asked = prompt
    if isinstance(asked, str):
        # A text beside whole conversations is their question once more.
        asked = None if shared else [{"role": "user", "content": asked}]
    if asked is None:
        if not shared:
            raise _nothing_asked(row, where, "first message")
        asked, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif chosen[: len(asked)] == rejected[: len(asked)] == asked:
        chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
    asked = opened_by_system(row, asked, where)
    tools = as_tools(row, where)
    return Chat(asked + chosen, tools, len(asked)), Chat(asked + rejected, tools, len(asked))


def _num_shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Messages at the beginning of both; the last one of each is always its answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)


def _completions(
    row: Mapping[str, Any], prompt: str | None, chosen: str, rejected: str, where: str
) -> tuple[Completion, Completion]:
    if prompt is None and "prompt" not in row:
        prompt = _shared_text(chosen, rejected)
        if not prompt or _prompt_columns(row):
            raise _nothing_asked(row, where, "word")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    asked = text_after_system(row, prompt or "", where)
    return Completion(asked, chosen), Completion(asked, rejected)


def _shared_text(chosen: str, rejected: str) -> str:
    """The beginning of both, up to a whole word: "is blue" and "is black" share "is", not " bl".

    A single space is left to the answer, as tokenizers write it with the word that follows.
    """
    shared = os.path.commonprefix([chosen, rejected])
    while shared and not shared[-1].isspace():
        shared = shared[:-1]
    return shared[:-1] if shared.endswith(" ") else shared


def _prompt_columns(row: Mapping[str, Any]) -> list[str]:
    """Columns that may well be the prompt under another name."""
    names = {str(key).lower(): str(key) for key, value in row.items() if isinstance(value, str)}
    return [names[name] for name in ALSO_CALLED["prompt"] if name in names]


def _nothing_asked(row: Mapping[str, Any], where: str, what: str) -> DataError:
    found = _prompt_columns(row)
    why = f"chosen and rejected do not begin with the same {what}"
    if found:
        why = f"the column {found[0]!r} may be it"
    columns = {"prompt": found[0] if found else "...", "chosen": "chosen", "rejected": "rejected"}
    return DataError(
        f'{where}: expected "prompt" beside "chosen" and "rejected", and {why}; perhaps '
        f"columns={json.dumps(columns)}"
    )
