"""The gradients of one optimizer step, added up over forward passes; smaller passes when memory
runs out.

    loss = sum over passes of (losses of the pass, summed / the count of them in the whole step)

As each pass is divided by the count of the whole step (trained tokens, or pairs), the sum does not
depend on how its rows are split. So when memory runs out, or a longer batch turns out not to fit a
stated budget, the half-made gradients are dropped, the generators put back, the rows of a pass
halved for the rest of the run, and the step is done again: the same rows and tokens, the same loss
up to the order of sums (dropout draws in other shapes, so with it another sample of the same
distribution). Weights were not touched yet, so nothing is lost.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sloth.data.dataset import Batch
from sloth.errors import BudgetTooSmall, OutOfMemory
from sloth.train.checkpoint import rng_tensors, set_rng
from sloth.train.objectives import Objective
from sloth.train.ranks import Number, Ranks


@dataclass(frozen=True)
class Accumulated:
    """What a step's passes came to; the gradients are where backward leaves them. metrics: what
    the objective measures beside the loss, in its order.
    """

    loss: Tensor
    metrics: list[Number]
    num_tokens: int
    num_trained: int


class Accumulator:
    """Runs a step's passes. `rows_per_pass` falls by halves and never rises; so do the rows of
    evaluation passes.

    ranks: who shares the rows of a step. batch_of: rows -> Batch. objective: what is minimised.
    forget: drop all gradients.
    """

    def __init__(
        self,
        ranks: Ranks,
        batch_of: Callable[[list[int]], Batch],
        objective: Objective,
        forget: Callable[[], None],
        notice: Callable[[str], None],
        rows_per_pass: int,
        eval_rows_per_pass: int | None = None,
    ) -> None:
        self.ranks, self.batch_of, self.objective = ranks, batch_of, objective
        self.rows_per_pass = rows_per_pass
        self._eval_rows = eval_rows_per_pass
        self._forget, self._notice, self._device = forget, notice, ranks.device

    def step(self, rows: Sequence[int]) -> Accumulated:
        """Backward of a step's rows. Raises OutOfMemory when one row alone does not fit."""
        own = self.ranks.share(rows)
        counted: list[Batch] = []

        def count() -> list[float]:
            counted.extend(self._batches(own))
            num_tokens = sum(batch.num_tokens for batch in counted)
            num_trained = sum(batch.num_trained for batch in counted)
            return [num_tokens, num_trained, *self.objective.sizes(counted)]

        numbers = self.ranks.agree(count, 2 + len(self.objective.sizes([])))
        num_tokens, num_trained, *sizes = map(int, numbers)
        loss, *metrics = self.agreed(
            lambda: list(self._backward(own, counted, sizes)), 1 + len(self.objective.metrics)
        )
        loss = torch.as_tensor(loss, device=self._device)
        return Accumulated(loss, metrics, num_tokens, num_trained)

    def agreed(self, work: Callable[[], Sequence[Number]], count: int) -> list[Number]:
        """`Ranks.agree` for work that may halve the passes. Afterwards they are those of the rank
        with the least memory, in all: a checkpoint keeps one number, and a resume follows it. Rank
        0, which alone is heard, tells of it.
        """
        ranks = self.ranks

        def counted() -> list[Number]:
            numbers, kept = list(work()), (self.rows_per_pass, self._eval_rows or 0)
            return [*numbers, *(n * (r == ranks.rank) for n in kept for r in range(ranks.size))]

        numbers = ranks.agree(counted, count + 2 * ranks.size)
        rows, eval_rows = (
            int(min(numbers[at : at + ranks.size])) for at in (count, count + ranks.size)
        )
        held = (
            (rows, "a pass", self.rows_per_pass),
            (eval_rows, "an evaluation pass", self._eval_rows),
        )
        for least, what, own in held:
            if own and least < own:
                self._notice(
                    f"WARNING: another process ran out of memory; going on with {least} rows in "
                    f"{what} and more passes, which gives the same loss"
                )
        self.rows_per_pass, self._eval_rows = rows, eval_rows or None
        return numbers[:count]

    def _backward(self, rows: list[int], batches: list[Batch], sizes: list[int]) -> Tensor:
        generators = rng_tensors(self._device)
        while True:
            try:
                return self._passes(batches, sizes)
            except (torch.OutOfMemoryError, BudgetTooSmall) as error:
                why = str(error).split(". ")[0]
            # Out of the except block: the traceback held the frames, and those the activations.
            self._forget()
            self.shrink(why)
            set_rng(generators, self._device)
            batches = self._batches(rows)

    def _batches(self, rows: list[int]) -> list[Batch]:
        size = self.rows_per_pass
        return [self.batch_of(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _passes(self, batches: list[Batch], sizes: list[int]) -> Tensor:
        total = torch.zeros(1 + len(self.objective.metrics), device=self._device)
        for batch in batches:
            measured = self.objective.measure(batch, sizes)
            measured[0].backward()
            total = total + measured.detach()
        return total

    @property
    def eval_rows_per_pass(self) -> int:
        """Rows of an evaluation pass: as many as training's, unless they were given."""
        return self._eval_rows or self.rows_per_pass

    def shrink_evaluation(self, why: str) -> None:
        """Halve evaluation passes from here on: training's with them, unless they were given."""
        if self._eval_rows is None:
            self.shrink(why)
            return
        self._eval_rows = self._halved(self._eval_rows, "an evaluation pass", why)

    def shrink(self, why: str) -> None:
        """Halve the passes from here on. Raises OutOfMemory when they hold one row already."""
        if self.rows_per_pass == 1:
            raise OutOfMemory(
                f"one row alone does not fit into the memory of {self._device}: {why}. A smaller "
                "max_length, quant='nf4', or an adapter instead of full training needs less"
            )
        self.rows_per_pass = self._halved(self.rows_per_pass, "a pass", why)

    def _halved(self, rows: int, what: str, why: str) -> int:
        halved = (rows + 1) // 2
        self._notice(
            f"WARNING: out of memory with {rows} rows in {what}; going on with {halved} and more "
            f"passes, which gives the same loss ({why})"
        )
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return halved
