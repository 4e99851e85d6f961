"""Whether a rendered conversation has the tools and the calls that its row has.

A template that does not know tools writes neither, and says nothing: an answer that is a call alone
would be trained as an empty one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sloth.errors import DataError


def require_calls_written(messages: Sequence[Mapping[str, Any]], text: str, where: str) -> None:
    """Raise DataError, naming the function, where a call of the messages is not in their text."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    for name in _names(calls):
        if name not in text:
            raise DataError(
                f"{where}: the chat template does not write tool calls ({name!r} is called, and "
                "nowhere in its text), so the turn would be trained without the call; take a model "
                "whose template knows tools, or leave such rows out"
            )


def are_written(tools: Sequence[Any] | None, text: str) -> bool:
    """Whether the text names every tool."""
    return all(name in text for name in _names(tools or []))


def _names(functions: Iterable[Any]) -> list[str]:
    """Of functions, as they are called or described: {"name"} or {"function": {"name"}}."""
    found = []
    for each in functions:
        inner = each.get("function", each) if isinstance(each, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if isinstance(name, str):
            found.append(name)
    return found
