"""One of two processes that train together: `python -m tests.train.rank_script FOLDER [FAILS]`.

Prints a JSON line for each scenario: what rank 0 and rank 1 saw of a run in which one of them fails
somewhere, or neither does. RANK, WORLD_SIZE and the meeting place come from the environment. With
FAILS, runs of a script that knows nothing of process groups.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist

from sloth.data.dataset import load_data
from sloth.errors import SlothError
from sloth.lora_config import LoraConfig
from sloth.train import ranks as ranks_module
from sloth.train import trainer
from sloth.train.accumulate import Accumulator
from sloth.train.callbacks import Callback
from sloth.train.objectives import Supervised
from sloth.train.optim import trainable
from sloth.train.ranks import Ranks
from tests.train.fakes import PAIRS, ROWS, FakeModel
from tests.train.runs import SETTINGS, DieIn

NO_DROPOUT = {**SETTINGS, "lora": LoraConfig(r=4), "eval_data": ROWS[:5], "eval_steps": 3}

PREFERENCES = {
    objective: {**NO_DROPOUT, "eval_data": PAIRS[:5], "objective": objective}
    for objective in ("dpo", "orpo")
}


# Rows of an evaluation pass: training's, or those that are given.
LOOKS = {"looks as trained": {}, "looks as given": {"eval_batch_size": 3}}

PLACES = ("data", "step", "update", "save")

GRADIENTS = {"adapter gradients": LoraConfig(r=4), "full gradients": None}


class Mine(Exception):
    pass


class Small(FakeModel):
    """Has memory for one row at a time."""

    def loss(self, tokens, *rest, **more):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().loss(tokens, *rest, **more)


class SmallWhenLooking(FakeModel):
    """Has memory for one held-out row at a time."""

    def loss(self, tokens, *rest, **more):
        if len(tokens) > 1 and not self.network.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().loss(tokens, *rest, **more)


class Signal(Callback):
    def step(self, record):
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def fail(*rest, **more):
    raise Mine


def run(output, callbacks=(), place=None, rows=ROWS, model=None, **changes):
    """The outcome of a run that fails at `place`, in words."""
    model = model or FakeModel()
    try:
        held = trainer.Trainer(model, rows, output=output, callbacks=callbacks, **changes)
    except SlothError as error:
        return type(error).__name__, str(error)
    spoil(held, model, place)
    try:
        report = held.run()
    except BaseException as error:
        return type(error).__name__, getattr(error, "code", None) or str(error)
    weights = [p.double().sum().item() for p in model.network.parameters()]
    return report.losses, report.eval_losses, weights


def spoil(held, model, place):
    """Make a run fail there."""
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


def breaking(state):
    state._add_files = fail
    return state


def gradients(ranks, lora):
    """What a step of all rows leaves in each parameter, by name, and the exchanges it took."""
    model = FakeModel()
    if lora is not None:
        torch.manual_seed(0)
        model.add_lora(lora)
        torch.nn.init.normal_(model.network.q_proj.lora_B.weight)  # of zeros, A had no gradient
    data = load_data(ROWS, model.tokenizer, 2048)
    accumulator = Accumulator(
        ranks=ranks,
        batch_of=lambda rows: data.batch(rows, 1),
        objective=Supervised(model),
        forget=model.network.zero_grad,
        notice=print,
        rows_per_pass=2,
    )
    accumulator.step(range(len(ROWS)))
    parameters = trainable(model.network)
    parameters["of one rank"] = torch.nn.Parameter(torch.zeros(3))
    if ranks.is_first:
        parameters["of one rank"].grad = torch.ones(3)
    parameters["of none"] = torch.nn.Parameter(torch.zeros(2))
    counted, plain = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **more: (counted.append(1), plain(tensor))[1]
    ranks.add_gradients(parameters.values())
    dist.all_reduce = plain
    found = {n: p.grad if p.grad is None else p.grad.tolist() for n, p in parameters.items()}
    return found, len(counted)


def tell(name, outcome):
    print(json.dumps([name, outcome]), flush=True)


def in_its_own_process(folder, place, fails):
    """How a process ends in which nothing catches what the run raises, by its exit status."""
    child = os.fork()
    if child:
        tell(f"exit {place}", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return
    model = FakeModel()
    held = trainer.Trainer(model, ROWS, output=folder, **SETTINGS)
    spoil(held, model, place if fails else None)
    held.run()
    sys.exit()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    import_module("torch._dynamo")  # as every optimizer does: once, before the forks
    for place in PLACES if hasattr(os, "fork") else ():
        failing = 0 if place == "save" else 1  # rank 0 alone saves
        in_its_own_process(folder / f"exit-{place}", place, rank == failing)
    dist.init_process_group("gloo")
    ranks = Ranks(torch.device("cpu"), rank, 2)
    for name, lora in GRADIENTS.items():
        tell(name, gradients(ranks, lora))
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
    model = FakeModel if rank else Small
    tell("small", run(folder / "small", model=model(), **SETTINGS))
    half = {"output": folder / "small half", "model": model()}
    tell("small died", run(callbacks=[DieIn(4)], **half, **SETTINGS))
    half["model"] = model()
    tell("small resumed", run(resume=True, **half, **SETTINGS))
    if not rank:
        os.environ["WORLD_SIZE"] = "1"
        run(folder / "grown", callbacks=[DieIn(4)], **SETTINGS)
        os.environ["WORLD_SIZE"] = "2"
    dist.barrier()
    settings = {**SETTINGS, "resume": True, "allow_change": ["ranks"]}
    tell("grown", run(folder / "grown", **settings))
    for name, rows in LOOKS.items():
        model = SmallWhenLooking() if rank else FakeModel()
        settings = {**NO_DROPOUT, "batch_size": 4, "eval_data": ROWS, "max_steps": 3, **rows}
        with redirect_stdout(StringIO()) as said:
            seen = run(folder / name, model=model, **settings)
        tell(name, [seen, said.getvalue()])
    tell("signal", run(folder / "signal", [Signal()], **SETTINGS))
    for place in PLACES:
        for failing in (0, 1):
            at = place if rank == failing else None
            tell(f"{place} {failing}", run(folder / f"{place}-{failing}", place=at, **SETTINGS))
    other = FakeModel().add_lora(SETTINGS["lora"])
    with torch.no_grad():
        other.network.q_proj.lora_B.weight.fill_(1.0)
    spoilt = {
        "other data": {"rows": ROWS[1:]},
        "no data": {"rows": folder / "none.jsonl"},
        "other base": {"model": FakeModel(seed=1)},
        "other settings": {"lr": 0.5},
        "other weights": {"model": other},
    }
    for name, mine in spoilt.items():
        own = mine if rank else {}
        tell(name, run(folder / name, **{**SETTINGS, **own}))
    dist.barrier()  # gloo may abort where its peer is gone before it has said good-bye
    dist.destroy_process_group()


def scripted(folder: Path, fails: str) -> None:
    """A run of a script, which leaves meeting and leaving to the trainer; the second fails."""
    torch.set_num_threads(1)
    is_second = os.environ["RANK"] == "1"
    if fails == "before" and is_second:
        sys.exit("never came")
    if fails == "before":
        ranks_module.MEETING_S = 3
    for name in ("first", "again"):
        rows = folder / "none.jsonl" if fails == name and is_second else ROWS
        trainer.Trainer(FakeModel(), rows, output=folder / name, **SETTINGS).run()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        scripted(Path(sys.argv[1]), sys.argv[2])
