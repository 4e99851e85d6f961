"""Learning rates are the written formulas, and optimizer groups are as promised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sloth.train.optim import build_optimizer, clip_gradients, gradient_norm, trainable
from sloth.train.schedule import learning_rate
from tests import tolerance


def rates(schedule, num_steps, warmup=0):
    return [learning_rate(schedule, 8.0, step, num_steps, warmup) for step in range(num_steps)]


def test_schedules_follow_their_formulas():
    assert rates("constant", 4) == [8, 8, 8, 8]
    assert rates("linear", 4) == [8, 6, 4, 2]
    assert rates("linear", 6, warmup=2) == [4, 8, 8, 6, 4, 2]
    assert rates("cosine", 4) == pytest.approx(
        [8, 4 * (1 + math.sqrt(0.5)), 4, 4 * (1 - math.sqrt(0.5))], rel=tolerance.FLOAT64_ROUNDING
    )
    assert rates("wsd", 20) == pytest.approx(
        [8] * 17 + [4, 8 * (1 - math.sqrt(0.5)), 8 * (1 - math.sqrt(0.75))],
        rel=tolerance.FLOAT64_ROUNDING,
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (2, 1), (5, 9), (40, 7)])
def test_every_step_has_a_positive_rate_up_to_the_peak(schedule, num_steps, warmup):
    assert all(0 < rate <= 8 for rate in rates(schedule, num_steps, warmup))


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'step' is unknown"):
        learning_rate("step", 1.0, 0, 1)


def test_weight_decay_leaves_one_dimensional_parameters_out():
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    network[0].weight.requires_grad_(True)
    optimizer = build_optimizer(trainable(network), lr=0.1, weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decays[id(p)] for p in network.parameters() if p.dim() == 1} == {0.0}
    assert decays[id(network[0].weight)] == 0.5
    assert optimizer.defaults["fused"]


def test_clipping_scales_the_whole_gradient_to_the_norm():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    for largest, expected in ((None, 13.0), (26.0, 13.0), (6.5, 6.5)):
        a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        norm = gradient_norm([a, b])
        clip_gradients([a, b], norm, largest)
        torch.testing.assert_close(norm.item(), 13.0, **tolerance.FP32_SAME_MATHS)
        torch.testing.assert_close(
            gradient_norm([a, b]).item(), expected, **tolerance.FP32_SAME_MATHS
        )
