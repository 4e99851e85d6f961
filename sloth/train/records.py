"""What a run tells: one record a step, one an evaluation, the progress that a checkpoint keeps, and
the report at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from sloth.data.counts import DataCounts


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. tokens count what the model read, without padding; skipped: no update;
    rows: of a skipped step, by their places among the examples or packs; begins: how the first of
    them begin, to find them in the data; metrics: what the objective measures beside its loss.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    memory_bytes: int
    skipped: bool
    rows: list[int] | None = None
    begins: list[str] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of this step."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation. loss is None when there are prompts but no held-out rows; samples:
    (prompt, answer). has_perplexity: whether the loss is a mean over tokens.
    """

    step: int
    loss: float | None
    samples: list[tuple[str, str]] = field(default_factory=list)
    is_best: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    has_perplexity: bool = True

    @property
    def perplexity(self) -> float | None:
        """exp(loss); infinite where that overflows, None where it would mean nothing."""
        if self.loss is None or not self.has_perplexity:
            return None
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass
class Progress:
    """What a checkpoint's state.json holds of the run so far.

    rows_read: by all steps so far; None in a checkpoint of an older version.
    rows_per_pass: rows of one forward pass once memory ran out with batch_size of them; kept so
    that a resumed run adds up in the same order. is_eval_due: whether the evaluation after this
    step is still to come.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    rows_read: int | None = 0
    rows_per_pass: int | None = None
    is_eval_due: bool = False
    losses: list[float] = field(default_factory=list)
    eval_losses: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, tokens: int, trained: int, seconds: float, is_good: bool) -> None:
        """Count one more step."""
        self.step += 1
        self.tokens += tokens
        self.trained_tokens += trained
        self.seconds += seconds
        self.skipped += not is_good
        self.bad_in_a_row = 0 if is_good else self.bad_in_a_row + 1
        self.losses.append(loss)

    @property
    def eval_losses_by_step(self) -> dict[int, float]:
        """The same by numbers: JSON has no integer keys."""
        return {int(step): loss for step, loss in self.eval_losses.items()}


@dataclass(frozen=True)
class TrainReport:
    """What a run did, from its first step even when it was resumed.

    losses: one per optimizer step (NaN where it was not finite). eval_losses: by step. tokens:
    read by the model; trained_tokens: of those, in the loss. data: what became of the rows of the
    training data. skipped: steps without an update. best_step: of the lowest evaluation loss.
    stopped_early: patience ran out. paths: output, config, facts (run.json), metrics, loss_svg,
    loss_png (with matplotlib), adapter or model, checkpoint, best.
    """

    losses: list[float]
    tokens: int
    seconds: float
    paths: dict[str, Path]
    trained_tokens: int = 0
    data: DataCounts = field(default_factory=DataCounts)
    skipped: int = 0
    eval_losses: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: bool = False
