"""Greedy and sampled decoding of a batch with a key-value cache.

Prompts of different lengths share a batch by left padding: padding is document 0, text document 1,
and attention never crosses documents, so a row's logits do not depend on its neighbours. Positions
count from the first real token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sloth.constants import GIB
from sloth.infer.decode import PAD_DOCUMENT, TEXT_DOCUMENT, start_decoding
from sloth.kernels.dispatch import ops_of
from sloth.kernels.ops.nf4_matvec import serves
from sloth.lora import projections
from sloth.machine import free_host_gib
from sloth.models.cache import KVCache
from sloth.models.decoder import Decoder
from sloth.quant.linear4bit import Linear4bit


@torch.no_grad()
def generate_tokens(
    network: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    is_done: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Yield one new token id per prompt and step, None for rows that have ended.

    temperature 0 takes the likeliest token; above 0 samples from softmax(logits / temperature).
    is_done(row, new_ids): a further reason to end a row, asked after each token.
    A stop id ends its row and is not yielded. Raises ValueError for an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens; give some text")
    if not 0 <= temperature < math.inf:  # nor NaN
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    device = network.device
    tokens, positions, documents = _left_padded(prompts, device)
    width = tokens.shape[1]
    cache = KVCache(network.config.num_hidden_layers, width + max_new_tokens)
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
    running = [True] * len(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    if bool((documents == PAD_DOCUMENT).any()):
        cache.extend_documents(documents)
    logits = network.head(network.hidden_states(tokens, positions, cache)[:, -1])
    following = None
    for _ in range(max_new_tokens):
        chosen = _choose(logits, temperature)
        ended = torch.isin(chosen, stops).tolist()
        step: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            if running[row] and not ended[row]:
                new[row].append(token)
                step.append(token)
                running[row] = not (is_done and is_done(row, new[row]))
            else:
                running[row] = False
                step.append(None)
        yield step
        if not any(running):
            return
        if following is None:
            following = start_decoding(network, cache, positions[:, -1:] + 1)
        logits = following(chosen[:, None])


def collect_tokens(steps: Iterable[Sequence[int | None]], num_rows: int) -> list[list[int]]:
    """The new tokens of each row, from the steps of `generate_tokens`."""
    answers: list[list[int]] = [[] for _ in range(num_rows)]
    for step in steps:
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions, documents, each [B, longest]; padding is token 0 at position 0."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    positions, documents = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        tokens[row, start:] = torch.tensor(prompt, dtype=torch.long)
        positions[row, start:] = torch.arange(len(prompt))
        documents[row, start:] = TEXT_DOCUMENT
    return tokens.to(device), positions.to(device), documents.to(device)


def _choose(logits_BV: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities = torch.softmax(logits_BV.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1)[:, 0]


@contextmanager
def dequantised_while_generating(network: Decoder, dtype: torch.dtype, rows: int) -> Iterator[None]:
    """Keep dense copies of the 4-bit weights inside, if they take less than half the free memory.

    Decoding reads every weight once a token, so unpacking the codes each time would dominate it.
    One row on a GPU multiplies by the codes themselves, which are fewer bytes than a copy.
    """
    packed = [m for m in projections(network).values() if isinstance(m, Linear4bit)]
    reads_codes = rows == 1 and network.model.norm.ops is not ops_of("reference")
    if reads_codes and all(serves(module.nf4, dtype) for module in packed):
        packed = []
    size = torch.empty((), dtype=dtype).element_size()
    need_bytes = sum(module.in_features * module.out_features for module in packed) * size
    device = network.device
    if need_bytes > _free_bytes(device) // 2:
        packed = []
    for module in packed:
        module.keep_dense(dtype)
    try:
        yield
    finally:
        for module in packed:
            module.drop_dense()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free_gib = free_host_gib()
    return 0 if free_gib is None else int(free_gib * GIB)  # a system that is silent: keep the codes
