"""Generation from text or chat messages to text: render, encode, decode tokens, stop, give back.

A `str` prompt is raw text, encoded with the tokenizer's special tokens; a list of messages goes
through the chat template, whose text already holds them. Only new text comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sloth.errors import TokenizerMissing
from sloth.infer.generate import collect_tokens, dequantised_while_generating, generate_tokens
from sloth.kernels.dispatch import ops_of
from sloth.lora import adapters_held
from sloth.models.decoder import Decoder
from sloth.models.mode import evaluating
from sloth.text.tokenizer import Tokenizer

Message = dict[str, Any]
Prompt = str | list[Message]

# What decoding gives for a character whose bytes have not all arrived.
_INCOMPLETE = "\ufffd"


def is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether `prompt` is a list of prompts rather than one text or one list of messages."""
    return not isinstance(prompt, str) and not any(isinstance(item, dict) for item in prompt)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Text or messages -> token ids. Raises TokenizerMissing for messages without a template."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    if tokenizer.chat is None:
        raise TokenizerMissing(
            "the model has no chat template; give the prompt as a str of raw text"
        )
    text = tokenizer.chat.render(prompt, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def generate_text(
    network: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    stop: Sequence[str],
) -> list[str]:
    """One answer per prompt, decoded as one batch. `stop` texts end an answer and are cut off."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    is_done = _holds_any(stop, tokenizer)
    with ready_to_generate(network, rows=len(ids)):
        steps = generate_tokens(
            network, ids, max_new_tokens, tokenizer.stop_ids, temperature, is_done
        )
        answers = collect_tokens(steps, len(ids))
    return [_cut(tokenizer.decode(answer), stop) for answer in answers]


def stream_text(
    network: Decoder,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float,
    stop: Sequence[str],
) -> Iterator[str]:
    """The same answer in pieces as they come. Text that may begin a stop text is held back."""
    ids: list[int] = []
    shown, text = 0, ""
    is_done = _holds_any(stop, tokenizer)
    with ready_to_generate(network, rows=1):
        prompts = [encode_prompt(tokenizer, prompt)]
        for (token,) in generate_tokens(
            network, prompts, max_new_tokens, tokenizer.stop_ids, temperature, is_done
        ):
            if token is None:  # the end: what was held back is to come
                break
            ids.append(token)
            text = _cut(tokenizer.decode(ids), stop)
            ready = len(text) - _held_back(text, stop)
            if ready > shown:
                yield text[shown:ready]
                shown = ready
        if text[shown:]:
            yield text[shown:]


def _holds_any(
    stop: Sequence[str], tokenizer: Tokenizer
) -> Callable[[int, list[int]], bool] | None:
    """Whether a row's new tokens hold a stop text, for `generate_tokens`; None without any."""

    def is_done(row: int, new_ids: list[int]) -> bool:
        text = tokenizer.decode(new_ids)
        return any(mark in text for mark in stop)

    return is_done if stop else None


def _cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop text."""
    ends = [text.index(mark) for mark in stop if mark in text]
    return text[: min(ends)] if ends else text


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may still change or turn into a stop text."""
    incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
    starts = [size for mark in stop for size in range(1, len(mark)) if text.endswith(mark[:size])]
    return max([incomplete, *starts])


@contextmanager
def ready_to_generate(network: Decoder, rows: int) -> Iterator[None]:
    """Inside, dropout is off, adapters are held and weights dequantised where that many rows at a
    time ask for it; what was before comes back after."""
    dtype = network.model.embed_tokens.weight.dtype
    # The reference computes an adapter in the dtype of its factors.
    rounded = None if network.model.norm.ops is ops_of("reference") else dtype
    with (
        evaluating(network),
        adapters_held(network, rounded),
        dequantised_while_generating(network, dtype, rows),
    ):
        yield
