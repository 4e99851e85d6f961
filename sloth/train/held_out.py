"""Evaluation of the model while it trains: the loss on held-out rows, and answers to the prompts.

It changes nothing that training depends on (evaluate.py), and where memory runs out it costs the
evaluation and not the run. A signal to stop ends it between two passes: the run is resumed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TypeVar

import torch

from sloth.data.dataset import Batch, Dataset
from sloth.train.accumulate import Accumulator
from sloth.train.config import TrainConfig
from sloth.train.evaluate import best_step, eval_batches, sample_answers, summed
from sloth.train.log import RunLog
from sloth.train.objectives import Objective
from sloth.train.ranks import Ranks
from sloth.train.records import EvalRecord, Progress
from sloth.train.signals import StopRequest

Result = TypeVar("Result")


@dataclass(frozen=True)
class HeldOut:
    """What a run evaluates on. data: held-out rows, None for prompts alone. longest: tokens of
    the longest row that is trained on. batch_of: some rows of a data set as tensors.
    """

    objective: Objective
    config: TrainConfig
    ranks: Ranks
    data: Dataset | None
    longest: int
    batch_of: Callable[[Dataset, list[int]], Batch]

    def evaluate(
        self, progress: Progress, log: RunLog, accumulator: Accumulator, stop: StopRequest
    ) -> bool:
        """Measure, ask and log; whether the loss is a new lowest. Stays due where `stop` cut it
        short.
        """
        loss, metrics = None, {}
        if self.data is not None:
            count = 3 + len(self.objective.metrics)
            num_short, num_stopped, *sums = accumulator.agreed(
                lambda: self._sums(accumulator, stop), count
            )
            if num_stopped:
                return False
            if num_short:
                log.notice(
                    "WARNING: no evaluation loss, one held-out row alone does not fit into memory; "
                    "a smaller max_length cuts it. Training goes on"
                )
            else:
                loss = progress.eval_losses[str(progress.step)] = float(sums[0])
                metrics = self.objective.named(sums[1:])
        progress.is_eval_due = False
        improved = loss is not None and best_step(progress.eval_losses_by_step) == progress.step

        def answer_and_tell() -> None:
            samples, has_perplexity = self._samples(log, stop), self.objective.has_perplexity
            log.evaluation(
                EvalRecord(progress.step, loss, samples, improved, metrics, has_perplexity)
            )

        self.ranks.first(answer_and_tell)
        return improved

    def _samples(self, log: RunLog, stop: StopRequest) -> list[tuple[str, str]]:
        """Answers to the prompts; none where generating them fails, as for lack of memory: they are
        for reading, and no reason to end a run.
        """
        model, config = self.objective.model, self.config
        try:
            return self._with_room(
                lambda: sample_answers(
                    model.network,
                    model.tokenizer,
                    config.sample_prompts,
                    config.sample_tokens,
                    lambda: stop.received is not None,
                )
            )
        except torch.OutOfMemoryError as error:
            why = f"memory ran out while generating them ({str(error).split('. ')[0]})"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        log.notice(f"WARNING: samples are left out, {why}")
        return []

    def _with_room(self, work: Callable[[], Result]) -> Result:
        """What `work` gives. Where memory runs out, it is done again in the memory that layers
        prepared steps in, such as a recording of theirs."""
        with suppress(torch.OutOfMemoryError):
            return work()
        self.objective.model.network.release()
        return work()

    def _sums(self, accumulator: Accumulator, stop: StopRequest) -> list[float]:
        """1 where a held-out row alone does not fit (it may be longer than those trained on), else
        0; 1 where `stop` ended it; then this rank's shares of the loss over held-out rows and of
        the metrics.
        """
        assert self.data is not None
        data = self.data
        objective, sizes = self.objective, self.objective.sizes_of(data)
        nothing = [0.0] * (1 + len(objective.metrics))
        lengths = data.row_lengths()
        # Shared before they become passes: a rank that halves its own must not move the others'.
        own = self.ranks.share(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)))
        own_lengths = [lengths[row] for row in own]

        def pass_over(batches: list[list[int]]) -> list[float]:
            return summed(
                takewhile(lambda _: stop.received is None, batches),
                lambda rows: objective.measure(self.batch_of(data, rows), sizes),
                objective.model.network,
            )

        while True:
            rows = accumulator.eval_rows_per_pass
            places = eval_batches(own_lengths, rows, rows * self.longest)
            batches = [[own[place] for place in one] for one in places]
            try:
                sums = self._with_room(partial(pass_over, batches))
                return [0.0, float(stop.received is not None), *(sums or nothing)]
            except torch.OutOfMemoryError as error:
                why = str(error).split(". ")[0]
            if rows == 1:
                return [1.0, 0.0, *nothing]
            accumulator.shrink_evaluation(why)
