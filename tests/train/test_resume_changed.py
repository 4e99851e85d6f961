"""What an allowed change, or a shorter run, comes to on resume."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sloth.data.dataset import order
from sloth.train import checkpoint
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import SETTINGS, DieIn, Stopped, train


@pytest.mark.parametrize("is_old", [False, True])
def test_steps_of_another_size_go_on_with_the_rows_that_were_not_read(tmp_path, is_old):
    """And a second resume goes on from there. An older checkpoint does not say how many it read."""
    train(tmp_path / "run", stop_after=2)
    if is_old:
        source = tmp_path / "run" / "step-000002"
        state = checkpoint.read_state(source)
        del state["progress"]["rows_read"]
        tensors = {n: checkpoint.read_tensors(source, n) for n in ("trainable", "optimizer", "rng")}
        checkpoint.write_checkpoint(source.parent, 2, tensors, state)
    settings = {**SETTINGS, "grad_accum": 2, "allow_change": ["grad_accum"], "resume": True}
    settings["output"] = tmp_path / "run"
    read = [order(11, 0, place // 11)[place % 11] for place in range(12, 28)]
    for callbacks in ([DieIn(4)], []):
        trainer = Trainer(FakeModel(), ROWS, callbacks=callbacks, **settings)
        trainer.dry_run()
        assert sum(map(trainer.plan.rows, range(2 if callbacks else 3, 6)), []) == (
            read if callbacks else read[4:]
        )
        with pytest.raises(Stopped) if callbacks else nullcontext():
            trainer.run()
    assert trainer.progress.rows_read == 28 and trainer.progress.step == 6


@pytest.mark.parametrize("act", ["run", "dry_run"])
def test_a_run_that_is_finished_beyond_the_settings_is_not_published_anew(tmp_path, act):
    settings = {**SETTINGS, "schedule": "constant", "output": tmp_path / "run"}
    Trainer(FakeModel(), ROWS, **settings).run()
    settings |= {"max_steps": 2, "resume": True}
    with pytest.raises(ValueError, match="finished beyond these settings: it has done 6 steps, a"):
        getattr(Trainer(FakeModel(), ROWS, **settings), act)()


def test_another_optimizer_begins_its_moments_anew(tmp_path, monkeypatch, capsys):
    """The library's 8-bit one keeps its own under other names."""
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=EightBit))
    monkeypatch.setattr("sloth.train.optim.eight_bit_library", lambda: library)
    monkeypatch.setattr("sloth.train.run.eight_bit_library", lambda: library)
    for name, after in (("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")):
        train(tmp_path / name, stop_after=2, optimizer=name)
        _, report = train(tmp_path / name, resume=True, optimizer=after, allow_change=["optimizer"])
        assert "optimizer's moments, which begin anew" in capsys.readouterr().out
        assert len(report.losses) == 6 and all(map(math.isfinite, report.losses))


class EightBit(torch.optim.Optimizer):
    """Holds what bitsandbytes' does, by its names, and nothing else."""

    def __init__(self, groups, min_8bit_size, **settings):
        super().__init__(groups, settings)

    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            fresh = {"step": 0, "state1": torch.zeros_like(parameter)}
            state = self.state[parameter] or fresh
            assert state.keys() == fresh.keys()
            state["step"] += 1
            state["state1"].lerp_(parameter.grad, 0.1)
            parameter.data.sub_(0.01 * state["state1"])
            self.state[parameter] = state
