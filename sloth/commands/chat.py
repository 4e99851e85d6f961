"""`sloth chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sloth.commands.base import ModelCommand, parse, show, stream_answer


@dataclass(frozen=True, kw_only=True)
class Chat(ModelCommand):
    """Talk with MODEL; /reset forgets the conversation, /quit leaves."""

    system: str | None = None
    """System message."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    temperature: float = 0.7
    """0 takes the likeliest token."""


def run(arguments: Sequence[str]) -> int:
    """Talk with a model."""
    parsed = parse(Chat, "chat", arguments)
    model = parsed.load()
    opening = [{"role": "system", "content": parsed.system}] if parsed.system else []
    messages = list(opening)
    show(f"{model.name}. /reset forgets the conversation, /quit leaves.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = list(opening)
            show("(forgotten)")
        elif line:
            messages.append({"role": "user", "content": line})
            answer = stream_answer(model, messages, parsed.max_new_tokens, parsed.temperature, ())
            messages.append({"role": "assistant", "content": answer})
