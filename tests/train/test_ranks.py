"""Two processes: the curve of one, resume, and what fails in one ends both at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from sloth import cli
from sloth.lora_config import LoraConfig
from sloth.train.ranks import Ranks
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.train.fakes import PAIRS, ROWS, FakeModel
from tests.train.rank_script import GRADIENTS, LOOKS, PLACES, PREFERENCES, gradients
from tests.train.runs import ROOT, SETTINGS, train

LONGEST_S = 60


def two_ranks(folder, *arguments):
    """(exit code, output) of both processes of the script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "tests.train.rank_script", str(folder), *arguments]
    outputs = [folder / f"rank-{rank}" for rank in range(2)]  # a pipe that nobody reads would block
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank)},
            cwd=ROOT,
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    deadline = time.monotonic() + LONGEST_S
    try:
        codes = [process.wait(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return list(zip(codes, (output.read_text() for output in outputs), strict=True))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Scenario -> what rank 0 and rank 1 saw."""
    ended = two_ranks(tmp_path_factory.mktemp("ranks"))
    assert [code for code, _ in ended] == [0, 0], ended
    seen = [
        dict(json.loads(line) for line in out.splitlines() if line.startswith('["'))
        for _, out in ended
    ]
    return {name: [one[name] for one in seen] for name in seen[0] if name in seen[1]}


def test_two_ranks_give_the_curve_of_one(told, tmp_path):
    """Row 1: losses, evaluation and weights, with rows of very different lengths."""
    model, report = train(tmp_path / "one", lora=LoraConfig(r=4), eval_data=ROWS[:5], eval_steps=3)
    first, second = told["straight"]
    assert first == second
    losses, eval_losses, weights = first
    torch.testing.assert_close(losses, report.losses, **tolerance.FP32_SAME_MATHS)
    expected = {str(step): loss for step, loss in report.eval_losses.items()}
    torch.testing.assert_close(eval_losses, expected, **tolerance.FP32_SAME_MATHS)
    alone = [p.double().sum().item() for p in model.network.parameters()]
    torch.testing.assert_close(weights, alone, **tolerance.FP32_CHAIN)


@pytest.mark.parametrize("name", GRADIENTS)
def test_row_1_two_ranks_have_the_gradients_of_one_in_one_exchange(told, name):
    """Parameter by parameter, to 1e-6; one rank may have a gradient that the other lacks."""
    expected, num_alone = gradients(Ranks(torch.device("cpu")), GRADIENTS[name])
    (first, num_exchanges), second = told[name]
    assert [first, num_exchanges] == second and (num_exchanges, num_alone) == (1, 0)
    assert first.keys() == expected.keys() and first.pop("of none") is expected.pop("of none")
    assert first.pop("of one rank") == expected.pop("of one rank") == [1.0] * 3
    for parameter, gradient in expected.items():
        assert torch.tensor(gradient).any()
        torch.testing.assert_close(first[parameter], gradient, **tolerance.ACCUMULATION)


@pytest.mark.parametrize("objective", PREFERENCES)
def test_two_ranks_give_the_preference_curve_of_one(told, tmp_path, objective):
    model, settings = FakeModel(), PREFERENCES[objective]
    report = Trainer(model, PAIRS, output=tmp_path / "one", **settings).run()
    first, second = told[objective]
    assert first == second
    losses, eval_losses, weights = first
    torch.testing.assert_close(losses, report.losses, **tolerance.FP32_SAME_MATHS)
    expected = {str(step): loss for step, loss in report.eval_losses.items()}
    torch.testing.assert_close(eval_losses, expected, **tolerance.FP32_SAME_MATHS)
    alone = [p.double().sum().item() for p in model.network.parameters()]
    torch.testing.assert_close(weights, alone, **tolerance.FP32_CHAIN)


def test_two_ranks_resume_bitwise_with_dropout_of_their_own(told):
    """Row 12. The first dies of its callback, the other of that."""
    assert told["died"] == ["Stopped", "RankFailed"]
    assert told["resumed"] == told["dropout"]
    assert told["dropout"][0] == told["dropout"][1]


def test_smaller_passes_of_one_rank_are_those_of_all_and_a_resume_keeps_them(told):
    """Row 15. Rank 0 alone lacks memory; were rank 1 to go on as before, a resume would differ."""
    assert [name for name, _ in told["small died"]] == ["Stopped", "RankFailed"]
    assert told["small"][0] == told["small"][1] and len(told["small"][0][0]) == 6
    assert told["small resumed"] == told["small"]


def test_a_run_that_goes_on_in_more_processes_has_the_steps_of_before(told, tmp_path):
    """One without generators in the checkpoint draws its own: other dropout, the same run."""
    _, straight = train(tmp_path / "one")
    (losses, *_), other = told["grown"]
    assert losses == other[0] and losses[:3] == straight.losses[:3]
    assert len(losses) == 6 and losses[3:] != straight.losses[3:]


@pytest.mark.parametrize("name", LOOKS)
def test_a_rank_without_memory_to_look_sees_each_held_out_row_once(told, tmp_path, name):
    """Rank 1 halves its passes, rank 0 keeps its own and says so."""
    settings = {"batch_size": 4, "lora": LoraConfig(r=4), "eval_data": ROWS, "max_steps": 3}
    _, report = train(tmp_path / "one", **settings)
    (seen, said), (other, _) = told[name]
    assert seen == other
    expected = {str(step): loss for step, loss in report.eval_losses.items()}
    torch.testing.assert_close(seen[1], expected, **tolerance.FP32_SAME_MATHS)
    kind = "an evaluation pass" if LOOKS[name] else "a pass"
    assert f"another process ran out of memory; going on with 1 rows in {kind}" in said


def test_a_signal_to_one_rank_ends_all_after_the_same_step(told):
    assert told["signal"] == [["Interrupted", 143], ["Interrupted", 143]]


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_fails_ends_the_others(told, place):
    """Row 30. The whole file's processes end within a minute, so nobody hangs."""
    assert [outcome[0] for outcome in told[f"{place} 1"]] == (
        ["RankFailed", "Mine"] if place != "save" else [told["dropout"][0][0]] * 2
    )
    assert [outcome[0] for outcome in told[f"{place} 0"]] == ["Mine", "RankFailed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each place needs fork")
@pytest.mark.parametrize("place", PLACES)
def test_row_30_no_rank_ends_in_success_where_one_fails(told, place):
    assert told[f"exit {place}"] == [1, 1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other data", "rank 1 would train another run than rank 0: data is '"),
        ("other base", "rank 1 would train another run than rank 0: base is '"),
        ("other settings", "than rank 0: lr is 0.5, not 0.02. Every process needs the same"),
        ("no data", "none.jsonl does not exist"),
    ],
)
def test_row_30_a_rank_that_would_train_another_run_ends_all(told, name, said):
    (first, _), (second, error) = told[name]
    assert first == "RankFailed" and second == ("DataError" if name == "no data" else "ValueError")
    assert said in error


def test_ranks_train_the_weights_of_the_first(told):
    """Rank 1 brings an adapter that it has changed before."""
    assert told["other weights"] == told["dropout"]


@pytest.mark.parametrize(
    ("fails", "said"),
    [("before", "not all of 2 processes came within 3 s"), ("again", "rank 1 failed")],
)
def test_row_30_a_rank_that_fails_before_the_loop_ends_a_script(tmp_path, fails, said):
    """The trainer meets the others before it reads, in a second run of the process, too."""
    (first, out), (second, err) = two_ranks(tmp_path, fails)
    assert first > 0 and second > 0, (out, err)
    assert f"RankFailed: {said}" in out and ("never came" in err or "DataError" in err)
    assert (tmp_path / "first" / "adapter").is_dir() == (fails == "again")


def test_an_environment_that_tells_but_a_part_is_refused(monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 .*RANK, MASTER_ADDR, MASTER_PORT not which"):
        Trainer(FakeModel(), ROWS)
    assert cli.main(["train", "m", "d.jsonl", "--device", "cpu"]) == 2
    assert "start them with torchrun, or unset WORLD_SIZE" in capsys.readouterr().err


def test_alone_nothing_is_exchanged():
    alone = Ranks(torch.device("cpu"))
    assert alone.share([3, 1, 2]) == [3, 1, 2] and alone.tell("x") == "x"
    assert alone.agree(lambda: [2.0, 3.0], 2) == [2.0, 3.0]
    assert SETTINGS["max_steps"] == 6
