"""Budgets of a loaded model and of an estimate: what is refused, and what that leaves behind."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sloth
from sloth.errors import BudgetTooSmall
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("budgets") / "base", **WHOLE_BLOCKS)


def test_rows_shorter_than_those_planned_for_are_not_refused(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora(r=8)
    settings = {"quant": "nf4", "lora": model.lora_config, "dtype": "float32", "memory_gib": 1e-3}
    needed = sloth.estimate(folder, batch=2, seq=300, **settings).needed_gib
    assert sloth.estimate(folder, batch=2, seq=512, **settings).needed_gib > needed * 1.01
    model.plan(batch=2, seq=300, memory_gib=needed * 1.001)
    for length in (300, 299, 257, 200, 290):
        tokens = torch.randint(3, 100, (2, length))
        model.loss(tokens, tokens).backward()
    with pytest.raises(BudgetTooSmall, match="2 x 310 tokens need"):
        tokens = torch.randint(3, 100, (2, 310))
        model.loss(tokens, tokens)


@pytest.mark.parametrize("wrong", ["12", math.nan, 0, -1.0, True, 1e-3])
def test_a_budget_that_is_refused_changes_nothing(folder: Path, wrong: Any) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora(r=8)
    before = str(model.plan(batch=2, seq=64, memory_gib=3.0))
    with pytest.raises((ValueError, BudgetTooSmall)):
        model.plan(batch=2, seq=64, memory_gib=wrong)
    tokens = torch.randint(3, 100, (2, 64))
    model.loss(tokens, tokens).backward()
    assert model.planner.memory_gib == 3.0
    assert str(model.planner.plan(2, 64)) == before


def test_what_a_refusal_says_is_needed_is_enough(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora(r=8)
    for length in range(40, 1000, 97):
        with pytest.raises(BudgetTooSmall) as refused:
            model.plan(batch=3, seq=length, memory_gib=1e-3)
        said = re.search(r"at least ([0-9.]+) GiB", str(refused.value))
        assert said is not None and model.plan(batch=3, seq=length, memory_gib=float(said[1])).fits


@pytest.mark.parametrize(
    "wrong",
    [
        *({"batch": value} for value in ("2", 1.5, True, 0)),
        *({"seq": value} for value in ("64", 64.0, True, 0, -1)),
        *({"memory_gib": value} for value in ("12", math.nan, math.inf, 0, -1, True)),
        {"optimizer": "foo"},
        {"lora": "16"},
    ],
    ids=str,
)
def test_an_estimate_of_what_cannot_be_is_refused_by_name(
    folder: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}|at least one row"):
        sloth.estimate(folder, **{"seq": 64, "quant": "nf4", **wrong})
