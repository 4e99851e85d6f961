"""Resume is bitwise the uninterrupted run, and a changed setting is refused or allowed by name."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sloth.lora_config import LoraConfig
from sloth.train import checkpoint
from sloth.train.identity import Identity, refuse_changes
from sloth.train.trainer import Trainer
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import ROOT, SETTINGS, metrics, same, train, weights

# bf16 puts masters between the parameters and the optimizer.
KINDS = {
    "adapter": {},
    "noisy": {"neftune": 5.0, "lora_plus": 4.0},
    "packed": {"packing": True, "max_length": 120},
    "full": {"lora": None},
    "bf16": {"lora": None, "embedding_lr": 0.005},
}


def fresh(kind):
    model = FakeModel()
    model.network.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_resume_from_any_step_is_bitwise_the_uninterrupted_run(tmp_path, kind):
    """Row 12: losses, rates, norms, tokens read, weights; 12 steps over 6 epochs of 3 passes each,
    with dropout.
    """
    settings = {"max_steps": 12, **KINDS[kind]}
    straight_model, straight = train(tmp_path / "straight", model=fresh(kind), **settings)
    assert straight.losses[-1] < straight.losses[0]
    passes = SETTINGS["grad_accum"]
    for stop in range(1, 12):
        output = tmp_path / f"stopped-{stop}"
        train(output, stop_after=stop, model=fresh(kind), **settings)
        torch.rand(stop)  # what the process drew since must not matter
        model, report = train(output, resume=True, model=fresh(kind), **settings)
        assert report.losses == straight.losses
        assert (report.tokens, report.trained_tokens) == (straight.tokens, straight.trained_tokens)
        assert model.read == straight_model.read[stop * passes :]
        assert same(weights(model), weights(straight_model))
        assert metrics(output) == metrics(tmp_path / "straight")


def test_evaluations_patience_and_best_step_are_the_same_after_a_resume(tmp_path):
    settings = {
        "max_steps": 12,
        "lr": 0.3,
        "eval_data": ROWS[:4],
        "eval_steps": 1,
        "patience": 3,
        "load_best": True,
    }
    model, straight = train(tmp_path / "straight", **settings)
    assert straight.stopped_early and straight.best_step is not None
    for stop in range(1, len(straight.losses)):
        output = tmp_path / f"stopped-{stop}"
        train(output, stop_after=stop, **settings)
        again, report = train(output, resume=True, **settings)
        assert report.eval_losses == straight.eval_losses
        assert report.best_step == straight.best_step and report.stopped_early
        assert same(weights(again), weights(model))


def test_resume_of_a_finished_run_trains_nothing_more(tmp_path):
    _, first = train(tmp_path / "run")
    model, again = train(tmp_path / "run", resume=True)
    assert again.losses == first.losses and again.paths["adapter"].exists()
    assert again.paths["checkpoint"] == first.paths["checkpoint"]


def test_resume_into_another_output_leaves_the_old_run_alone(tmp_path):
    train(tmp_path / "old", stop_after=3)
    before = sorted(path.name for path in (tmp_path / "old").rglob("*"))
    _, straight = train(tmp_path / "straight")
    _, report = train(tmp_path / "new", resume=tmp_path / "old" / "step-000003")
    assert report.losses == straight.losses
    assert sorted(path.name for path in (tmp_path / "old").rglob("*")) == before
    _, report = train(None, resume=tmp_path / "old")
    assert report.losses == straight.losses and report.paths["output"] == tmp_path / "old"


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    _, straight = train(tmp_path / "straight")
    _, report = train(tmp_path / "fresh", resume=True)
    assert report.losses == straight.losses
    train(tmp_path / "early", stop_after=0)
    _, report = train(tmp_path / "early", resume=True)
    assert report.losses == straight.losses


def test_resume_without_a_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs output"):
        train(None, resume=True)
    with pytest.raises(ValueError, match="no checkpoint there"):
        train(None, resume=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.5}, "lr was 0.02, now 0.5"),
        ({"max_steps": 9}, r"number of steps \(max_steps, epochs\) was 6, now 9"),
        ({"epochs": 2.0}, "number of steps .* was 6, now 4"),
        ({"seed": 4}, "seed was 0, now 4"),
        ({"batch_size": 6, "grad_accum": 1}, "batch_size was 2, now 6; grad_accum was 3, now 1"),
        ({"lora": LoraConfig(r=4, dropout=0.1)}, "lora.dropout was 0.3, now 0.1"),
        ({"lora": None}, "lora.r was 4, now None"),
        ({"schedule": "constant"}, "schedule was 'cosine', now 'constant'"),
    ],
)
def test_changed_settings_are_refused_with_both_values(tmp_path, change, said):
    train(tmp_path / "run", stop_after=2)
    settings = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=said):
        train(tmp_path / "run", resume=True, **change)
    assert (tmp_path / "run" / "config.yaml").read_text() == settings


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"lr": 0.5}, ["lr"]),
        ({"max_steps": 9}, ["max_steps"]),
        ({"epochs": 2.0}, ["epochs"]),
        ({"batch_size": 3, "grad_accum": 2}, ["batch_size", "grad_accum"]),
        ({"lora": LoraConfig(r=4, dropout=0.1)}, ["lora.dropout"]),
    ],
)
def test_a_change_allowed_by_name_is_taken_and_told(tmp_path, change, names, capsys):
    """Row 12: and takes effect; and the name of another setting allows nothing."""
    train(tmp_path / "run", stop_after=2)
    with pytest.raises(ValueError, match=f"allow_change=.*{names[0]}"):
        train(tmp_path / "run", resume=True, allow_change=["clip"], **change)
    _, straight = train(tmp_path / "straight")
    _, report = train(tmp_path / "run", resume=True, allow_change=names, **change)
    assert "allowed to differ from the checkpoint: " in capsys.readouterr().out
    assert report.losses[:2] == straight.losses[:2] and report.losses != straight.losses


@pytest.mark.parametrize(
    "lora, said", [(LoraConfig(r=8), "lora.r was 4, now 8"), (None, "has none")]
)
def test_another_adapter_is_refused_without_advice_that_cannot_work(tmp_path, lora, said):
    train(tmp_path / "run", stop_after=2)
    with pytest.raises(ValueError, match=said) as caught:
        train(tmp_path / "run", resume=True, lora=lora)
    assert "allow_change" not in str(caught.value) and "start a new run" in str(caught.value)


def test_changed_data_is_allowed_by_name(tmp_path):
    train(tmp_path / "run", stop_after=2)
    settings = {**SETTINGS, "output": tmp_path / "run", "resume": True, "allow_change": ["data"]}
    assert len(Trainer(FakeModel(), ROWS[1:], **settings).run().losses) == 6


def test_a_checkpoint_of_an_older_version_had_the_default_of_a_new_setting(tmp_path):
    train(tmp_path / "run", stop_after=2)
    before = read_identity(tmp_path / "run" / "step-000002")
    del before["settings"]["neftune"]
    now = {**before, "settings": {**before["settings"], "neftune": None}}
    assert refuse_changes(Identity(**before), Identity(**now), tmp_path) == []
    now["settings"]["neftune"] = 5.0
    with pytest.raises(ValueError, match="neftune was None, now 5.0"):
        refuse_changes(Identity(**before), Identity(**now), tmp_path)


def read_identity(folder):
    return checkpoint.read_state(folder)["identity"]


def test_going_back_behind_newer_checkpoints_of_the_same_folder_is_refused(tmp_path):
    """The newer ones would win the next time."""
    train(tmp_path / "run", stop_after=4)
    with pytest.raises(ValueError, match="newer checkpoints than step-000003 .step-000004"):
        train(None, resume=tmp_path / "run" / "step-000003")
    with pytest.raises(ValueError, match="newer checkpoints"):
        train(tmp_path / "run", resume=tmp_path / "run" / "step-000003")
    _, report = train(tmp_path / "new", resume=tmp_path / "run" / "step-000003")
    assert len(report.losses) == 6


def test_changed_data_and_base_are_refused(tmp_path):
    train(tmp_path / "run", stop_after=2)
    again = {**SETTINGS, "output": tmp_path / "run", "resume": True}
    with pytest.raises(ValueError, match="data .* was"):
        Trainer(FakeModel(), ROWS[1:], **again).run()
    with pytest.raises(ValueError, match="base weights .* was"):
        Trainer(FakeModel(seed=1), ROWS, **again).run()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model, "level", "ops"), "kernel level was 'reference', now 'ops'"),
        (
            lambda model: setattr(model.network, "base_compute", "fp8"),
            "base_compute was None, now 'fp8'",
        ),
    ],
)
def test_another_way_to_compute_is_refused_or_allowed_by_name(tmp_path, change, said):
    train(tmp_path / "run", stop_after=2)
    model = FakeModel()
    change(model)
    with pytest.raises(ValueError, match=said):
        train(tmp_path / "run", model=model, resume=True)
    allowed = ["level", "base_compute"]
    model = FakeModel()
    change(model)
    _, report = train(tmp_path / "run", model=model, resume=True, allow_change=allowed)
    assert len(report.losses) == 6
    before = Identity(**read_identity(report.paths["checkpoint"]))
    older = replace(before, level=None, base_compute=None, eval_data=None)
    assert refuse_changes(older, before, tmp_path) == []


def test_losses_on_other_held_out_rows_are_no_yardstick(tmp_path, monkeypatch, capsys):
    """Were they kept, the old lowest one would be the best for ever, and patience would run out."""
    settings = {"eval_steps": 1, "patience": 3, "load_best": True}
    losses = iter([0.1, 0.2, 0.3, 5.0, 4.0, 4.5, 4.0])
    monkeypatch.setattr("sloth.train.held_out.summed", lambda *rest: [next(losses)])
    train(tmp_path / "run", stop_after=2, eval_data=ROWS[:3], **settings)
    _, report = train(tmp_path / "run", resume=True, eval_data=ROWS[3:], **settings)
    assert report.eval_losses == {3: 0.3, 4: 5.0, 5: 4.0, 6: 4.5} and report.best_step == 3
    assert "held-out rows, so the best loss and patience begin anew" in capsys.readouterr().out


def test_what_does_not_change_the_curve_may_change(tmp_path):
    _, straight = train(tmp_path / "straight")
    train(tmp_path / "run", stop_after=2)
    _, report = train(
        tmp_path / "run",
        resume=True,
        save_steps=3,
        eval_data=ROWS[:2],
        eval_steps=2,
        max_bad_steps=2,
    )
    assert report.losses == straight.losses


def test_row_13_a_resumed_run_has_the_rates_of_the_whole_and_no_other_length(tmp_path):
    """Both lengths are named where they differ, however they were given."""
    for schedule in ("linear", "cosine", "wsd"):
        settings = {"schedule": schedule, "max_steps": 16}
        train(tmp_path / f"{schedule} whole", **settings)
        train(tmp_path / schedule, stop_after=13, **settings)
        for changed in ({"max_steps": 18}, {"max_steps": None, "epochs": 1.0}):
            now = 18 if changed["max_steps"] else 2
            said = rf"number of steps \(max_steps, epochs\) was 16, now {now}"
            with pytest.raises(ValueError, match=said):
                train(tmp_path / schedule, resume=True, **{**settings, **changed})
        train(tmp_path / schedule, resume=True, **settings)
        rates = [
            [row["lr"] for row in metrics(tmp_path / n)] for n in (f"{schedule} whole", schedule)
        ]
        assert rates[0] == rates[1] and len(set(rates[0])) > 3
    ratio = {"schedule": "constant", "warmup_steps": 0, "warmup_ratio": 0.5}
    train(tmp_path / "ratio", stop_after=2, **ratio)
    with pytest.raises(ValueError, match="number of steps"):
        train(tmp_path / "ratio", resume=True, max_steps=12, **ratio)


def test_row_13_a_schedule_that_knows_no_end_can_be_extended(tmp_path):
    _, straight = train(tmp_path / "straight", schedule="constant")
    train(tmp_path / "run", schedule="constant", max_steps=3)
    _, report = train(tmp_path / "run", schedule="constant", resume=True)
    assert report.losses == straight.losses


ON_GPU = """
import sys
from pathlib import Path
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import SETTINGS
settings = {**SETTINGS, "save_steps": 3, "deterministic": True}
output = Path(sys.argv[1])
straight = Trainer(FakeModel(device="cuda"), ROWS, output=output, **settings).run()
half = output / "step-000003"
settings |= {"output": output.with_name("b"), "resume": half}
again = Trainer(FakeModel(device="cuda"), ROWS, **settings).run()
assert straight.losses == again.losses, (straight.losses, again.losses)
"""


@pytest.mark.gpu
def test_resume_on_a_gpu_is_bitwise_in_deterministic_mode(tmp_path):
    """In a process of its own: cuBLAS reads its workspace setting once."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    subprocess.run([sys.executable, "-c", ON_GPU, str(tmp_path / "a")], env=environment, check=True)


# A real model in the way that most train: 4-bit base, bf16, the fused level, packed rows.
REAL = """
import sys
from pathlib import Path
import torch
import sloth
from tests.train.fakes import ROWS, FakeTokenizer
from tests.train.runs import DieIn, Stopped, metrics, same, weights
from sloth.train.trainer import Trainer
place, device = Path(sys.argv[1]), sys.argv[2]
num_steps, stops = (6, (1, 2, 5)) if device == "cuda" else (4, (2,))
settings = {
    "max_steps": num_steps, "batch_size": 2, "grad_accum": 3, "lr": 1e-2, "save_steps": 1,
    "packing": True, "max_length": 120, "deterministic": True, "warmup_steps": 2,
    "lora": sloth.LoraConfig(r=4, dropout=0.2),
}
def run(name, stop=None, **changes):
    model = sloth.load(place / "base", quant="nf4", dtype="bfloat16", device=device)
    model._tokenizer = FakeTokenizer()
    callbacks = [] if stop is None else [DieIn(stop + 1)]
    changes |= {**settings, "output": place / name}
    try:
        report = Trainer(model, ROWS, callbacks=callbacks, **changes).run()
    except Stopped:
        return
    assert (model.level, model.dtype, model.is_quantized) == ("fused", torch.bfloat16, True)
    return report.losses, metrics(place / name), weights(model)
losses, lines, held = run("straight")
assert losses[-1] < losses[0] and all("grad_norm" in line and "lr" in line for line in lines)
for stop in stops:
    run(f"half-{stop}", stop)
    torch.rand(stop, device=device)
    again = run(f"half-{stop}", resume=True)
    assert again[0] == losses, (again[0], losses)
    assert again[1] == lines and same(again[2], held)
print("bitwise")
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_row_12_resume_of_a_4_bit_base_in_bf16_at_the_fused_level_is_bitwise(tmp_path, device):
    """Losses, rates, norms, tokens and weights, in deterministic mode; a process of its own, as
    cuBLAS reads its workspace setting once.
    """
    save_tiny_llama(tmp_path / "base", **WHOLE_BLOCKS)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", REAL, str(tmp_path), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("bitwise\n"), done.stderr[-2000:]


def test_deterministic_mode_on_a_gpu_needs_its_environment(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = FakeModel()
    model.device = torch.device("cuda")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        Trainer(model, ROWS, deterministic=True)


def test_a_power_cut_after_a_save_costs_the_log_no_line(tmp_path, monkeypatch):
    """Of the log the disk then holds what was synced, and the checkpoint's steps are not redone."""
    settings = {"eval_data": ROWS[:4], "eval_steps": 4, "save_steps": 2}
    train(tmp_path / "straight", **settings)
    synced, fsync = {}, os.fsync

    def noted(descriptor):
        fsync(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", noted)
    for stop in (2, 4):  # after step 4 with what a look at it gave
        output = tmp_path / f"stopped-{stop}"
        train(output, stop_after=stop, **settings)
        log = output / "metrics.jsonl"
        os.truncate(log, synced.get(log.stat().st_ino, 0))
        train(output, resume=True, **settings)
        assert metrics(output) == metrics(tmp_path / "straight")
