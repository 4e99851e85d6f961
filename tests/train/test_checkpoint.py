"""Resume is bitwise, damage is seen, changed settings are refused, a kill loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sloth.errors import CheckpointMismatch
from sloth.lora_config import LoraConfig
from sloth.train import checkpoint
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


def train(output, stop_after=None, **changes):
    """Run on a fresh model; stop_after steps, die as a crash would."""
    model = FakeModel()
    trainer = Trainer(model, ROWS, output=output, **{**SETTINGS, **changes})
    if stop_after is not None:
        record = trainer._record

        def dying(step, *rest):
            if step == stop_after:
                raise Stopped
            return record(step, *rest)

        trainer._record = dying
        with pytest.raises(Stopped):
            trainer.run()
        return model, None
    return model, trainer.run()


def weights(model):
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def metrics(output):
    """Step lines less what a clock or the memory says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    noise = ("seconds", "tokens_per_second", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in noise} for row in rows]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [SETTINGS["lora"], None], ids=["adapter", "full"])
def test_resume_from_any_step_is_bitwise_the_uninterrupted_run(tmp_path, lora):
    straight_model, straight = train(tmp_path / "straight", lora=lora)
    for stop in range(1, 6):
        output = tmp_path / f"stopped-{stop}"
        train(output, stop_after=stop, lora=lora)
        torch.rand(stop)  # what the process drew since must not matter
        model, report = train(output, resume=True, lora=lora)
        assert report.losses == straight.losses
        assert (report.tokens, report.trained_tokens) == (straight.tokens, straight.trained_tokens)
        assert same(weights(model), weights(straight_model))
        assert metrics(output) == metrics(tmp_path / "straight")


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


def test_changed_data_and_base_are_refused(tmp_path):
    train(tmp_path / "run", stop_after=2)
    again = {**SETTINGS, "output": tmp_path / "run", "resume": True}
    with pytest.raises(ValueError, match="data .* was"):
        Trainer(FakeModel(), ROWS[1:], **again).run()
    with pytest.raises(ValueError, match="base weights .* was"):
        Trainer(FakeModel(seed=1), ROWS, **again).run()


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


def test_constant_schedule_can_be_extended(tmp_path):
    _, straight = train(tmp_path / "straight", schedule="constant")
    train(tmp_path / "run", schedule="constant", max_steps=3)
    _, report = train(tmp_path / "run", schedule="constant", resume=True)
    assert report.losses == straight.losses


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    _, straight = train(tmp_path / "straight")
    output = tmp_path / "run"
    train(output, stop_after=4)
    newest = output / "step-000004"
    file = newest / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(raw[:-1] if damage == "cut" else raw)
    assert not checkpoint.is_good(newest)
    assert checkpoint.newest_good(output) == output / "step-000003"
    _, report = train(output, resume=True)
    assert report.losses == straight.losses and checkpoint.is_good(newest.with_name("step-000006"))


def test_no_good_checkpoint_among_some_is_an_error(tmp_path):
    train(tmp_path / "run", stop_after=2)
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointMismatch, match="step-000002, step-000001"):
        train(tmp_path / "run", resume=True)


def test_two_good_checkpoints_are_kept_and_litter_is_removed(tmp_path):
    output = tmp_path / "run"
    train(output, stop_after=4)
    assert sorted(p.name for p in output.glob("step-*")) == ["step-000003", "step-000004"]
    litter = output / "step-000005.tmp-1"
    shutil.copytree(output / "step-000004", litter)
    (output / "step-000004" / "state.json").write_text("{}")
    train(output, stop_after=5, resume=True)
    assert not litter.exists()
    good = [folder.name for folder in checkpoint.checkpoints(output) if checkpoint.is_good(folder)]
    assert good == ["step-000005", "step-000004"]


def test_failed_write_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    output = tmp_path / "run"

    def full(tensors, path):
        path.write_bytes(b"half")
        if "step-000003" in str(path):
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(output)
    assert [p.name for p in checkpoint.checkpoints(output)] == ["step-000002", "step-000001"]
    assert all(checkpoint.is_good(folder) for folder in checkpoint.checkpoints(output))
    assert not list(output.glob("*.tmp-*"))


def test_checkpoint_files_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        train(tmp_path / "run", stop_after=1)
    finally:
        os.umask(mask)
    files = list((tmp_path / "run" / "step-000001").iterdir())
    assert {file.name for file in files} == {
        *("trainable.safetensors", "optimizer.safetensors", "rng.safetensors"),
        *("state.json", "manifest.json"),
    }
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


ON_GPU = """
import sys
from pathlib import Path
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.test_checkpoint import SETTINGS
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


def test_deterministic_mode_on_a_gpu_needs_its_environment(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = FakeModel()
    model.device = torch.device("cuda")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        Trainer(model, ROWS, deterministic=True)


KILLED = """
import sys
from pathlib import Path
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.test_checkpoint import SETTINGS
resume = Path(sys.argv[1]).exists()
settings = {**SETTINGS, "max_steps": 300, "output": Path(sys.argv[1]), "resume": resume}
Trainer(FakeModel(), ROWS, **settings).run()
"""


def test_sigkill_while_saving_every_step_resumes_to_the_identical_curve(tmp_path):
    """Most of a tiny step is its save, so these kills mostly fall inside one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "killed"
    reached = 0
    for delay_s in (0.0, 0.013, 0.029):
        command = [sys.executable, "-c", KILLED, str(output)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            newest = [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(output)]
            if newest and newest[0] > reached + 3:
                break
            time.sleep(0.002)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = checkpoint.newest_good(output)
        assert found is not None and checkpoint.step_of(found) > reached
        reached = checkpoint.step_of(found)
    _, report = train(output, resume=True, max_steps=300)
    _, straight = train(tmp_path / "straight", max_steps=300, save_steps=None)
    assert 0 < reached < 300
    assert report.losses == straight.losses
