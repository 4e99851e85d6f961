"""Plans and what they claim, by the sizes of a network alone."""

from __future__ import annotations

import pytest

from sloth.train.memory import FRAGMENTATION, make_plan, with_residents
from sloth.train.step_memory import StepMemory
from tests.test_planning import SIZES_8B

# Tokens and budgets whose speed is published, for an 8B model.
PUBLISHED = {
    (4, 2048): (8.05, 12.0, 16.0, 24.0, 36.0),
    (1, 2048): (13.5,),
    (1, 8192): (8.05, 12.0, 14.2, 16.0, 24.0, 36.0),
    (1, 32768): (12.0, 14.2, 16.0, 24.0, 36.0),
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_plan_fits_by_what_it_was_chosen_by(shape: tuple[int, int]) -> None:
    memory = StepMemory(SIZES_8B, *shape)
    for budget in [step / 8 for step in range(40, 160)] + [*PUBLISHED[shape]]:
        plan = make_plan(SIZES_8B, *shape, budget)
        claimed = memory.claimed(plan.keeps, plan.embedding_on_host) / 2**30
        assert plan.fits == (claimed <= budget * (1 - FRAGMENTATION))
        assert plan.fits or plan.needed_gib > budget
        assert plan.fits or budget not in PUBLISHED[shape]


def test_a_plan_of_fewer_unpacked_layers_is_predicted_as_such() -> None:
    plan = make_plan(SIZES_8B, 4, 2048, 77.0)
    count = sum(keep.resident for keep in plan.keeps)
    fewer = with_residents(SIZES_8B, plan, count // 2)
    assert with_residents(SIZES_8B, plan, count) is plan and count > 1
    held = plan.parts["unpacked layers"] * (count // 2) / count
    assert fewer.parts["unpacked layers"] == pytest.approx(held)
    assert fewer.predicted_gib == pytest.approx(sum(fewer.parts.values()))
    assert fewer.predicted_gib < plan.predicted_gib
