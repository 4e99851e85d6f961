"""Runs on the fake model that die where a test says, and what can be compared of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sloth.lora_config import LoraConfig
from sloth.train.callbacks import Callback
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel

# 6 steps of 6 rows over 11 rows: three epoch ends fall inside, one inside a step.
SETTINGS = {
    "max_steps": 6,
    "batch_size": 2,
    "grad_accum": 3,
    "lr": 0.02,
    "save_steps": 1,
    "schedule": "cosine",
    "warmup_steps": 2,
    "lora": LoraConfig(r=4, dropout=0.3),
}


ROOT = Path(__file__).parents[2]


class Stopped(Exception):
    pass


class DieIn(Callback):
    """Ends a run as a crash would, after the update of a step and before its save."""

    def __init__(self, step):
        self.dies_in = step

    def step(self, record):
        if record.step == self.dies_in:
            raise Stopped


def train(output, stop_after=None, model=None, **changes):
    """Run on a fresh model; after stop_after steps, die. model.read: the tokens of each pass."""
    model = model or FakeModel()
    model.read, loss = [], model.loss

    def reading(tokens, *args, **kwargs):
        model.read.append(tokens.tolist())
        return loss(tokens, *args, **kwargs)

    model.loss = reading
    callbacks = [] if stop_after is None else [DieIn(stop_after + 1)]
    trainer = Trainer(model, ROWS, output=output, callbacks=callbacks, **{**SETTINGS, **changes})
    if stop_after is None:
        return model, trainer.run()
    with pytest.raises(Stopped):
        trainer.run()
    return model, None


def weights(model):
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def metrics(output):
    """Step lines less what a clock or the memory says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    noise = ("seconds", "tokens_per_second", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in noise} for row in rows]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
