"""The quality benchmark's arithmetic: which runs count, and what it says about them."""

import json
from typing import Any

import pytest
import torch

from benchmarks.quality import run as quality
from benchmarks.quality.gradients import cosines
from benchmarks.quality.run import draw, finals, fp8_verdict, smoothed, verdict


def run(name: str, seed: int, final: float) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "losses": [2.0, 1.5, final],
        "held_out": {"0": 2.5, "3": final},
    }


PEERS = [run("hf", seed, loss) for seed, loss in enumerate([1.01, 1.05, 1.03])]


def test_the_loss_after_the_last_step_is_the_one_that_counts():
    assert finals([*PEERS, run("sloth", 0, 1.02)], "hf") == [1.01, 1.05, 1.03]


@pytest.mark.parametrize("losses, inside", [([1.00, 1.04], True), ([1.0, 1.0], False)])
def test_sloth_is_judged_by_its_mean_inside_the_peers_spread(losses, inside):
    ours = [run("sloth", seed, loss) for seed, loss in enumerate(losses)]
    passed, line = verdict([*PEERS, *ours])
    assert passed is inside
    assert "1.0100 to 1.0500 over 3 seeds" in line
    assert ("OUTSIDE" in line) is not inside


@pytest.mark.parametrize("final, near", [(1.01, True), (0.9, True), (1.03, False)])
def test_products_in_8_bits_are_judged_by_sloths_worst_seed(final, near):
    runs = [run("sloth", 0, 0.98), run("sloth", 1, 1.02), run("fp8", 0, final)]
    passed, line = fp8_verdict(runs)
    assert passed is near and ("OUTSIDE" in line) is not near


def test_cosines_of_gradients_leave_out_what_is_zero():
    expected = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.ones(2), "c": torch.zeros(2)}
    actual = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([1.0, 0.0]), "c": torch.ones(2)}
    found = cosines(actual, expected)
    assert found["worst"] == pytest.approx(0.5**0.5)
    assert found["median"] == pytest.approx(1.0)
    assert found["all"] == pytest.approx(10 / (11 * 10) ** 0.5)


def test_smoothed_is_a_trailing_mean():
    assert smoothed([4.0, 2.0, 6.0, 0.0], width=2) == [4.0, 3.0, 4.0, 3.0]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw([*PEERS, run("sloth", 0, 1.02), run("fp8", 0, 1.03)], tmp_path / "quality.svg")
    assert (tmp_path / "quality.svg").read_text().count("<svg") == 1


def test_a_process_that_fails_costs_no_other_curve(tmp_path, monkeypatch):
    class Processes:
        def __init__(self, *_: Any) -> None: ...

        def run(self, command: list[str], is_peer: bool) -> tuple[list[dict[str, Any]], str | None]:
            if is_peer:
                return [], "out of memory"
            return [run("sloth", int(command[-1]), 1.02)], None

    monkeypatch.setattr(quality, "prepare", lambda *_: None)
    monkeypatch.setattr(quality, "Processes", Processes)
    given = [
        "--model",
        "m",
        "--gsm8k",
        "g",
        "--work",
        "w",
        "--out",
        str(tmp_path),
        "--seeds",
        "0,1",
    ]
    monkeypatch.setattr("sys.argv", ["run", *given])
    with pytest.raises(SystemExit, match="2 of 4 processes failed"):
        quality.main()
    assert [r["seed"] for r in json.loads((tmp_path / "quality.json").read_text())] == [0, 1]
