"""One of two processes that train together: `python -m tests.train.rank_script FOLDER`.

Prints a JSON line for each scenario: what rank 0 and rank 1 saw of a run in which one of them fails
somewhere, or neither does. RANK, WORLD_SIZE and the meeting place come from the environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sloth.lora_config import LoraConfig
from sloth.train import trainer
from sloth.train.callbacks import Callback
from tests.train.fakes import PAIRS, ROWS, FakeModel
from tests.train.runs import SETTINGS, DieIn

NO_DROPOUT = {**SETTINGS, "lora": LoraConfig(r=4), "eval_data": ROWS[:5], "eval_steps": 3}

PREFERENCES = {
    objective: {**NO_DROPOUT, "eval_data": PAIRS[:5], "objective": objective}
    for objective in ("dpo", "orpo")
}


class Mine(Exception):
    pass


class Signal(Callback):
    def step(self, record):
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def fail(*rest, **more):
    raise Mine


def run(output, callbacks=(), place=None, rows=ROWS, **changes):
    """The outcome of a run that fails at `place`, in words."""
    model = FakeModel()
    held = trainer.Trainer(model, rows, output=output, callbacks=callbacks, **changes)
    if place == "data":
        held._batch = fail
    if place == "update":
        held._update = fail
    if place == "step":
        plain, calls = model.loss, []

        def loss(*arguments, **settings):
            calls.append(1)
            return fail() if len(calls) == 5 else plain(*arguments, **settings)

        model.loss = loss
    if place == "save":
        held._new_state, build = lambda: breaking(build()), held._new_state
    try:
        report = held.run()
    except BaseException as error:
        return type(error).__name__, getattr(error, "code", None)
    weights = [p.double().sum().item() for p in model.network.parameters()]
    return report.losses, report.eval_losses, weights


def breaking(state):
    state._add_files = fail
    return state


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")

    def tell(name, outcome):
        print(json.dumps([name, outcome]), flush=True)

    tell("straight", run(folder / "straight", **NO_DROPOUT))
    for objective, settings in PREFERENCES.items():
        tell(objective, run(folder / objective, rows=PAIRS, **settings))
    tell("dropout", run(folder / "dropout", **SETTINGS))
    try:
        held = trainer.Trainer(
            FakeModel(), ROWS, output=folder / "half", callbacks=[DieIn(4)], **SETTINGS
        )
        held.run()
    except Exception as error:
        tell("died", type(error).__name__)
    tell("resumed", run(folder / "half", resume=True, **SETTINGS))
    tell("signal", run(folder / "signal", [Signal()], **SETTINGS))
    for place in ("data", "step", "update", "save"):
        for failing in (0, 1):
            at = place if rank == failing else None
            tell(f"{place} {failing}", run(folder / f"{place}-{failing}", place=at, **SETTINGS))
    dist.barrier()  # gloo may abort where its peer is gone before it has said good-bye
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
