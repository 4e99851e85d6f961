"""SIGINT and SIGTERM finish the step, save, leave with their status; a second SIGINT at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from sloth.errors import Interrupted
from sloth.train import checkpoint
from sloth.train.callbacks import Callback
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import ROOT, SETTINGS, metrics, train


class Send(Callback):
    """Sends this process signals in a step, before its save."""

    def __init__(self, step, *numbers):
        self.in_step, self.numbers = step, numbers

    def step(self, record):
        if record.step == self.in_step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def signalled(output, callback, **changes):
    settings = {**SETTINGS, "save_steps": None, "output": output, **changes}
    return Trainer(FakeModel(), ROWS, callbacks=[callback], **settings).run()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_leaves(tmp_path, number, code, capfd):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=f"{number.name} after step 3.*step-000003, is good") as e:
        signalled(tmp_path / "run", Send(3, number))
    assert e.value.code == code
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert f"{number.name}: finishing the step and saving" in capfd.readouterr().err
    _, report = train(tmp_path / "run", resume=True)
    _, straight = train(tmp_path / "straight")
    assert report.losses == straight.losses
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


class EvaluatesSlowly(FakeModel):
    """Receives a signal in some pass over held-out rows, counted from 1 over the run."""

    def __init__(self, stops_in=None):
        super().__init__()
        self.stops_in, self.num_evaluated = stops_in, 0

    def loss(self, *arguments, **settings):
        if not self.network.training:
            self.num_evaluated += 1
            if self.num_evaluated == self.stops_in:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(*arguments, **settings)


HELD_OUT = {"eval_data": ROWS[:5], "eval_steps": 3, "eval_batch_size": 1}


@pytest.mark.parametrize(("stops_in", "num_evaluated"), [(None, 0), (2, 2)])
@pytest.mark.parametrize("save_steps", [3, None])
def test_a_signal_does_not_wait_for_an_evaluation_which_a_resume_makes_up_for(
    tmp_path, stops_in, num_evaluated, save_steps
):
    """Before the evaluation, and between its passes: none begins after the signal."""
    model, settings = EvaluatesSlowly(stops_in), {**SETTINGS, **HELD_OUT, "save_steps": save_steps}
    callbacks = [] if stops_in else [Send(3, signal.SIGTERM)]
    output = tmp_path / "run"
    with pytest.raises(Interrupted, match="after step 3.*step-000003, is good"):
        Trainer(model, ROWS, callbacks=callbacks, output=output, **settings).run()
    assert model.num_evaluated == num_evaluated
    again, straight = EvaluatesSlowly(), EvaluatesSlowly()
    _, report = train(output, model=again, resume=True, save_steps=save_steps, **HELD_OUT)
    _, whole = train(tmp_path / "straight", model=straight, **HELD_OUT)
    assert again.num_evaluated == straight.num_evaluated == 10
    assert report.eval_losses == whole.eval_losses and len(whole.eval_losses) == 2
    assert metrics(output) == metrics(tmp_path / "straight")


def test_a_second_sigint_leaves_at_once_and_the_last_checkpoint_stands(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        signalled(tmp_path / "run", Send(3, signal.SIGINT, signal.SIGINT), save_steps=2)
    found = checkpoint.checkpoints(tmp_path / "run")
    assert [folder.name for folder in found] == ["step-000002"]
    assert checkpoint.is_good(found[0])
    _, report = train(tmp_path / "run", resume=True)
    assert report.losses == train(tmp_path / "straight")[1].losses


def test_a_second_sigint_inside_the_save_leaves_the_one_before(tmp_path, monkeypatch):
    write = checkpoint.write_tensors

    def slow(file, tensors):
        if "step-000003" in str(file):
            os.kill(os.getpid(), signal.SIGINT)
        return write(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    with pytest.raises(KeyboardInterrupt):
        signalled(tmp_path / "run", Send(3, signal.SIGTERM), save_steps=1)
    assert checkpoint.newest_good(tmp_path / "run").name == "step-000002"
    assert not list((tmp_path / "run").glob("*.tmp-*"))


def test_a_run_in_another_thread_works_without_handlers(tmp_path):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(train(tmp_path / "run")[1]))
    thread.start()
    thread.join()
    assert len(reports[0].losses) == 6


SCRIPT = """
import signal, sys
from pathlib import Path
from tests.train.test_signals import Send, signalled
signalled(Path(sys.argv[1]), Send(2, *map(signal.Signals, map(int, sys.argv[2:]))))
print("not reached")
"""


@pytest.mark.parametrize(
    ("numbers", "statuses"),
    [
        ([signal.SIGINT], {130}),
        ([signal.SIGTERM], {143}),
        # Python ends an uncaught KeyboardInterrupt by the signal itself, which shells show as 130.
        ([signal.SIGINT, signal.SIGINT], {-signal.SIGINT, 130}),
    ],
)
def test_a_script_ends_with_the_status_of_its_signal(tmp_path, numbers, statuses):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), *map(str, map(int, numbers))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in statuses, done.stderr
    assert "not reached" not in done.stdout
    assert ("Traceback" in done.stderr) == (len(numbers) == 2)
