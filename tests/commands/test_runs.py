"""`sloth runs`: what folders of runs tell, whole or cut short."""

from __future__ import annotations

import json
import os
import time

import pytest

from sloth import cli
from sloth.train.callbacks import Callback
from sloth.train.history import RunHistory
from sloth.train.plot import sparkline
from sloth.train.trainer import Trainer
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import DieIn, Stopped

HOUR = 3600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that ended, and one that died in its fourth step, an hour ago."""
    place = tmp_path_factory.mktemp("runs")
    settings = {"max_steps": 5, "save_steps": 1, "lr": 0.02}
    held_out = {"eval_data": ROWS[:3], "eval_steps": 2}
    Trainer(FakeModel(), ROWS, output=place / "good", **settings, **held_out).run()
    with pytest.raises(Stopped):
        dying = {**settings, "lr": 0.1, "output": place / "died"}
        Trainer(FakeModel(), ROWS, callbacks=[DieIn(4)], **dying).run()
    past = time.time() - HOUR
    os.utime(place / "died" / "metrics.jsonl", (past, past))
    (place / "no-run").mkdir()
    return place


def metrics(folder, event):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def test_runs_are_listed_with_steps_losses_and_status(folder, capsys):
    assert cli.main(["runs", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [row["loss"] for row in metrics(folder / "died", "step")]
    best = min(metrics(folder / "good", "eval"), key=lambda row: row["eval_loss"])
    good = [row["loss"] for row in metrics(folder / "good", "step")]
    rows = [" ".join(line.split()) for line in lines]
    assert rows[0] == "run model steps last loss best loss status"
    lowest = losses.index(min(losses)) + 1
    assert rows[1] == (
        f"died fake 4 {losses[-1]:.4f} {min(losses):.4f} at {lowest} * stopped, resume from "
        "step-000003"
    )
    assert rows[2] == (
        f"good fake 5 {good[-1]:.4f} {best['eval_loss']:.4f} at {best['step']} finished"
    )
    assert not any("no-run" in row for row in rows)
    assert cli.main(["runs", str(folder / "good")]) == 0
    assert "died" not in capsys.readouterr().out


def test_a_run_is_running_for_as_long_as_it_has_its_lock(tmp_path):
    """Not until its last line is old."""
    seen, output = [], tmp_path / "run"

    class Look(Callback):
        def step(self, record):
            seen.append(RunHistory.read(output).status(time.time() + HOUR))
            if record.step == 2:
                raise Stopped

    with pytest.raises(Stopped):
        Trainer(FakeModel(), ROWS, output=output, save_steps=1, callbacks=[Look()]).run()
    assert seen == ["running", "running"]
    (output / "step-mine").mkdir()
    assert RunHistory.read(output).status(time.time()) == "stopped, resume from step-000001"
    for step in (999_998, 1_000_002):  # by the number, not by the letters of the name
        (output / f"step-{step:06d}").mkdir()
    assert RunHistory.read(output).status(time.time()) == "stopped, resume from step-1000002"


@pytest.mark.parametrize(
    "text",
    ['{"event": "step", "step": 1, "loss": "low"}', '{"event": "step", "step": 1e999}', "[" * 9999],
)
def test_one_run_that_cannot_be_read_ends_no_listing(tmp_path, text, capsys):
    for name, line in (("a", text), ("b", '{"event": "step", "step": 1, "loss": 2}'), ("c", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f"{line}\n")
        (tmp_path / name / "run.json").write_text('{"settings": [1]}')
    (tmp_path / "d" / "metrics.jsonl").mkdir(parents=True)
    assert cli.main(["runs", str(tmp_path)]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert names == ["a", "b", "c"]


def test_a_run_that_writes_is_running_and_a_cut_line_is_its_end(tmp_path, monkeypatch):
    """Where the system has no locks."""
    monkeypatch.setattr("sloth.train.history.is_locked", lambda folder: None)
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"event": "step", "step": n, "loss": n / 2, "seconds": 50.0} for n in (1, 2)]
    lines.append({"event": "step", "step": 3, "loss": None, "seconds": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(f'{text}{{"event": "st')
    held = RunHistory.read(run)
    assert held.steps == 3 and held.last_loss == 1.0 and held.best == (1, 0.5)
    assert held.status(held.written + 149) == "running"  # three of its longest steps
    assert held.status(held.written + 151) == "stopped, no checkpoint"
    (run / "step-000002").mkdir()
    assert held.status(held.written + 151) == "stopped, resume from step-000002"
    (run / "adapter").mkdir()
    assert held.status(held.written + 1) == "finished"


def test_two_runs_are_compared_by_settings_stretches_and_curves(folder, capsys):
    assert cli.main(["runs", str(folder), "--compare", "good", str(folder / "died")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["A  good  fake", "B  died  fake"]
    assert "lr: 0.02 | 0.1" in lines and not any("output" in line for line in lines)
    a, b = ([r["loss"] for r in metrics(folder / name, "step")] for name in ("good", "died"))
    for step in range(4):
        row = [f"{step + 1}-{step + 1}", f"{a[step]:.4f}", f"{b[step]:.4f}"]
        assert [*row, f"{b[step] - a[step]:+.4f}"] in [line.split() for line in lines]
    bounds = min(a + b), max(a + b)
    assert f"A  {sparkline(a, 60, bounds=bounds)}" in lines
    assert f"B  {sparkline(b, 48, bounds=bounds)}" in lines  # four fifths as long


def test_curves_on_one_scale_show_which_is_higher():
    assert sparkline([1.0, 1.0], 2, "ab", (1.0, 2.0)) == "aa"
    assert sparkline([2.0, 2.0], 2, "ab", (1.0, 2.0)) == "bb"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "good", "nope"], "'nope' is no run in {place}"),
        (["no-run"], "no runs in {place}"),
        (["nowhere"], "is no folder"),
    ],
)
def test_what_is_no_run_is_said(folder, capsys, arguments, said):
    place = folder / arguments[0] if len(arguments) == 1 else folder
    rest = arguments if len(arguments) > 1 else []
    assert cli.main(["runs", str(place), *rest]) == 2
    shown = capsys.readouterr().err
    assert said.format(place=place) in shown and shown.count("\n") == 1
