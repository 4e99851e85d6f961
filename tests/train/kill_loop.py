"""Kills a run again and again: `python -m tests.train.kill_loop FOLDER KILLS SEED`.

Imports take seconds and a tiny run a third of one, so each run is a fork of this process, which
itself computes nothing (autograd refuses to be forked after it has run). Prints what happened.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sloth.data.dataset import load_data
from sloth.train import checkpoint, trainer
from sloth.train.config import TrainConfig
from sloth.train.optim import build_optimizer
from sloth.train.run_folder import step_of
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import SETTINGS

NUM_STEPS = 60
# A fork takes some 20 ms to its first step, and each step with its save some 5.
LONGEST_LIFE_S = 0.25


def start(output: Path, **changes) -> int:
    """A run in a process of its own, continued where the last one ended; the process's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        settings = {**SETTINGS, "max_steps": NUM_STEPS, "output": output, "resume": True}
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        trainer.Trainer(FakeModel(), ROWS, **{**settings, **changes}).run()
        status = 0
    finally:
        os._exit(status)


def wait(pid: int) -> bool:
    """Whether it ended by itself; an error in it is one here."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a run failed: {status}"
    return os.WIFEXITED(status)


def losses(output: Path) -> list[float]:
    newest = checkpoint.newest_good(output)
    assert newest is not None and step_of(newest) == NUM_STEPS
    return checkpoint.read_state(newest)["progress"]["losses"]


def import_everything() -> None:
    """torch imports half of itself at the first optimizer step."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    build_optimizer({"weight": weight}, TrainConfig()).step()
    load_data(ROWS, FakeModel().tokenizer, 100)


def no_picture(*arguments: object) -> dict[str, Path]:
    """Drawing takes twice as long as training here, and most kills would fall into it."""
    return {}


def main(folder: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    import_everything()
    trainer.plot_losses = no_picture
    wait(start(folder / "straight", save_steps=None))
    expected = losses(folder / "straight")
    moments = random.Random(seed)
    kills = saving = runs = reached = 0
    output = folder / "run-0"
    while kills < num_kills:
        pid = start(output)
        time.sleep(moments.uniform(0.0, LONGEST_LIFE_S))
        os.kill(pid, signal.SIGKILL)
        if wait(pid):
            assert losses(output) == expected, "a resumed curve differs"
            runs, reached = runs + 1, 0
            output = folder / f"run-{runs}"
            continue
        kills += 1
        saving += any(output.glob("*.tmp-*"))
        newest = checkpoint.newest_good(output)  # raises when there are some and none is good
        step = step_of(newest) if newest else 0
        assert step >= reached, f"step {reached} was saved, now the newest good one is {step}"
        reached = step
    wait(start(output))
    assert losses(output) == expected, "a resumed curve differs"
    print(json.dumps({"kills": kills, "in_a_save": saving, "runs": runs + 1}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
