"""Which plans replay their layers as CUDA graphs, and whether the memory of a recording fits."""

from __future__ import annotations

from dataclasses import replace

from sloth.kernels.context import Keep
from sloth.train.memory import _RECORDING_SLACK, make_plan
from sloth.train.step_memory import FRAGMENTATION, StepMemory
from tests.test_planning import SIZES_8B


def test_small_batches_are_recorded_where_the_host_would_be_late() -> None:
    def recorded(batch: int, seq: int, budget: float) -> bool:
        keeps = make_plan(SIZES_8B, batch, seq, budget).keeps
        assert len({keep.recorded for keep in keeps}) == 1
        return keeps[0].recorded

    assert recorded(1, 2048, 80.0) and recorded(1, 64, 80.0)
    assert not recorded(1, 16384, 200.0)  # the host is done long before the device
    assert not recorded(1, 2048, 7.0)  # what is kept waits in host memory
    dora = replace(SIZES_8B, dora=(True, True, True, True))
    assert not make_plan(dora, 1, 2048, 80.0).keeps[0].recorded


def test_what_the_device_hides_is_recorded_with_memory_left_over_alone() -> None:
    for budget in (8.05, 16.0, 24.0, 36.0, 44.0, 48.0, 52.0, 77.0):
        plan = make_plan(SIZES_8B, 4, 2048, budget)
        if plan.keeps[0].recorded:
            assert all(keep.gate and keep.up and keep.resident for keep in plan.keeps)
            assert plan.predicted_gib * 1.1 <= budget
        assert plan.keeps[0].recorded == (budget > 50)


def test_layers_that_stay_unpacked_leave_a_recording_its_slack() -> None:
    plans = [make_plan(SIZES_8B, 2, 2048, budget) for budget in (20.0, 24.0, 28.0, 32.0)]
    recorded = [plan for plan in plans if plan.keeps[0].recorded]
    assert any(0 < sum(keep.resident for keep in plan.keeps) < 32 for plan in recorded)
    for plan in recorded:
        assert plan.budget_gib is not None
        assert plan.predicted_gib * (1 + _RECORDING_SLACK) <= plan.budget_gib


def test_a_recording_is_only_planned_where_its_memory_fits() -> None:
    memory = StepMemory(SIZES_8B, 1, 2048)
    plain, recorded = [Keep()] * 32, [Keep(recorded=True)] * 32
    between = (memory.peak(plain, False) + memory.peak(recorded, False)) / 2
    plan = make_plan(SIZES_8B, 1, 2048, between / 2**30 / (1 - FRAGMENTATION))
    assert not plan.keeps[0].recorded and plan.fits
