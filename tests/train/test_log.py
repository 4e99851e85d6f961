"""The live line on a terminal, the lines elsewhere, and the loss picture."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from sloth.quiet import QuietStream
from sloth.train.log import RunLog
from sloth.train.plot import BLOCKS, plot_losses, sparkline
from sloth.train.records import EvalRecord, StepRecord
from tests.train.fakes import ROWS
from tests.train.runs import metrics, train

SVG = "{http://www.w3.org/2000/svg}"


def record(step, **changes):
    values = {
        "epoch": 0.5,
        "loss": 1.25,
        "lr": 2e-4,
        "grad_norm": 0.5,
        "tokens": 100,
        "trained_tokens": 40,
        "seconds": 0.5,
        "memory_bytes": 2**30,
        "skipped": False,
    }
    return StepRecord(step=step, **{**values, **changes})


def logged(tmp_path, records, num_steps, first_step=0, **console):
    out = io.StringIO()
    shown = Console(file=out, width=120, soft_wrap=True, **console)
    with RunLog(tmp_path / "metrics.jsonl", first_step, num_steps, shown) as log:
        for one in records:
            log.step(one)
        log.evaluation(EvalRecord(num_steps, 0.75))
    return out.getvalue()


def test_plain_line_shows_every_number(tmp_path):
    out = logged(tmp_path, [record(1)], 3)
    line = (
        "step 1/3  epoch 0.50  loss 1.2500  (smoothed 1.2500)  lr 2.00e-04  grad 0.500  "
        "200 tok/s  40/100 trained  1.00 GiB  ETA 0:00"
    )
    assert out.splitlines() == [line, "step 3/3  eval loss 0.7500  perplexity 2.117"]


def test_terminal_gets_a_live_line(tmp_path):
    out = logged(tmp_path, [record(1), record(2)], 2, force_terminal=True)
    assert "\x1b[" in out and "step 2/2" in out and "200 tok/s" in out and "ETA" in out


PREFERENCES = dict.fromkeys(("reward_chosen", "reward_rejected", "reward_margin"), -1.234)


@pytest.mark.parametrize(
    ("width", "shown", "dropped"),
    [
        (80, ("step", "loss", "lr", "tok/s", "GiB", "ETA", "smoothed", "grad"), ("reward",)),
        (60, ("step", "loss", "lr", "tok/s", "GiB", "ETA"), ("reward", "grad", "trained")),
        (40, ("step", "loss"), ("reward", "smoothed")),
        (20, ("step",), ("lr", "ETA")),
        (200, ("step", "loss", "lr", "tok/s", "GiB", "ETA", "grad", "reward", "trained"), ()),
    ],
)
def test_the_live_line_fits_the_terminal_and_keeps_what_matters_most(
    tmp_path, width, shown, dropped
):
    out = io.StringIO()
    console = Console(file=out, width=width, soft_wrap=True, force_terminal=True)
    with RunLog(tmp_path / "metrics.jsonl", 0, 200_000, console) as log:
        log.step(record(120_000, tokens=20_000, metrics=PREFERENCES))
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    assert all(len(line) <= width for line in frames.splitlines()), frames
    last = frames[frames.rindex("step 120000") :]
    assert len(last.strip().splitlines()) <= 2
    for name in shown:
        assert name in last, (name, last)
    for name in dropped:
        assert name not in last, (name, last)


def test_the_smoothed_loss_follows_slowly_and_skips_what_is_not_finite(tmp_path):
    losses = [4.0, math.nan, 2.0]
    out = logged(tmp_path, [record(i, loss=x) for i, x in enumerate(losses, start=1)], 3)
    smoothed = [line.split("smoothed ")[1].split(")")[0] for line in out.splitlines()[:3]]
    # (0.9 * 0.1 * 4 + 0.1 * 2) / (0.9 * 0.1 + 0.1)
    assert smoothed == ["4.0000", "4.0000", "2.9474"]


class Broken(io.StringIO):
    """A stream whose disk is full after some characters."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, text):
        if len(self.getvalue()) + len(text) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_row_14_what_cannot_be_said_is_left_unsaid(tmp_path, monkeypatch, is_terminal):
    """From a write that fails on; metrics go on, and so does whoever logs."""
    broken = Broken(room=100)
    broken.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", broken)
    for stdout in (broken, None):
        monkeypatch.setattr(sys, "stdout", stdout)
        with RunLog(tmp_path / "metrics.jsonl", 0, 3) as log:
            for step in (1, 2, 3):
                log.step(record(step))
                log.notice("a notice " * 20)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
        (tmp_path / "metrics.jsonl").unlink()
    assert len(broken.getvalue()) <= 100


def test_characters_that_a_terminal_lacks_are_escaped():
    raw = io.BytesIO()
    quiet = QuietStream(io.TextIOWrapper(raw, encoding="ascii"))
    quiet.write("gr\u00fc\u00df")
    quiet.flush()
    assert raw.getvalue() == b"gr\\xfc\\xdf"


def test_sparkline_goes_from_the_lowest_to_the_highest_and_leaves_gaps():
    assert sparkline([7, 6, 5, 4, 3, 2, 1, 0], 8) == BLOCKS[::-1]
    assert sparkline([1.0, 3.0, 0.0, 0.0, 7.0, 7.0], 3, "abc") == "bac"
    assert sparkline([1.0, math.nan, math.inf, 2.0], 4, "ab") == "a  b"
    assert sparkline([2.0, 2.0], 60, "ab") == "aa" and sparkline([], 9) == ""
    assert len(sparkline(list(range(1000)), 60)) == 60


def test_each_epoch_and_the_run_end_with_their_curve(tmp_path):
    """Of 20 rows, 2 a step: an epoch of 10 steps; the last one ends with the run's own."""
    out, records = (
        io.StringIO(),
        [record(step, epoch=step / 10, loss=31.0 - step) for step in range(1, 31)],
    )
    console = Console(file=out, width=200, soft_wrap=True)
    with RunLog(tmp_path / "metrics.jsonl", 0, 30, console) as log:
        for one in records:
            log.step(one)
        log.curve([one.loss for one in records])
    curves = [line for line in out.getvalue().splitlines() if not line.startswith("step")]
    assert [line.split("loss ")[0].strip() for line in curves] == ["epoch 1", "epoch 2", ""]
    assert [line.split()[-3::2] for line in curves] == [
        ["30.0000", "21.0000"],
        ["20.0000", "11.0000"],
        ["29.0000", "2.0000"],
    ]
    assert all(len(line.split()[-2]) in (10, 30) for line in curves)


def test_a_terminal_without_blocks_gets_letters(tmp_path):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=200)
    with RunLog(tmp_path / "metrics.jsonl", 0, 3, console) as log:
        log.curve([2.0, 1.0])
        log.curve([math.nan])
    console.file.flush()
    assert raw.getvalue().decode() == "loss 2.0000 @_ 1.0000\n"


def test_long_runs_print_about_a_hundred_lines_and_log_every_step(tmp_path):
    out = logged(tmp_path, [record(step) for step in range(1, 2001)], 2000)
    assert 100 <= len(out.splitlines()) <= 103
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2001


def test_metrics_are_strict_json_and_a_resume_drops_later_lines(tmp_path):
    def strict(text):
        raise AssertionError(text)

    first = [record(1), record(2, loss=math.nan, skipped=True, rows=[4]), record(3)]
    logged(tmp_path, first, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # cut by a kill
    logged(tmp_path, [record(3, loss=9.0), record(4)], 4, first_step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=strict) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    assert [row.get("loss") for row in rows] == [1.25, None, 9.0, 1.25, None]
    assert rows[1]["rows"] == [4] and rows[-1]["eval_loss"] == 0.75


TEARS = {  # what is left of six lines, four steps' and a look's after every second; how many whole
    "half a line": (lambda lines: [*lines[:2], lines[2][:20]], 2),
    "no end of the last line": (lambda lines: [*lines[:5], lines[5][:-1]], 6),
    "no look at the last step": (lambda lines: lines[:5], 5),
    "nothing": (lambda lines: [], 0),
    "a block of zeros": (lambda lines: [*lines[:4], "\0" * 50], 4),
}


@pytest.mark.parametrize("tear", TEARS)
def test_what_a_torn_log_lacks_of_the_steps_before_the_checkpoint_is_put_back(
    tmp_path, capsys, tear
):
    """Their losses, which the checkpoint has; lines that are whole stay as they are."""
    settings, (torn, num_whole) = {"eval_data": ROWS[:4], "eval_steps": 2}, TEARS[tear]
    train(tmp_path / "straight", **settings)
    train(tmp_path / "run", stop_after=4, **settings)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(torn(log.read_text().splitlines(keepends=True)[:6])))
    train(tmp_path / "run", resume=True, **settings)
    found, expected = metrics(tmp_path / "run"), metrics(tmp_path / "straight")
    for row in expected[num_whole:6]:
        known = "loss" if row["event"] == "step" else "eval_loss"
        for name in row.keys() - {"event", "step", known}:
            del row[name]
    assert found == expected
    assert ("metrics.jsonl is torn" in capsys.readouterr().out) == (num_whole < 6)


def test_picture_has_both_curves_and_a_gap_where_a_loss_is_not_finite(tmp_path):
    paths = plot_losses(tmp_path, [3.0, math.nan, 2.0, 1.0, math.inf, 0.5], {2: 2.5, 6: 1.0})
    root = ElementTree.parse(paths["loss_svg"]).getroot()
    lines = root.findall(f"{SVG}polyline")
    assert [len(line.get("points").split()) for line in lines] == [2, 2]
    assert len(root.findall(f"{SVG}circle")) == 2
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 720 and 0 <= y <= 400
    assert ("loss_png" in paths) == (importlib.util.find_spec("matplotlib") is not None)
    assert all(path.stat().st_size for path in paths.values())


def test_picture_of_one_step_or_none_is_valid(tmp_path):
    for losses in ([], [1.0], [math.nan], [2.0, 2.0]):
        ElementTree.parse(plot_losses(tmp_path, losses, {})["loss_svg"])
