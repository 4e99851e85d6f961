"""`sloth train`: the dry run, and several processes through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import sloth
from sloth import cli
from sloth.commands import launch
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.commands.models import save_texts, save_tiny_model

ROOT = Path(__file__).parents[2]
LONGEST_S = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("train")
    save_tiny_model(folder / "base")
    save_texts(folder / "rows.jsonl")
    return folder


@pytest.fixture(autouse=True)
def alone(place, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place)


def start(*flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, command="train"):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "sloth.cli", command, "base", *flags]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def ranks_of(output):
    """Rank -> process id of those that train into `output`."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        named = dict(v.split(b"=", 1) for v in variables if b"=" in v)
        if output.encode() in words and b"LOCAL_RANK" in named:
            found[int(named[b"RANK"])] = int(entry.name)
    return found


# -- the dry run -----------------------------------------------------------------------------------


def test_the_dry_run_shows_plan_memory_level_and_origins_and_leaves_nothing(place, capsys):
    (place / "run.yaml").write_text("batch_size: 2\nlora: {r: 4}\n")
    flags = ["--config", "run.yaml", "--max-steps", "3", "--output", "dry", "--dry-run"]
    flags += ["--lora.dropout", "0.5"]
    assert cli.main(["train", "base", "rows.jsonl", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start_of_line in (
        "steps         3 of 2 rows",
        "kernel level  fused: the base is frozen",
        "data          11 rows (11 text): 11 examples",
    ):
        assert any(line.startswith(start_of_line) for line in lines), start_of_line
    model = sloth.load("base").add_lora(r=4, dropout=0.5)
    longest = max(Trainer(model, "rows.jsonl").data.row_lengths())
    plan = model.plan(batch=2, seq=longest)
    assert str(plan) in "\n".join(lines) and f"2 x {longest} tokens" in str(plan)
    words = [line.split() for line in lines]
    for setting in (
        ["batch_size", "2", "run.yaml"],
        ["max_steps", "3", "flag"],
        ["seed", "0", "default"],
        ["lora.r", "4", "run.yaml"],
        ["lora.dropout", "0.5", "flag"],
        ["lora.alpha", "16.0", "default"],
    ):
        assert setting in words, setting
    named = {line[0] for line in words if line}
    assert named >= {name for name in sloth.TrainConfig.model_fields if name != "lora"}
    assert not (place / "dry").exists()


def test_the_dry_run_of_full_training_predicts_what_autograd_keeps(capsys):
    assert cli.main(["train", "base", "rows.jsonl", "--batch-size", "3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    model = sloth.load("base")
    longest = max(Trainer(model, "rows.jsonl").data.row_lengths())
    plan = sloth.estimate("base", seq=longest, batch=3, full=True, dtype=torch.float32)
    assert str(plan) in said and "autograd keeps what it wants" in said


def test_the_dry_run_plans_within_a_stated_budget(capsys):
    flags = ["--lora.r", "4", "--memory-gib", "0.75", "--dry-run"]
    assert cli.main(["train", "base", "rows.jsonl", *flags]) == 0
    assert "GiB predicted, budget 0.75 GiB" in capsys.readouterr().out
    flags[3] = "0.0001"
    assert cli.main(["train", "base", "rows.jsonl", *flags]) == 2
    assert "tokens need at least" in capsys.readouterr().err


# -- nobody to hear it -----------------------------------------------------------------------------


def unheard(kind):
    """A stream that cannot be written to: a full disk, or a pipe without a reader."""
    if kind == "full":
        return open("/dev/full", "w")
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["full", "closed"])
def test_row_14_a_full_or_closed_stdout_costs_no_step_and_no_exit_code(place, kind):
    flags = ["--max-steps", "3", "--lora.r", "4", "--device", "cpu", "--output", f"unheard-{kind}"]
    with unheard(kind) as out, unheard(kind) as err:
        assert start("rows.jsonl", *flags, stdout=out, stderr=err).wait(LONGEST_S) == 0
    assert len((place / f"unheard-{kind}" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (place / f"unheard-{kind}" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_command_whose_output_is_all_it_gives_fails_where_that_cannot_be_written():
    with unheard("full") as out:
        process = start("--device", "cpu", command="info", stdout=out)
        _, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 2 and err == "error: [Errno 28] No space left on device\n"


# -- several processes -----------------------------------------------------------------------------


def test_two_processes_give_the_result_of_one(place):
    flags = ["--max-steps", "3", "--lora.r", "4", "--lr", "0.01", "--device", "cpu"]
    process = start("rows.jsonl", *flags, "--output", "two", "--gpus", "2")
    assert cli.main(["train", "base", "rows.jsonl", *flags, "--output", "one"]) == 0
    out, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, err
    assert out.count("3 steps, ") == 1  # one process speaks for all
    losses = {
        name: [json.loads(line)["loss"] for line in (place / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    }
    assert len(losses["two"]) == 3 and losses["two"][-1] < losses["two"][0]
    torch.testing.assert_close(losses["two"], losses["one"], **tolerance.FP32_SAME_MATHS)
    one, two = (
        sloth.load("base", adapter=place / name / "adapter").network.state_dict()
        for name in ("one", "two")
    )
    torch.testing.assert_close(two, one, **tolerance.FP32_CHAIN)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_process_that_is_killed_ends_the_run_within_a_minute(place):
    flags = ["--max-steps", "100000", "--lora.r", "4", "--device", "cpu", "--gpus", "2"]
    process = start("rows.jsonl", *flags, "--output", "killed")
    metrics, deadline = place / "killed" / "metrics.jsonl", time.monotonic() + LONGEST_S
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = ranks_of("killed")
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 2
    assert "rank 1 of 2 ended with signal SIGKILL" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not ranks_of("killed")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--gpus", "2", "--lr", "-1"], "lr: Input should be greater than 0"),
        pytest.param(
            *(["--gpus", "2"], "torch sees no GPU here"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_is_said_once_before_processes_start(flags, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.distributed.run.run", lambda arguments: pytest.fail("launched"))
    assert cli.main(["train", "base", "rows.jsonl", *flags]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_more_gpus_than_there_are_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(["train", "base", "rows.jsonl", "--gpus", "4"]) == 2
    assert "--gpus 4: torch sees 1 of them" in capsys.readouterr().err
    assert cli.main(["train", "base", "rows.jsonl", "--gpus", "2", "--device", "cuda:1"]) == 2
    assert "leave --device out" in capsys.readouterr().err


def test_a_rank_takes_its_own_gpu_and_says_who_it_is(capsys, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    launch.take_device("auto")
    launch.take_device("cpu")
    assert taken == [3] and launch.is_rank() and not launch.is_first()
    assert cli.main(["train", "base", "rows.jsonl", "--gpus", "2"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): --gpus 2, and torchrun started 4")


def test_a_signal_to_all_is_the_commands_exit_code(capsys, monkeypatch):
    """Ranks that were asked to stop leave with 143 after saving; so does the command."""
    failure = SimpleNamespace(exitcode=143, timestamp=1, pid=1)
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda error: "")
    for stopped in (
        SignalException("asked", signal.SIGTERM),
        ChildFailedError("train", {1: failure}),
    ):

        def run(arguments, stopped=stopped):
            raise stopped

        monkeypatch.setattr("torch.distributed.run.run", run)
        flags = ["--gpus", "2", "--device", "cpu"]
        assert cli.main(["train", "base", "rows.jsonl", *flags]) == 143
    assert "error" not in capsys.readouterr().err
