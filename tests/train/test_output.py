"""The folder of a run: what may be one, what is published there, and what is nobody's to delete."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

from sloth.errors import OutputExists, SaveFailed
from sloth.train import plot
from sloth.train.checkpoint import read_tensors
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import SETTINGS, Stopped, same, train, weights


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def foreign(output):
    """A folder that is somebody's."""
    output.mkdir()
    (output / "thesis.txt").write_text("mine")


def file_beside_the_weights(output):
    train(output)
    (output / "adapter" / "notes.txt").write_text("mine")


def other_weights(output):
    train(output)
    shutil.rmtree(output / "adapter")
    (output / "model").mkdir()
    (output / "model" / "weights.bin").write_text("mine")


def link_in_place_of_the_weights(output):
    train(output)
    shutil.move(output / "adapter", output.parent / "elsewhere")
    (output / "adapter").symlink_to(output.parent / "elsewhere")


def file_in_place_of_the_folder(output):
    output.write_text("mine")


REFUSED = {
    foreign: (OutputExists, "neither checkpoints nor the run.json"),
    file_beside_the_weights: (OutputExists, r"adapter holds what no run of .* wrote .notes.txt"),
    other_weights: (OutputExists, r"model holds what no run of .* wrote .weights.bin"),
    link_in_place_of_the_weights: (OutputExists, r"wrote .adapter.*move it away"),
    file_in_place_of_the_folder: (OutputExists, "is a file"),
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("act", ["run", "dry_run"])
def test_a_folder_with_somebodys_files_is_refused_and_left_alone(tmp_path, prepare, act):
    output = tmp_path / "run"
    prepare(output)
    before = contents(tmp_path)
    error, said = REFUSED[prepare]
    trainer = Trainer(FakeModel(), ROWS, output=output, resume=True, **SETTINGS)
    with pytest.raises(error, match=said):
        getattr(trainer, act)()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({}, OutputExists, "not empty"),
        ({"output": None, "resume": True}, ValueError, "resume=True needs output"),
        ({"resume": True, "lr": 0.5}, ValueError, "lr was 0.02, now 0.5"),
        ({"resume": True, "seed": 1}, ValueError, "seed was 0, now 1"),
        ({"output": "other", "resume": "none"}, ValueError, "no checkpoint there"),
    ],
)
def test_a_dry_run_refuses_what_a_run_does_and_writes_nothing(
    tmp_path, monkeypatch, changes, error, said
):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", stop_after=2)
    before = contents(tmp_path)
    settings = {**SETTINGS, "output": tmp_path / "run", **changes}
    for act in ("run", "dry_run"):
        with pytest.raises(error, match=said):
            getattr(Trainer(FakeModel(), ROWS, **settings), act)()
        assert contents(tmp_path) == before


def test_a_dry_run_of_a_resume_changes_neither_folder_nor_weights(tmp_path):
    train(tmp_path / "run", stop_after=2)
    before = contents(tmp_path)
    settings = {**SETTINGS, "output": tmp_path / "run", "resume": True}
    model = FakeModel()
    plan = Trainer(model, ROWS, **settings).dry_run()
    assert plan["resume"] == f"from {tmp_path / 'run'}" and contents(tmp_path) == before
    assert not model.network.q_proj.lora_B.weight.any()


def test_the_model_that_is_trained_is_not_replaced(tmp_path):
    """It lies where this run would publish, whole or in part."""
    for name, loaded in (("adapter", "adapter"), ("model", "model/deeper")):
        output = tmp_path / name
        train(output)
        (output / loaded).mkdir(parents=True, exist_ok=True)
        model = FakeModel()
        model.name = str(output / loaded)
        with pytest.raises(OutputExists, match="publishes in its place"):
            Trainer(model, ROWS, output=output, resume=True, **SETTINGS).run()
        assert (output / loaded).is_dir()


def test_a_resumed_run_replaces_what_it_wrote_and_keeps_what_was_changed_meanwhile(tmp_path):
    output = tmp_path / "run"
    train(output, schedule="constant", max_steps=3)

    def publish(folder):
        """As an adapter that differs from the first in its size."""
        folder.mkdir()
        (folder / "weights.txt").write_text("longer")

    model = FakeModel()
    model.save_adapter = publish
    train(output, model=model, schedule="constant", max_steps=4, resume=True)
    assert contents(output / "adapter") == {"weights.txt": b"longer"}
    record = json.loads((output / "published.json").read_text())
    assert record == {"adapter": [{"weights.txt": 6}]}

    def meddle(folder):
        (output / "adapter" / "notes.txt").write_text("mine")
        publish(folder)

    model = FakeModel()
    model.save_adapter = meddle
    train(output, model=model, schedule="constant", max_steps=5, resume=True)
    assert contents(output / "adapter") == {"weights.txt": b"longer"}
    assert (output / "adapter.kept-1" / "notes.txt").read_text() == "mine"
    assert not list(output.glob("*.new-*")) and not list(output.glob("*.old-*"))


def test_folders_called_like_those_of_a_run_are_somebodys(tmp_path):
    output = tmp_path / "run"
    train(output, stop_after=2)
    pid = os.getpid()
    names = ["adapter.old-mine", "model.new-notes", "weights-backup", "step-mine.tmp-1"]
    names += ["step-000009.tmp-x", "adapter.old-1", f"adapter.old-{pid}", "weights-0000"]
    for name in names:
        (output / name).mkdir()
        (output / name / "notes.txt").write_text("mine")
    train(output, resume=True)
    assert [n for n in names if not (output / n / "notes.txt").is_file()] == []


def test_what_a_run_that_died_while_it_published_left_is_removed(tmp_path):
    """Its folders are known by the record; a second try publishes."""
    output = tmp_path / "run"
    train(output)
    model = FakeModel()
    model.save_adapter = lambda folder: (folder.mkdir(), os._exit(9))
    child = os.fork()
    if not child:
        try:
            train(output, model=model, resume=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (output / f"adapter.new-{child}").is_dir()
    _, report = train(output, resume=True)
    assert report.paths["adapter"].is_dir() and not list(output.glob("adapter.*"))
    assert json.loads((output / "published.json").read_text()).keys() == {"adapter"}


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    """A second one is refused while the first is at it, and not any more afterwards."""
    output, refused = tmp_path / "run", []

    def save(folder):
        with pytest.raises(OutputExists, match="another process trains in"):
            train(output, resume=True)
        refused.append(True)
        return FakeModel._save(model, folder, "adapter")

    model = FakeModel()
    model.save_adapter = save
    train(output, model=model)
    assert refused == [True]
    train(output, resume=True)


# -- what goes wrong at the end --------------------------------------------------------------------


def test_weights_come_before_pictures_and_a_picture_that_fails_is_a_warning(
    tmp_path, monkeypatch, capsys
):
    def broken(path, *curves):
        assert (path.parent / "adapter").is_dir()
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plot, "_write_svg", broken)
    monkeypatch.setattr(plot, "_write_png", broken)
    _, report = train(tmp_path / "run")
    said = capsys.readouterr().out
    assert "WARNING: " in said and "loss.svg could not be drawn: RuntimeError: no fonts" in said
    assert report.paths["adapter"].is_dir() and "loss_svg" not in report.paths


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("Io error: full")]
)
def test_weights_that_cannot_be_published_are_in_the_checkpoint_that_is_named(tmp_path, error):
    def full(folder):
        raise error

    model = FakeModel()
    model.save_adapter = full
    with pytest.raises(SaveFailed, match=r"adapter: .*step-000006 holds them; resume=True"):
        train(tmp_path / "run", model=model)
    again, report = train(tmp_path / "run", resume=True)
    assert report.paths["adapter"].is_dir() and same(weights(again), weights(model))


@pytest.mark.parametrize(
    ("damaged", "published", "said"),
    [
        ([2], 6, "step-000002, with the lowest evaluation loss, is not whole.*step-000006"),
        ([2, 5, 6], None, "no checkpoint with an evaluation loss is whole"),
    ],
)
def test_a_damaged_best_checkpoint_costs_the_best_and_not_the_run(
    tmp_path, monkeypatch, capsys, damaged, published, said
):
    losses = iter([5.0, 2.0, 4.0, 4.0, 4.0, 3.0])
    monkeypatch.setattr("sloth.train.held_out.summed", lambda *rest: [next(losses)])
    save = Trainer._finish

    def finish(self, output, *rest):
        for step in damaged:
            (output / f"step-{step:06d}" / "trainable.safetensors").write_bytes(b"rotten")
        return save(self, output, *rest)

    monkeypatch.setattr(Trainer, "_finish", finish)
    settings = {"eval_data": ROWS[:4], "eval_steps": 1, "load_best": True}
    model, report = train(tmp_path / "run", **settings)
    out = " ".join(capsys.readouterr().out.split())
    assert "WARNING: load_best: " in out and said.split(".*")[0] in out
    assert report.paths["adapter"].is_dir() and ("best" in report.paths) == bool(published)
    if published:
        best = read_tensors(tmp_path / "run" / f"step-{published:06d}", "trainable")
        held = weights(model)
        assert all(torch.equal(held[name], tensor) for name, tensor in best.items())


def test_a_run_of_which_no_evaluation_was_finite_is_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sloth.train.held_out.summed", lambda *rest: [float("nan")])
    _, report = train(tmp_path / "run", eval_data=ROWS[:4], load_best=True)
    assert report.paths["adapter"].is_dir()
    assert "WARNING: load_best: no evaluation loss of this run was finite" in (
        capsys.readouterr().out
    )


def test_a_run_that_died_before_its_first_step_is_continued(tmp_path, monkeypatch):
    def die(*rest):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("sloth.train.trainer.write_settings", die)
        with pytest.raises(Stopped):
            train(tmp_path / "run")
    _, report = train(tmp_path / "run", resume=True)
    assert len(report.losses) == 6
