"""Kernel cases of the benchmarks: contenders are checked against fp32 before they are timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import KernelCase, relative_error, run_case, within
from benchmarks.kernels import attention, folded_products
from benchmarks.roofline import ModelShape


def test_a_wrong_contender_is_not_timed_and_a_missing_one_says_so() -> None:
    x = torch.linspace(-1, 1, 64)

    def missing() -> None:
        raise ModuleNotFoundError("no peer")

    case = KernelCase(
        "double",
        lambda: (2 * x,),
        {
            "eager": lambda: lambda: ((2 * x.bfloat16()),),
            "good": lambda: lambda: (x + x,),
            "wrong": lambda: lambda: (2.1 * x,),
            "nan": lambda: lambda: (x * float("nan"),),
            "missing": missing,  # type: ignore[dict-item]
        },
        num_bytes=512.0,
    )
    rows = {row["who"]: row for row in run_case(case, repeats=2)}
    assert rows["eager"]["us"] > 0 and rows["good"]["us"] > 0 and "tb_s" in rows["good"]
    assert "us" not in rows["wrong"] and "not timed" in rows["wrong"]["failed"]
    assert "us" not in rows["nan"]
    assert rows["missing"]["failed"] == "ModuleNotFoundError: no peer"


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_held_against_its_window_cap_and_documents(softcap: float | None) -> None:
    small = ModelShape(2, 32, 48, 2, 1, 16, 64, (100, None), softcap)
    for case in attention.cases(small, num_tokens=256):
        outputs = case.contenders["sloth"]()()
        assert max(relative_error(outputs, case.truth())) < 0.02, case.name


def test_folded_products_are_held_against_base_and_adapter() -> None:
    small = ModelShape(2, 32, 48, 2, 1, 16, 64, (None, None), None)
    cases = list(folded_products.cases(small, num_tokens=24))
    assert len(cases) == 8  # four stacks, each after its limit
    for case in cases:
        for build in case.contenders.values():
            assert max(relative_error(build()(), case.truth())) < 0.02, case.name


def test_errors_are_held_against_the_baselines() -> None:
    assert within([0.019, 0.001], [0.01, 0.0])
    assert not within([0.021, 0.001], [0.01, 0.0])
