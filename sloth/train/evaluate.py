"""Held-out loss, perplexity and answers to fixed prompts; what is best so far, and when to stop.

    eval loss = what training minimises, over all held-out rows at once
    perplexity = exp(eval loss), where that is a mean over tokens

Needs no more memory than training: no gradients, so no activations are kept; the loss is the
training's own, which holds no logits; and a pass reads no more padded tokens than training's
largest. Rows go longest first, so a pass that does not fit shows at once and is halved. Dropout is
off and no random number is drawn: training goes on as if there had been no evaluation. What is
measured is the model that will be saved: products in 8 bits, an approximation of training, are left
out. Their blocks then run as the model's file writes them, each MLP whole: where training takes it
in tiles, long contexts in little memory, it is here that a pass may not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sloth.errors import SlothError
from sloth.infer.generate import collect_tokens, generate_tokens
from sloth.infer.text import Prompt, encode_prompt
from sloth.models.mode import evaluating

if TYPE_CHECKING:
    from sloth.models.decoder import Decoder
    from sloth.text.tokenizer import Tokenizer


def eval_batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Rows of each pass, longest first: at most max_rows, and max_tokens with padding, or one."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in rows:
        last = batches[-1] if batches else []
        fits = len(last) < max_rows and last and (len(last) + 1) * lengths[last[0]] <= max_tokens
        if fits:
            last.append(row)
        else:
            batches.append([row])
    return batches


@torch.no_grad()
def summed(
    batches: Iterable[list[int]], measure: Callable[[list[int]], Tensor], network: Decoder
) -> list[float]:
    """Loss and metrics of all passes, added up; each is a share already. Empty for no pass."""
    with evaluating(network), network.as_stored():
        measured = [measure(rows).tolist() for rows in batches]
        return [math.fsum(shares) for shares in zip(*measured, strict=True)]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt: a user's message where the model has a chat template, else raw
    text. Raises ValueError for one that cannot be asked: no tokens, or a template that refuses it.
    """
    encoded = []
    for number, prompt in enumerate(prompts):
        asked: Prompt = prompt
        if tokenizer.chat is not None:
            asked = [{"role": "user", "content": prompt}]
        try:
            ids, why = encode_prompt(tokenizer, asked), "it has no tokens"
        except (SlothError, ValueError) as error:
            ids, why = [], str(error)
        if not ids:
            raise ValueError(f"sample_prompts[{number}]={prompt!r} cannot be asked: {why}")
        encoded.append(ids)
    return encoded


def sample_answers(
    network: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    is_over: Callable[[], bool] = lambda: False,
) -> list[tuple[str, str]]:
    """(prompt, greedy answer) of each prompt; nothing once `is_over`. 4-bit weights stay packed: a
    dense copy would be memory that training lacks.
    """
    if not prompts:
        return []
    ids = encode_prompts(tokenizer, prompts)
    with evaluating(network):
        steps = generate_tokens(network, ids, num_tokens, tokenizer.stop_ids)
        answers = collect_tokens(takewhile(lambda _: not is_over(), steps), len(ids))
    if is_over():
        return []
    texts = [tokenizer.decode(answer) for answer in answers]
    return list(zip(prompts, texts, strict=True))


def best_step(losses: Mapping[int, float]) -> int | None:
    """The step with the lowest finite loss, the earliest of equals."""
    finite = [(loss, step) for step, loss in losses.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def has_stalled(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether `patience` evaluations have passed since the best one. A pure function of what was
    measured, so a resumed run stops where the first one did.
    """
    if patience is None:
        return False
    best = best_step(losses)
    since = [step for step in losses if best is None or step > best]
    return len(since) >= patience
