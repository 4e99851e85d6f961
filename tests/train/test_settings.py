"""Row 21: every setting takes effect or is refused, and the plan of a dry run shows what counts."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sloth.data.rows import MissingColumn
from sloth.errors import KernelUnavailable, NonFiniteGradients, SlothError
from sloth.lora_config import LoraConfig
from sloth.train import evaluate
from sloth.train.checkpoint import read_tensors
from sloth.train.config import TrainConfig
from sloth.train.trainer import Trainer
from tests.train.fakes import PAIRS, ROWS, FakeModel
from tests.train.test_callbacks import Library

BASE = {"max_steps": 4, "batch_size": 2, "grad_accum": 2, "save_steps": 2, "eval_steps": 2}
CHANGES = {
    "output": None,
    "max_steps": 3,
    "epochs": 0.5,
    "batch_size": 1,
    "grad_accum": 1,
    "max_length": 30,
    "on_long": "drop",
    "packing": True,
    "train_on": "everything",
    "columns": {"messages": "absent"},
    "skip_bad": True,
    "objective": "dpo",
    "beta": 0.5,
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 2,
    "warmup_ratio": 0.5,
    "weight_decay": 0.9,
    "clip": 0.01,
    "seed": 1,
    "eval_data": ROWS[3:],
    "val_set_size": 3,
    "eval_batch_size": 1,
    "eval_steps": 3,
    "patience": 1,
    "load_best": True,
    "sample_prompts": ["hi"],
    "sample_tokens": 3,
    "save_steps": 3,
    "lora": LoraConfig(r=2),
    "optimizer": "adamw_8bit",
    "embedding_lr": 1e-3,
    "lora_plus": 4.0,
    "neftune": 5.0,
    "max_bad_steps": 1,
    "memory_gib": 1.0,
    "deterministic": True,
    "trackers": ["wandb"],
    "project": "orders",
    "allow_change": ["lr"],
    "resume": True,
    "quant": "nf4",
}
PREFERENCE = {"rows": PAIRS, "eval_data": PAIRS[:3], "lora": LoraConfig(r=2)}
# What a setting needs beside it to mean anything.
BESIDE = {
    "on_long": {"max_length": 40},
    "skip_bad": {"rows": [*ROWS, {"text": 3}]},
    "objective": {**PREFERENCE, "objective": "orpo"},
    "beta": {**PREFERENCE, "objective": "dpo"},
    "val_set_size": {"eval_data": None, "eval_steps": None},
    "load_best": {"lr": 5.0, "warmup_steps": 4, "eval_steps": 1},
    "patience": {"lr": 5.0, "warmup_steps": 4, "eval_steps": 1},
    "sample_tokens": {"sample_prompts": ["hi"]},
    "lora_plus": {"lora": LoraConfig(r=2)},
    "project": {"trackers": ["wandb"]},
    "max_bad_steps": {"is_poisoned": True},
    "resume": {"is_finished": True},
    "allow_change": {"is_finished": True, "resume": True, "lr": 2e-2},
}


def test_every_field_is_changed_below():
    assert set(CHANGES) == set(TrainConfig.model_fields), "give a new setting a change to try"


def outcome(folder, monkeypatch, is_finished=False, is_poisoned=False, rows=ROWS, **changes):
    """Everything a run shows: losses, rates, weights, evaluations, files; or how it was refused."""
    folder.parent.mkdir()
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(evaluate, "generate_tokens", lambda n, ids, count, s: [[40]] * count)
    library = Library("wandb")
    monkeypatch.setitem(sys.modules, "wandb", library)
    model = FakeModel()
    plain, modes, passes = model.loss, set(), []

    def loss(tokens, *args, **kwargs):
        modes.add(torch.are_deterministic_algorithms_enabled())
        passes.append((model.network.training, len(tokens)))
        return plain(tokens, *args, **kwargs) * (float("inf") if is_poisoned else 1)

    model.loss = loss
    settings = {**BASE, "output": folder, "lr": 1e-2, "eval_data": ROWS[:3]}
    if is_finished:
        Trainer(FakeModel(), ROWS, **settings).run()
    try:
        report = Trainer(model, rows, **{**settings, **changes}).run()
    except (SlothError, ValueError) as error:
        return {"refused": type(error).__name__}
    folder = report.paths["output"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    noise = ("seconds", "tokens_per_second", "memory_bytes")
    rows = [{k: v for k, v in json.loads(line).items() if k not in noise} for line in lines]
    return {
        "place": folder.relative_to(folder.parent.parent).parts[0],
        "metrics": rows,
        "saved": sorted(path.name for path in folder.glob("step-*")),
        "weights": [p.double().sum().item() for p in model.network.parameters()],
        "moments": sorted(read_tensors(report.paths["checkpoint"], "optimizer")),
        "modes": modes,
        "passes": passes,
        "tracked": [kwargs["project"] for name, _, kwargs in library.calls if name == "init"],
    }


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_a_run_or_is_refused(name, tmp_path, monkeypatch):
    beside = BESIDE.get(name, {})
    before = outcome(tmp_path / "x" / "run", monkeypatch, **beside)
    after = outcome(tmp_path / "y" / "run", monkeypatch, **{**beside, name: CHANGES[name]})
    if name == "output":
        assert (before["place"], after["place"]) == ("x", "runs")
        return
    assert {**before, "place": ""} != {**after, "place": ""}
    refused = {
        "quant": "ValueError",
        "columns": MissingColumn.__name__,
        "max_bad_steps": NonFiniteGradients.__name__,
        "memory_gib": "KernelUnavailable",  # below the fused level, as on this fake
    }
    assert after.get("refused") == refused.get(name)


def test_same_settings_give_the_same_run(tmp_path, monkeypatch):
    before = outcome(tmp_path / "x" / "run", monkeypatch)
    after = outcome(tmp_path / "y" / "run", monkeypatch)
    assert {**before, "place": ""} == {**after, "place": ""}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 2, "warmup_ratio": 0.5}, "both say how long the warm-up is"),
        ({"eval_batch_size": 2}, "eval_batch_size=2 has no effect without held-out rows"),
        ({"patience": 2, "eval_steps": 1}, "patience=2 has no effect without held-out rows"),
        ({"load_best": True}, "load_best=True has no effect without held-out rows"),
        ({"eval_steps": 2}, "eval_steps=2 has no effect .*valid split of the data, or sample_p"),
        ({"memory_gib": 1.0}, "memory_gib"),
    ],
)
@pytest.mark.parametrize("act", ["run", "dry_run"])
def test_a_setting_without_effect_is_refused(tmp_path, settings, said, act):
    error = KernelUnavailable if "memory_gib" in settings else ValueError
    with pytest.raises(error, match=said):
        getattr(Trainer(FakeModel(), ROWS, output=tmp_path / "run", **settings), act)()
    assert not list(tmp_path.glob("run/step-*"))


# -- dry run ---------------------------------------------------------------------------------------


def test_dry_run_tells_rows_steps_and_level_and_leaves_nothing(tmp_path):
    model = FakeModel()
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    plan = Trainer(
        model,
        ROWS,
        output=tmp_path / "run",
        epochs=2,
        batch_size=2,
        grad_accum=3,
        eval_data=ROWS[:2],
        eval_steps=2,
        lora=LoraConfig(r=2),
        lora_plus=16,
    ).dry_run()
    assert plan["kernel level"] == "reference: it is a fake"
    assert plan["data"].startswith("11 rows (11 messages): 11 examples, 557 tokens")
    assert plan["steps"] == "4 of 6 rows (2 a pass, 3 passes), 2 epochs"
    assert plan["adapter"].startswith("attached LoRA r=2")
    assert plan["trained"].startswith("64 parameters")
    assert "lora_B 0.0032, other 0.0002" in plan["optimizer"]
    assert plan["evaluation"].startswith("each 2 steps and at the end: 2 rows")
    assert not (tmp_path / "run").exists()
    for name, parameter in model.network.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    "settings", [{"embedding_lr": 0.1, "lora": LoraConfig()}, {"lora_plus": 2.0}]
)
def test_dry_run_refuses_what_a_run_would(settings, tmp_path):
    for act in ("dry_run", "run"):
        with pytest.raises(ValueError, match="has no effect"):
            getattr(Trainer(FakeModel(), ROWS, output=tmp_path / act, **settings), act)()
