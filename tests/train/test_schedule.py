"""Learning rates are the written formulas, and optimizer groups are as promised."""

from __future__ import annotations

import math

import pytest

from sloth.train.schedule import depends_on_length, learning_rate, num_warmup_steps
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


def test_warm_up_as_a_share_is_rounded_up_and_hangs_on_the_length():
    assert [num_warmup_steps(0, 0.1, n) for n in (1, 9, 10, 11, 100)] == [1, 1, 1, 2, 10]
    assert num_warmup_steps(7, 0.0, 100) == 7 and num_warmup_steps(0, 0.0, 100) == 0
    assert depends_on_length("constant", 0.1) and not depends_on_length("constant")
