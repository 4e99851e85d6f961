"""What is due when, as functions of the step and of what was measured up to there."""

from __future__ import annotations

from dataclasses import dataclass

from sloth.train.config import TrainConfig
from sloth.train.evaluate import has_stalled
from sloth.train.records import Progress
from sloth.train.schedule import learning_rate, num_warmup_steps


@dataclass(frozen=True)
class Timetable:
    """num_steps: of the run; has_rows: whether there are held-out ones."""

    config: TrainConfig
    num_steps: int
    has_rows: bool

    @property
    def warmup_steps(self) -> int:
        """Steps in which the rate rises."""
        config = self.config
        return num_warmup_steps(config.warmup_steps, config.warmup_ratio, self.num_steps)

    def learning_rate(self, step: int) -> float:
        """The rate of the step after `step` of them."""
        config = self.config
        return learning_rate(config.schedule, config.lr, step, self.num_steps, self.warmup_steps)

    def is_finished(self, progress: Progress) -> bool:
        """Whether nothing is left to train."""
        losses = progress.eval_losses_by_step
        return progress.step >= self.num_steps or has_stalled(losses, self.config.patience)

    def is_eval_due(self, step: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        wanted = self.has_rows or bool(self.config.sample_prompts)
        return wanted and (step == self.num_steps or _is_due(step, self.config.eval_steps))

    def is_save_due(self, step: int) -> bool:
        """Whether a checkpoint is written after so many steps, whatever an evaluation finds."""
        return step == self.num_steps or _is_due(step, self.config.save_steps)

    def num_saves(self, progress: Progress) -> int:
        """How many checkpoints are still to come at most: the last one, and those before it."""
        if self.is_finished(progress):
            return 0
        config, last = self.config, self.num_steps - 1
        every = [config.save_steps, config.eval_steps if self.keeps_best else None]
        return 1 + sum(last // n - progress.step // n for n in every if n is not None)

    @property
    def keeps_best(self) -> bool:
        """Whether a best checkpoint may be kept beside the newest ones."""
        return self.has_rows and self.config.eval_steps is not None


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
