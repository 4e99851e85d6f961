"""The command line of the benchmark suite, and result files that it joins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.stored import UnreadableResults, read_results
from tests.test_benchmarks import results, train_row

STORED = sorted((Path(run.__file__).parent / "results").glob("h?00.json"))


def parsed(tmp_path: Path, *flags: str) -> Any:
    return run.parse(["--checkpoints", "c", "--out", str(tmp_path), *flags])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--models", "nope"), ("--models", "llama-3.1-8b,nope"), ("--models", "")),
        *(("--shapes", "0x2048"), ("--shapes", "4x0"), ("--rounds", "0"), ("--steps", "-3")),
        *(("--ranks", "0"), ("--ranks", "16,-4"), ("--ranks", "x"), ("--timeout", "-1")),
        *(("--timeout", "nan"), ("--timeout", "inf"), ("--tokens", "abc"), ("--tokens", "8,0")),
        *(("--sloth", "sloth@1.2.3"), ("--sloth", "sloth@0"), ("--sloth", "sloth:nolevel")),
        *(("--sloth", ""), ("--peers", "hf,nope"), ("--dtypes", "fp4"), ("--ops", "glu,nope")),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    tmp_path: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parsed(tmp_path, flag, value)
    assert leaving.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {flag}: {value.split(',')[-1]!r} is " in last


def test_lists_are_split_and_the_first_step_alone_may_be_measured(tmp_path: Path) -> None:
    args = parsed(tmp_path, "--steps", "0", "--ranks", "8,16", "--tokens", "1", "--peers", "none")
    assert (args.steps, args.ranks, args.tokens, args.timeout) == (0, [8, 16], [1], 600)
    assert args.shapes == [(4, 2048, False), (1, 8192, False)]
    assert (args.models, args.contenders) == (["llama-3.1-8b"], ["sloth"])
    levels = "sloth,sloth:ops@8,sloth:reference,sloth-fp8"
    found = parsed(tmp_path, "--sloth", levels, "--peers", "hf").contenders
    assert found == [*levels.split(","), "hf"]


def test_measuring_without_a_gpu_says_that_it_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run.Processes, "run", lambda *rest, **more: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="measuring needs a GPU"):
        run.measured(parsed(tmp_path))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_published_results_are_read_back_whole(path: Path) -> None:
    assert read_results(path) == json.loads(path.read_text())


def _without(name: str) -> dict[str, Any]:
    row = train_row("sloth")
    del row[name]
    return results(row)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("{", "is no JSON"),
        ({}, "no name under 'gpu'"),
        ([], "a list instead of an object"),
        (_without("ms"), "train, 1: no ms"),
        (_without("gradient_norm"), "train, 1: no gradient_norm"),
        (_without("batch"), "train, 1: no batch"),
        (_without("who"), "train, 1: no who"),
        (results(train_row("sloth", rounds=["1"])), "'rounds' is no list of numbers"),
        (results(train_row("sloth", first_loss="12")), "train, 1: no first_loss"),
        (results() | {"kernels": [{"op": "glu"}]}, "kernels, 1: no who, model"),
        (results() | {"runs": [{}]}, "runs, 1: no 'command'"),
        (results() | {"train": {}}, "no list of objects under 'train'"),
    ],
)
def test_a_file_that_holds_no_results_is_named_in_one_line(
    tmp_path: Path, stored: Any, said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(stored if isinstance(stored, str) else json.dumps(stored))
    with pytest.raises(UnreadableResults) as refused:
        read_results(path)
    text = str(refused.value)
    assert text.startswith(str(path)) and said in text and "\n" not in text


def test_joining_ends_with_a_line_where_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, gpu in (("a", "NVIDIA H100"), ("b", "NVIDIA H200")):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(train_row("sloth"), gpu=gpu)))
    for name, said in (("b", "different GPUs"), ("none", "none.json: No such file")):
        files = [str(tmp_path / f"{each}.json") for each in ("a", name)]
        monkeypatch.setattr("sys.argv", ["run", "--merge", *files, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=said):
            run.main()
    assert not (tmp_path / "out").exists()
