"""`sloth generate MODEL PROMPT`: the text that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sloth.commands.base import ModelCommand, parse, stream_answer


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand):
    """Continue PROMPT and print the new text."""

    prompt: tyro.conf.Positional[str]
    """Raw text, or with --chat a user's message."""
    chat: bool = False
    """Put the prompt in the model's chat template."""
    max_new_tokens: int = 256
    """Tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""


def run(arguments: Sequence[str]) -> int:
    """Continue a prompt."""
    parsed = parse(Generate, "generate", arguments)
    model = parsed.load()
    prompt = [{"role": "user", "content": parsed.prompt}] if parsed.chat else parsed.prompt
    stream_answer(model, prompt, parsed.max_new_tokens, parsed.temperature, parsed.stop)
    return 0
