"""Checkpoints are whole or absent, damage is seen, a full disk costs no run."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sloth import cli
from sloth.errors import CheckpointMismatch, NonFiniteGradients, SaveFailed
from sloth.train import checkpoint, held_out, saving
from sloth.train.trainer import Trainer
from tests.commands.models import save_texts, save_tiny_model
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import ROOT, SETTINGS, train


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, capsys):
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
    capsys.readouterr()
    _, report = train(output, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    named = "" if damage == "manifest" else file.name
    assert f"WARNING: step-000004 is damaged and passed over: {named}" in said
    assert report.losses == straight.losses and checkpoint.is_good(newest.with_name("step-000006"))


def test_no_good_checkpoint_among_some_is_an_error(tmp_path):
    train(tmp_path / "run", stop_after=2)
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(
        CheckpointMismatch, match=r"step-000002: state\.json has another.*another output"
    ):
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


# In some steps the process may not write past a file's first 700 bytes: no weights, no metrics.
DISK_FULL = """
import resource, sys
from pathlib import Path
from sloth.train.callbacks import Callback
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import SETTINGS


class Fill(Callback):
    def step(self, record):
        limit = {limits}.get(record.step)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


settings = {{**SETTINGS, "output": Path(sys.argv[1])}}
Trainer(FakeModel(), ROWS, callbacks=[Fill()], **settings).run()
print("finished")
"""


def run_script(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_disk_that_fills_up_costs_no_step_and_a_later_save_succeeds(tmp_path):
    """Row 14, with the errors of the real system: writes fail in steps 3 and 4."""
    output = tmp_path / "run"
    done = run_script(DISK_FULL.format(limits="{3: 700, 5: 2**30}"), output)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    assert "WARNING: step 3 could not be saved: File too large" in done.stdout
    assert "step-000002, is good" in done.stdout
    _, straight = train(tmp_path / "straight")
    state = checkpoint.read_state(output / "step-000006")
    assert state["progress"]["losses"] == straight.losses
    good = [folder.name for folder in checkpoint.checkpoints(output) if checkpoint.is_good(folder)]
    assert good == ["step-000006", "step-000005"]
    assert not list(output.glob("*.tmp-*")) and not list(output.glob("weights-*"))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == straight.losses


def test_weights_alone_are_rescued_when_only_they_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.Saver, "require_room", lambda *rest: None)
    write = checkpoint.write_tensors

    def full(file, tensors):
        if file.name == "optimizer.safetensors" and "step-000002" not in str(file):
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(SaveFailed, match="step 6 could not be saved: No space left.*no checkpoint"):
        train(tmp_path / "run", save_steps=3)
    (rescued,) = (tmp_path / "run").glob("weights-*")
    assert rescued.name == "weights-000006" and checkpoint.is_good(rescued)
    weights = checkpoint.read_tensors(rescued, "trainable")
    assert set(weights) == {"q_proj.lora_A.weight", "q_proj.lora_B.weight"}
    assert (tmp_path / "run" / "adapter").is_dir()  # published all the same
    assert checkpoint.newest_good(tmp_path / "run") is None


def test_a_run_whose_last_save_fails_finishes_and_then_says_so(tmp_path, monkeypatch):
    write = checkpoint.write_tensors

    def full(file, tensors):
        if "000005" in str(file) or "000006" in str(file):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    output = tmp_path / "run"
    with pytest.raises(SaveFailed, match="step 6 could not be saved.*step-000004, is good"):
        train(output)
    assert [p.name for p in checkpoint.checkpoints(output)] == ["step-000004", "step-000003"]
    assert all(checkpoint.is_good(folder) for folder in checkpoint.checkpoints(output))
    assert not list(output.glob("*.tmp-*"))
    monkeypatch.undo()
    _, report = train(output, resume=True)
    assert report.losses == train(tmp_path / "straight")[1].losses


def test_the_command_of_a_run_whose_last_save_fails_does_not_end_in_success(
    tmp_path, monkeypatch, capsys
):
    base, data = save_tiny_model(tmp_path / "base"), save_texts(tmp_path / "rows.jsonl")
    write = checkpoint.write_tensors

    def full(file, tensors):
        if "000002" in str(file):
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    output = tmp_path / "run"
    command = ["train", str(base), str(data), "--device", "cpu", "--output", str(output)]
    code = cli.main([*command, "--max-steps", "2", "--save-steps", "1", "--lora.r", "2"])
    said = capsys.readouterr().err
    assert code == cli.USAGE_ERROR != 0
    assert "error: step 2 could not be saved: No space left" in said and "step-000001, is" in said
    assert (output / "adapter").is_dir()  # all the same


def test_a_checkpoint_is_synced_whole_before_its_name_is_there(tmp_path, monkeypatch):
    """Else a power cut leaves the name and not the bytes. Each file as large as it will be."""
    happened, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def synced(descriptor):
        found = os.fstat(descriptor)
        is_file = stat.S_ISREG(found.st_mode)
        happened.append((found.st_ino, found.st_size if is_file else None))
        fsync(descriptor)

    def named(move):
        return lambda source, target: (happened.append(Path(target)), move(source, target))[1]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named(rename))
    monkeypatch.setattr(os, "replace", named(replace))

    def add_files(folder):
        (folder / "deeper").mkdir()
        (folder / "deeper" / "tokenizer.txt").write_text("characters")

    tensors = {"trainable": {"a": torch.ones(300)}, "rng": {"b": torch.ones(2)}}
    folder = checkpoint.write_checkpoint(tmp_path, 1, tensors, {"step": 1}, add_files)
    moved = happened.index(folder)
    held = [folder, *folder.rglob("*")]
    sizes = {(p.stat().st_ino, p.stat().st_size if p.is_file() else None) for p in held}
    assert len(sizes) == 7 and sizes <= set(happened[:moved])
    assert (tmp_path.stat().st_ino, None) in happened[moved:]
    happened.clear()
    checkpoint.write_evaluation(folder, {"step": 1})
    written = (folder / "looked.json").stat()
    assert happened == [(written.st_ino, written.st_size), folder / "looked.json"]


def free_space(monkeypatch, *values):
    """What the disk says it has, look by look; the last value stays."""
    left = list(values)

    def usage(path):
        free = left.pop(0) if len(left) > 1 else left[0]
        return SimpleNamespace(free=free)

    monkeypatch.setattr(saving.shutil, "disk_usage", usage)


def test_a_run_does_not_start_without_room_for_its_checkpoints(tmp_path, monkeypatch):
    free_space(monkeypatch, 5000)
    with pytest.raises(SaveFailed, match="0.0 MiB free, and this run needs 0.8 MiB: up to 3 check"):
        train(tmp_path / "run")
    held_out = {"eval_data": ROWS[:3], "eval_steps": 1}
    with pytest.raises(SaveFailed, match="up to 4 checkpoints of 0.3 MiB at once, of which 0.0"):
        train(tmp_path / "run", **held_out)
    for settings in ({"save_steps": None}, {"save_steps": 6}):
        with pytest.raises(SaveFailed, match="this run needs 0.3 MiB: up to 1 checkpoints"):
            train(tmp_path / "run", **settings)
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_killed_run_goes_on_where_it_would_have_finished(tmp_path, monkeypatch):
    """Its checkpoints fill the disk but for the next one's room; at its end, they may wholly."""
    output = tmp_path / "run"
    train(output, stop_after=3)
    mib = 2**20

    def usage(path):
        held = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        return SimpleNamespace(free=int(0.8 * mib) - held)

    def dry_run():
        return Trainer(FakeModel(), ROWS, output=output, resume=True, **SETTINGS).dry_run()

    padding = output / "step-000003" / "padding"  # what a tokenizer takes, say
    padding.write_bytes(bytes(int(0.4 * mib)))
    monkeypatch.setattr(saving.shutil, "disk_usage", usage)
    dry_run()
    assert len(train(output, resume=True)[1].losses) == 6
    free_space(monkeypatch, 0)
    dry_run()


def test_room_is_looked_at_before_each_save(tmp_path, monkeypatch, capsys):
    free_space(monkeypatch, 2**30, 2**30, 100, 100, 2**30)  # start, step 1, step 2 and its rescue
    _, report = train(tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "step 2 could not be saved: it takes" in said
    assert report.paths["checkpoint"].name == "step-000006"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Row 3: a finite gradient and an absurd rate make them so."""
    with pytest.raises(NonFiniteGradients, match="weights hold NaN or infinity after step 1"):
        train(tmp_path / "run", lr=1e38, weight_decay=1e38, warmup_steps=0)
    assert not list((tmp_path / "run").glob("step-*"))


def test_best_checkpoint_is_kept_beside_the_newest_two(tmp_path, monkeypatch):
    losses = iter([5.0, 2.0, 3.0, 2.0, math.nan, 4.0])
    monkeypatch.setattr(held_out, "summed", lambda *rest: [next(losses)])
    _, report = train(tmp_path / "run", eval_data=ROWS[:4], eval_steps=1)
    assert report.best_step == 2
    found = [folder.name for folder in checkpoint.checkpoints(tmp_path / "run")]
    assert found == ["step-000006", "step-000005", "step-000002"]


def test_pruning_never_leaves_fewer_than_two_good_ones(tmp_path):
    """A kept one that rots afterwards does not count."""
    output = tmp_path / "run"
    train(output, stop_after=3)
    (output / "step-000003" / "rng.safetensors").write_bytes(b"rotten")
    state = checkpoint.read_state(output / "step-000002")
    tensors = {"trainable": {"a": torch.ones(3)}}
    checkpoint.write_checkpoint(output, 4, tensors, state)
    found = [folder.name for folder in checkpoint.checkpoints(output)]
    assert found == ["step-000004", "step-000003", "step-000002"]
    good = [checkpoint.is_good(output / name) for name in found]
    assert good == [True, False, True]


def test_a_manifest_that_points_outside_is_not_good(tmp_path):
    train(tmp_path / "run", stop_after=1)
    folder = tmp_path / "run" / "step-000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    outside = tmp_path / "run" / "secret"
    outside.write_text("x")
    manifest["../secret"] = checkpoint._identity(outside)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not checkpoint.is_good(folder)


def test_tensor_files_read_back_with_the_library_bit_for_bit(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(5, 3).bfloat16(),
        "transposed": torch.randn(3, 7, dtype=torch.float64).T,
        "flags": torch.tensor([True, False]),
    }
    identity = checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
    assert identity == checkpoint._identity(tmp_path / "x.safetensors")
    back = checkpoint.read_tensors(tmp_path, "x")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_checkpoint_files_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        train(tmp_path / "run", stop_after=1)
    finally:
        os.umask(mask)
    files = list((tmp_path / "run" / "step-000001").iterdir())
    assert {file.name for file in files} == {
        *("trainable.safetensors", "optimizer.safetensors", "rng.safetensors"),
        *("state.json", "manifest.json", "config.yaml", "tokenizer.txt"),
    }
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
