"""A row's fields, checked and brought into one form: messages, ShareGPT turns, tools, texts.

CSV and some Parquet files hold lists as JSON text; Parquet fills fields that a message lacks with
null. Both are undone here. OpenAI's spellings become what templates are written for: content in
parts is joined, a call's arguments in JSON text become the object. A message that is marked as not
to be trained (`weight`, `train`) keeps a weight of 0; `train` cannot add one of another role than
assistant to what is trained. Raises DataError with place, field and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sloth.data.json_text import DECODER
from sloth.errors import DataError

Message = dict[str, Any]

# ShareGPT's names, and those of its relatives.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


# What chat templates know; in a row, these in any case. Others come through as they are, counted.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def as_list(value: Any, where: str) -> list[Any]:
    """A list that is not empty, from JSON text where need be."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, where)
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a non-empty list of messages, got {name_of(value)}")
    return value


def as_messages(value: list[Any], where: str) -> list[Message]:
    """OpenAI's messages: role, content and what else they hold."""
    return [
        _message(message, f"{where}[{index}]")
        for index, message in enumerate(as_list(value, where))
    ]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{place}: expected an object with role and content, got {name_of(message)}"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"{place}.role: expected system, user, assistant or tool, got {role!r}")
    plain = role.strip().lower()
    role = plain if plain in KNOWN_ROLES else role
    if isinstance(content, str) and len(message) == 2:
        return {**message, "role": role}
    held = {key: item for key, item in message.items() if item is not None and key != "train"}
    held["role"] = role
    _mark(held, message, place)
    if isinstance(content, list):
        held["content"] = _joined(content, f"{place}.content")
    elif content is None and message.get("tool_calls"):
        held["content"] = None
    elif not isinstance(content, str):
        raise DataError(f"{place}.content: expected a text, got {name_of(content)}")
    if held.get("tool_calls"):
        held["tool_calls"] = [_call(call, f"{place}.tool_calls") for call in held["tool_calls"]]
    return held


def _joined(parts: list[Any], place: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else name_of(part)
            raise DataError(f"{place}: expected parts of type text, got {kind!r}")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, place: str) -> Any:
    """Templates write a call's arguments as JSON, so a JSON text would be written twice over."""
    if not isinstance(call, Mapping):
        raise DataError(f"{place}: expected an object, got {name_of(call)}")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    arguments = _from_json(function["arguments"] or "{}", f"{place}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def as_turns(value: list[Any], where: str) -> list[Message]:
    """ShareGPT's turns as messages."""
    messages = []
    for index, turn in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: expected an object with from and value, got {name_of(turn)}")
        sender = turn.get("from")
        role = _ROLES.get(sender.lower()) if isinstance(sender, str) else None
        if role is None:
            raise DataError(f"{place}.from: expected human, gpt, system or tool, got {sender!r}")
        text = as_text(turn.get("value"), f"{place}.value")
        message: Message = {"role": role, "content": text}
        if isinstance(sender, str) and sender.lower() == "function_call":
            called = _from_json(text, f"{place}.value")
            calls = called if isinstance(called, list) else [called]
            wrapped = [{"type": "function", "function": call} for call in calls]
            message = {"role": role, "content": None, "tool_calls": wrapped}
        _mark(message, turn, place)
        messages.append(message)
    return messages


def _mark(held: Message, given: Mapping[str, Any], place: str) -> None:
    """Set the weight, OpenAI's 0 or 1, from it or from Axolotl's `train`; absent without either.

    A mark that nothing honours would train what the user took out, or leave out what the user
    added. A weight of 1 is what OpenAI's messages have anyway: of another role it asks for nothing.
    """
    weight, train = given.get("weight"), given.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(
            f"{place}.weight: expected 1 (trained) or 0 (read, not trained), got {weight!r:.80}; "
            "there are no weights in between"
        )
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{place}.train: expected true or false, got {train!r:.80}")
    if weight is not None and train is not None and bool(weight) != train:
        raise DataError(
            f"{place}: weight {weight!r} and train {json.dumps(train)} disagree; give one of them"
        )
    if train and held["role"] != "assistant":
        raise DataError(
            f"{place}.train: true on a message of role {held['role']!r:.80}; marks choose among "
            "the assistant's messages: leave this one out (train_on='everything' trains all)"
        )
    mark = weight if train is None else train
    if mark is not None:
        held["weight"] = int(mark)


def as_history(row: Mapping[str, Any], where: str) -> list[Message]:
    """Alpaca's earlier turns, pairs of what was asked and answered, as messages; none without."""
    history, place = row.get("history"), f"{where}: history"
    if isinstance(history, str):
        is_list = history.lstrip().startswith("[")
        history = _from_json(history, place) if is_list else history.strip() or None
    messages: list[Message] = []
    for index, pair in enumerate(_history_pairs(history, place)):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": as_text(text, f"{place}[{index}]")})
    return messages


def _history_pairs(history: Any, place: str) -> list[list[Any]]:
    expected = "expected a list of earlier turns, [[question, answer], ...]"
    if history is None:
        return []
    if not isinstance(history, list):
        raise DataError(
            f"{place}: {expected}, got {name_of(history)}; where the column is something else, "
            "name those to read in `columns`"
        )
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            got = f"{len(pair)} items" if isinstance(pair, list) else name_of(pair)
            raise DataError(f"{place}[{index}]: {expected}, got {got}")
    return history


def as_tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The row's tools, None without any."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, f"{where}: tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools: expected a list, got {name_of(tools)}")
    return tools or None


def as_text(value: Any, where: str, expected: str = "a text") -> str:
    """A string."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {expected}, got {name_of(value)}")
    return value


def _from_json(text: str, where: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON: {error}") from error


def name_of(value: Any) -> str:
    """What a value is, in JSON's words."""
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
