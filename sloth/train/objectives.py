"""What a step minimises, and what else it measures: three objectives behind one interface.

    sft    -sum log p(trained tokens) / their number
    dpo    -log sigmoid(beta (log p/q(chosen) - log p/q(rejected))), mean over pairs
    orpo   -sum log p(tokens of chosen rows) / their number
           - beta log sigmoid(log odds(chosen) - log odds(rejected)), mean over pairs
           odds = P / (1 - P), log P: mean log p of an answer's tokens

p is the model, q the same with its adapter switched off, so there is no second copy. log p(answer)
is a sum over its tokens; prompts count in ORPO's first term alone. The log-probabilities come from
`model.logprobs`, which keeps nothing of the vocabulary's width.

Whatever is measured is a mean over the step, and a pass is given the sizes of the whole step to
divide by. So its results are shares that add up over passes and ranks, however rows are split.

Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290; Hong et al. 2024, eq. 3 to 7,
https://arxiv.org/abs/2403.07691 (the first term covers the prompt too, as in TRL's trainer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sloth.constants import IGNORE_INDEX
from sloth.data.batches import Batch, PairBatch
from sloth.data.dataset import Dataset
from sloth.models.mode import evaluating
from sloth.train.config import TrainConfig

if TYPE_CHECKING:
    from sloth.train.trainable import Trainable

REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


class Objective:
    """metrics: names of what is measured beside the loss. has_perplexity: whether exp(loss) is one.
    needs_adapter: whether the model without its adapter is part of the loss.
    """

    metrics: tuple[str, ...] = ()
    has_perplexity = False
    needs_adapter = False

    def __init__(self, model: Trainable, beta: float = 0.1) -> None:
        self.model, self.beta = model, beta

    def sizes(self, batches: Sequence[Batch]) -> list[int]:
        """What the means of these batches are taken over; equally many numbers for none."""
        raise NotImplementedError

    def sizes_of(self, data: Dataset) -> list[int]:
        """The same of a whole data set."""
        raise NotImplementedError

    def named(self, values: Sequence[float | Tensor]) -> dict[str, float]:
        """The metrics by name; nothing without values."""
        names = self.metrics[: len(values)]
        return {name: float(value) for name, value in zip(names, values, strict=True)}

    def measure(self, batch: Batch, sizes: Sequence[int]) -> Tensor:
        """[1 + metrics]: this batch's share of the loss, with a graph, and of each metric."""
        raise NotImplementedError


class Supervised(Objective):
    """Cross-entropy of the trained tokens."""

    has_perplexity = True

    def sizes(self, batches: Sequence[Batch]) -> list[int]:
        return [sum(batch.num_trained for batch in batches)]

    def sizes_of(self, data: Dataset) -> list[int]:
        return [data.counts.trained_tokens]

    def measure(self, batch: Batch, sizes: Sequence[int]) -> Tensor:
        loss = self.model.loss(batch.tokens, batch.labels, batch.positions, num_trained=sizes[0])
        return loss.view(1)


class Preference(Objective):
    """What DPO and ORPO share. beta: how much a preference weighs."""

    metrics: tuple[str, ...] = REWARDS

    def sizes(self, batches: Sequence[Batch]) -> list[int]:
        return [sum(as_pairs(batch).num_pairs for batch in batches)]

    def sizes_of(self, data: Dataset) -> list[int]:
        return [data.num_rows]

    def shares(self, loss: Tensor, chosen: Tensor, rejected: Tensor, num_pairs: int) -> Tensor:
        """The loss and the metrics of these rewards [pairs]; those are logged, not trained."""
        chosen, rejected = chosen.detach(), rejected.detach()
        margins = chosen - rejected
        measured = (chosen, rejected, margins, (margins > 0).to(margins.dtype))
        return torch.stack((loss, *(values.sum() / num_pairs for values in measured)))


class DPO(Preference):
    """Direct preference optimisation; a reward is beta log p/q(answer)."""

    needs_adapter = True

    def measure(self, batch: Batch, sizes: Sequence[int]) -> Tensor:
        pairs = as_pairs(batch)
        with torch.no_grad(), evaluating(self.model.network), self.model.adapter_off():
            reference = self._answers(pairs)
        rewards = self.beta * (self._answers(pairs) - reference)
        chosen, rejected = rewards.chunk(2)
        loss = preference_losses(chosen, rejected).sum() / sizes[0]
        return self.shares(loss, chosen, rejected, sizes[0])

    def _answers(self, pairs: PairBatch) -> Tensor:
        """log p of each answer [2 pairs]."""
        return pairs.sums(self.model.logprobs(pairs.tokens, pairs.labels, pairs.positions))


class ORPO(Preference):
    """Odds ratio preference optimisation; a reward is beta times the mean log p of an answer."""

    metrics = (*REWARDS, "nll")

    def sizes(self, batches: Sequence[Batch]) -> list[int]:
        return [*super().sizes(batches), sum(as_pairs(batch).num_chosen for batch in batches)]

    def sizes_of(self, data: Dataset) -> list[int]:
        return [data.num_rows, int(data.examples.lengths[::2].sum()) - data.num_rows]

    def measure(self, batch: Batch, sizes: Sequence[int]) -> Tensor:
        pairs, (num_pairs, num_chosen) = as_pairs(batch), sizes
        found = self.model.logprobs(pairs.tokens, pairs.chosen_labels(), pairs.positions)
        is_answer = (pairs.labels[:, 1:] != IGNORE_INDEX).to(found.device)
        lengths = torch.tensor(pairs.answers, dtype=found.dtype, device=found.device)
        chosen, rejected = (pairs.sums(found * is_answer) / lengths).chunk(2)
        nll = -pairs.sums(found)[: pairs.num_pairs].sum() / num_chosen
        losses = preference_losses(log_odds(chosen), log_odds(rejected))
        loss = nll + self.beta * losses.sum() / num_pairs
        shares = self.shares(loss, self.beta * chosen, self.beta * rejected, num_pairs)
        return torch.cat((shares, nll.detach().view(1)))


def preference_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log P(chosen is preferred) under Bradley and Terry, of two scores each: [pairs]."""
    return -logsigmoid(chosen - rejected)


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)).

    1 - p through expm1, which is exact where p is near 1, and as good as 1 where p is near 0. A p
    that rounds to 1 is taken as the largest below it: odds stay finite, and so does the gradient.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def as_pairs(batch: Batch) -> PairBatch:
    """The batch, which is one of pairs, as the settings asked for."""
    assert isinstance(batch, PairBatch)
    return batch


OBJECTIVES: dict[str, type[Objective]] = {"sft": Supervised, "dpo": DPO, "orpo": ORPO}


def objective_of(model: Trainable, config: TrainConfig) -> Objective:
    """The objective that the settings name. Raises ValueError where this model cannot have it."""
    kind = OBJECTIVES[config.objective]
    if kind.needs_adapter and not (model.has_adapter or config.lora or model.is_quantized):
        raise ValueError(
            f"objective={config.objective!r} compares the model with itself without its adapter, "
            f"and {model.name} has none: give lora, or use objective='orpo', which compares with "
            "nothing"
        )
    return kind(model, config.beta)
