"""Which rows a step reads, and rows into tensors: padded, packed, or padding-free.

Step s of a run reads rows [s R, (s + 1) R) of the endless sequence epoch 0, epoch 1, ..., each a
shuffle of its own: a pure function of seed and epoch, so the step number alone is the data cursor.
A run that goes on with another R is told how many rows it has read.

    padded         [B, T] of the longest row; padding comes after all real tokens, which are causal
    packed         several documents a row, positions from 0 in each; a little padding at the end
    padding-free   all documents in one row [1, T]; nothing is padding
    pairs          padded or padding-free: the chosen examples, then the rejected ones

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sloth.constants import IGNORE_INDEX
from sloth.data.examples import Example


@dataclass(frozen=True)
class Batch:
    """tokens and labels [B, T], right-padded; num_trained labels count after the shift.

    positions: [B, T], 0 where a document begins; None for one document a row.
    """

    tokens: Tensor
    labels: Tensor
    num_tokens: int
    num_trained: int
    positions: Tensor | None = None


@dataclass(frozen=True)
class PairBatch(Batch):
    """The chosen examples of some pairs, then the rejected ones in the same order: a row each, or
    without padding all in one row. lengths: tokens of each example; answers: of those, how many the
    loss sees.
    """

    lengths: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()

    @property
    def num_pairs(self) -> int:
        """Half the examples."""
        return len(self.lengths) // 2

    @property
    def num_chosen(self) -> int:
        """Tokens of chosen examples that follow another one."""
        return sum(self.lengths[: self.num_pairs]) - self.num_pairs

    def chosen_labels(self) -> Tensor:
        """The labels [B, T] with every token of the chosen examples, prompts included."""
        places = torch.arange(self.tokens.shape[1])
        if self.positions is not None:
            is_chosen = (places < sum(self.lengths[: self.num_pairs]))[None]
        else:
            ends = torch.tensor(self.lengths)
            ends[self.num_pairs :] = 0
            is_chosen = places < ends[:, None]
        return torch.where(is_chosen, self.tokens, self.labels)

    def sums(self, values: Tensor) -> Tensor:
        """values [B, T - 1] of each token but a row's first -> their sum over each example."""
        if self.positions is None:
            return values.sum(1)
        parts = torch.nn.functional.pad(values[0], (1, 0)).split(self.lengths)
        return torch.stack([part.sum() for part in parts])


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One example a row. Padding is seen by no real token (attention is causal) nor trained."""
    return _laid_out([[example] for example in examples], pad_id, None)


def collate_documents(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Several examples a row, each a document of its own: attention stays inside, its positions
    begin at 0, and its first token is no target. What padding is left is a document, too.
    """
    length = max(sum(len(example.tokens) for example in row) for row in rows)
    positions = torch.arange(length).repeat(len(rows), 1)
    for line, row in zip(positions, rows, strict=True):
        at = 0
        for example in row:
            at += len(example.tokens)
            line[at:] = torch.arange(length - at)
    return _laid_out(rows, pad_id, positions)


def collate_pairs(
    pairs: Sequence[tuple[Example, Example]], pad_id: int, padding_free: bool
) -> PairBatch:
    """Chosen and rejected examples of some pairs, padded or as documents of one row."""
    examples = [pair[side] for side in (0, 1) for pair in pairs]
    batch = collate_documents([examples], pad_id) if padding_free else collate(examples, pad_id)
    return PairBatch(
        **vars(batch),
        lengths=tuple(len(example.tokens) for example in examples),
        answers=tuple(example.num_trained for example in examples),
    )


def _laid_out(rows: Sequence[Sequence[Example]], pad_id: int, positions: Tensor | None) -> Batch:
    lengths = [sum(len(example.tokens) for example in row) for row in rows]
    shape = len(rows), max(lengths)
    tokens = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for index, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example.tokens)
            tokens[index, at:end] = torch.tensor(example.tokens)
            labels[index, at:end] = torch.tensor(example.labels)
            at = end
    num_trained = sum(example.num_trained for row in rows for example in row)
    return Batch(tokens, labels, sum(lengths), num_trained, positions)


def padding_share(lengths: Sequence[int]) -> float:
    """Of a padded batch of rows this long, the share that would be padding."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


# -- order ---------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The rows of an epoch, shuffled: a pure function of its arguments."""
    rows = list(range(num_rows))
    random.Random(f"sloth rows {seed} {epoch}").shuffle(rows)
    return tuple(rows)


@dataclass(frozen=True)
class StepPlan:
    """Which rows each optimizer step reads. rows_per_step = batch_size * grad_accum.

    first_step, first_row: where a run goes on that has read so many rows in steps of other sizes.
    """

    num_rows: int
    batch_size: int
    grad_accum: int
    seed: int
    total_rows: int
    first_step: int = 0
    first_row: int = 0

    @classmethod
    def of(
        cls,
        num_rows: int,
        batch_size: int,
        grad_accum: int,
        seed: int,
        max_steps: int | None,
        epochs: float | None,
        first_step: int = 0,
        first_row: int = 0,
    ) -> StepPlan:
        """Whichever of max_steps and epochs ends first; one epoch when neither is given."""
        limits = []
        if max_steps is not None:
            limits.append(first_row + (max_steps - first_step) * batch_size * grad_accum)
        if epochs is not None or max_steps is None:
            limits.append(max(1, round((epochs or 1.0) * num_rows)))
        return cls(num_rows, batch_size, grad_accum, seed, min(limits), first_step, first_row)

    @property
    def rows_per_step(self) -> int:
        """Rows of a whole step; the last one may have fewer."""
        return self.batch_size * self.grad_accum

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.first_step + math.ceil((self.total_rows - self.first_row) / self.rows_per_step)

    def rows_before(self, step: int) -> int:
        """How many rows `step` steps have read."""
        later = (step - self.first_step) * self.rows_per_step
        return min(self.first_row + later, self.total_rows)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return self.rows_before(step) / self.num_rows

    def rows(self, step: int) -> list[int]:
        """Row indices of a step, in order."""
        places = range(self.rows_before(step), self.rows_before(step + 1))
        return [
            order(self.num_rows, self.seed, place // self.num_rows)[place % self.num_rows]
            for place in places
        ]

    def micro_batches(self, step: int) -> list[list[int]]:
        """The step's rows, batch_size at a time."""
        rows = self.rows(step)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
