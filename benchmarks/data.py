"""The token batches of the end-to-end cases: random rows, and packs of short documents.

Ids are random, yet a loss still tells two labellings apart: the losses of single tokens scatter by
about 1 around log(vocabulary), so the mean over thousands of them depends on which tokens were
counted to a hundredth or two, and two correct programs agree to a few ten-thousandths.

Every process draws on the CPU with a fixed seed and so gets the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100
# Documents of an instruction data set: mean length 200, a long tail, the last quarter trained.
MEAN_LENGTH, LENGTH_SIGMA, TRAINED_SHARE = 200.0, 0.8, 0.25
# Ids that stay unused at the top of the vocabulary: a peer's made-up tokenizer puts padding there.
RESERVED_IDS = 16


@dataclass(frozen=True)
class Batch:
    """One step's tokens and labels [B, T], labels unshifted; positions [B, T] restart per document.

    positions is None when every row is one document. lengths: of all documents, rows in order.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.tokens.numel()

    @property
    def num_trained(self) -> int:
        """Tokens that a loss is taken on; the first of a row has nothing to be predicted from."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        tokens, labels = self.tokens.to(device), self.labels.to(device)
        return replace(self, tokens=tokens, labels=labels, positions=positions)


def random_batch(vocabulary: int, rows: int, length: int, seed: int) -> Batch:
    """Rows of one document each, every token trained."""
    tokens = _random_ids(vocabulary, rows, length, torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens.clone(), None, [length] * rows)


def packed_batch(vocabulary: int, rows: int, length: int, seed: int) -> Batch:
    """Rows packed full with short documents; the last quarter of each document is trained."""
    generator = torch.Generator().manual_seed(seed)
    tokens = _random_ids(vocabulary, rows, length, generator)
    labels, positions = torch.full_like(tokens, IGNORED), torch.empty_like(tokens)
    lengths: list[int] = []
    for row in range(rows):
        start = 0
        for document in document_lengths(length, generator):
            end = start + document
            positions[row, start:end] = torch.arange(document)
            # Never its first token: plain shifting would predict it from the document before.
            answer = max(end - max(1, round(TRAINED_SHARE * document)), start + 1)
            labels[row, answer:end] = tokens[row, answer:end]
            lengths.append(document)
            start = end
    return Batch(tokens, labels, positions, lengths)


def document_lengths(total: int, generator: torch.Generator) -> list[int]:
    """Lengths drawn from a log-normal of mean 200 that fill `total`; the last one is cut to fit."""
    mu = math.log(MEAN_LENGTH) - LENGTH_SIGMA**2 / 2
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = math.exp(mu + LENGTH_SIGMA * torch.randn((), generator=generator).item())
        lengths.append(min(max(2, round(drawn)), left))
    return lengths


def cycle(batches: list[Batch]) -> Callable[[], Batch]:
    """A function that hands out the batches in turn, over and over."""
    calls = 0

    def following() -> Batch:
        nonlocal calls
        calls += 1
        return batches[(calls - 1) % len(batches)]

    return following


def _random_ids(vocabulary: int, rows: int, length: int, generator: torch.Generator) -> Tensor:
    top = max(2, vocabulary - RESERVED_IDS)
    return torch.randint(top, (rows, length), generator=generator)
