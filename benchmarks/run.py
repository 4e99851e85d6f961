"""The benchmark suite: this machine's limits, end-to-end training steps, kernels; files of results.

    python -m benchmarks.run --cases train --models llama-3.1-8b --shapes 4x2048,1x8192 \\
        --checkpoints CHECKPOINTS --out RESULTS
    python -m benchmarks.run --merge a.json b.json --out RESULTS

Every program runs in a process of its own, one at a time. A shape is BATCHxLENGTH; a trailing p
packs its rows with short documents (1x8192p). `--sloth` takes several settings of sloth to measure
side by side: sloth, sloth:LEVEL, sloth@GIB (the process is capped at that many GiB), sloth-fp8
(frozen products in 8 bits, whose losses may differ by more) and sloth-dora. With `--rounds 2` the
programs run a second time in the opposite order and a row is the median round.

Random checkpoints are made once in --checkpoints. Results are written after every process, so a
run that is cut short keeps what it has. A table whose losses or gradients disagree shows no speeds,
and the command then ends with status 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line, report
from benchmarks.command_line import PEERS, program
from benchmarks.common import find_results
from benchmarks.report import CASE_KEYS, Results, Row
from benchmarks.roofline import mfu
from benchmarks.stored import UnreadableResults, read_results

ROOT = Path(__file__).resolve().parent.parent
# Files that are loaded, and whether kernels were compiled before: in this order.
STARTUPS = (("nf4", "cold"), ("nf4", "warm"), ("bf16", "warm"))
_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Case:
    """One table of the results."""

    model: str
    dtype: str
    rank: int
    batch: int
    length: int
    packed: bool

    def key(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in CASE_KEYS}


class Processes:
    """Runs modules of this suite; peers see `peer_site` first on their path, sloth does not."""

    def __init__(self, peer_site: Path | None, timeout_s: float) -> None:
        self.peer_site, self.timeout_s = peer_site, timeout_s

    def run(
        self, command: list[str], is_peer: bool, variables: Mapping[str, str] = _NOTHING
    ) -> tuple[list[Row], str | None]:
        """(result lines, None or why the process failed: the last line it wrote).

        variables: set in its environment beside the path.
        """
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if is_peer and self.peer_site is not None:
            paths.insert(0, str(self.peer_site.resolve()))
        path = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment = {**os.environ, **path, **variables}
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            written = error.stdout or b""  # bytes, whatever `text` says
            text = written.decode(errors="replace") if isinstance(written, bytes) else written
            return find_results(text), f"not done within {self.timeout_s:.0f} s"
        results = find_results(done.stdout)
        if done.returncode == 0:
            return results, None if results else "it ended without a result"
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return results, lines[-1].strip()[:300] if lines else f"status {done.returncode}"


def checkpoint(
    processes: Processes, folder: Path, model: str, dtype: str, in_memory: bool = False
) -> Path:
    """The folder of random weights of a model, made on first use."""
    path = folder.resolve() / f"{model}-{dtype}"
    if not (path / "config.json").exists():
        command = ["tools.random_checkpoint", model, str(path)] + ["--nf4"] * (dtype == "nf4")
        command += ["--config-only"] * in_memory
        _, why = processes.run(command, is_peer=False)
        if not (path / "config.json").exists():
            sys.exit(f"no checkpoint of {model}: {why}")
    return path


def train_rows(
    args: argparse.Namespace, processes: Processes, product_tflops: float
) -> Iterator[Row]:
    """A row of every contender in every case, round by round."""
    for model, dtype, rank, (batch, length, packed) in itertools.product(
        args.models, args.dtypes, args.ranks, args.shapes
    ):
        case = Case(model, dtype, rank, batch, length, packed)
        folder = checkpoint(processes, args.checkpoints, model, dtype, args.in_memory)
        for round_number in range(args.rounds):
            order = args.contenders if round_number % 2 == 0 else args.contenders[::-1]
            for who in order:
                module, *options = program(who)
                options += ["--batch", str(batch), "--length", str(length), "--dtype", dtype]
                options += ["--rank", str(rank), "--steps", str(args.steps)]
                options += ["--packed"] * packed
                results, why = processes.run([module, str(folder), *options], who in PEERS)
                row: Row = {"who": who, **case.key()}
                if why is not None or not results:
                    row["failed"] = why
                else:
                    row |= results[-1]
                    flops = row["step_tflop"] * 1e12
                    row["mfu"] = round(mfu(flops, row["ms"], product_tflops), 4)
                row["command"] = shlex.join(["python", "-m", module, folder.name, *options])
                yield row


def startup_rows(args: argparse.Namespace, processes: Processes) -> Iterator[Row]:
    """Loading and the first step: from both kinds of files, kernels compiled and to compile."""
    for model, (batch, length, _) in itertools.product(args.models, args.shapes):
        with tempfile.TemporaryDirectory() as cache:
            for source, kernels in STARTUPS:
                folder = checkpoint(processes, args.checkpoints, model, source)
                options = ["--quant", "nf4"] * (source == "bf16")
                options += ["--batch", str(batch), "--length", str(length)]
                command = ["benchmarks.train.startup", str(folder), *options]
                results, why = processes.run(command, False, {"TRITON_CACHE_DIR": cache})
                row: Row = {"who": "sloth", "model": model, "source": source, "kernels": kernels}
                row |= {"batch": batch, "length": length, "dtype": source}
                yield row | ({"failed": why} if why is not None else results[-1])


def kernel_rows(
    args: argparse.Namespace, processes: Processes, ceilings: dict[str, float]
) -> Iterator[Row]:
    """The rows of every op, a process each."""
    for model, op in itertools.product(args.models, args.ops):
        command = ["benchmarks.cases", "--op", op, "--model", model]
        command += ["--tokens", ",".join(map(str, args.tokens))]
        results, why = processes.run(command, is_peer=True)
        for row in results:
            if "tb_s" in row:
                row["of_ceiling"] = round(row["tb_s"] / ceilings["copy_tb_s"], 4)
            if "tflops" in row:
                row["of_ceiling"] = round(row["tflops"] / ceilings["product_tflops"], 4)
            yield row
        if why is not None:
            yield {
                **{"op": op, "model": model, "num_tokens": None, "case": "the process"},
                **{"who": "", "failed": why},
            }


def write(results: Results, out: Path) -> Path:
    """`<out>/<gpu>.json` and the same as .md; returns the latter's path."""
    out.mkdir(parents=True, exist_ok=True)
    base = out / report.slug(results["gpu"])
    base.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    markdown = base.with_suffix(".md")
    markdown.write_text(report.render(results))
    return markdown


def disagreements(results: Results) -> list[str]:
    """What is wrong with each table whose rows disagree."""
    groups = report.grouped(results["train"], report.case_of)
    found = {case: report.disagreement(rows) for case, rows in groups.items()}
    return [f"{case}: {why}" for case, why in found.items() if why is not None]


def summary(row: Row) -> str:
    """One line of progress; the speeds wait for the comparison."""
    where = row.get("case") or f"{row['model']} {row['dtype']} {row['batch']}x{row['length']}"
    said = f"failed: {row['failed']}" if "failed" in row else "measured"
    if "first_loss" in row:
        said += f", first loss {row['first_loss']}, gradient norm {row['gradient_norm']:.3g}"
    return f"{where}: {row['who']}: {said}"


def measured(args: argparse.Namespace) -> Results:
    """Run everything asked for, writing the files as it goes."""
    if not torch.cuda.is_available():
        sys.exit("measuring needs a GPU, and torch sees none here; --merge works without one")
    processes = Processes(args.peer_site, args.timeout)
    found, why = processes.run(["benchmarks.ceilings"], is_peer=True)
    if why is not None:
        sys.exit(f"the machine's limits could not be measured: {why}")
    limits = found[0]
    run = {
        "command": shown_command(sys.argv[1:]),
        "ceilings": limits["ceilings"],
        "versions": limits["versions"],
    }
    print(f"{limits['gpu']}: {limits['ceilings']}", flush=True)
    rows: dict[str, list[Row]] = {kind: [] for kind in report.KINDS}
    work: list[tuple[str, Iterator[Row]]] = []
    if args.cases in ("train", "all"):
        product = limits["ceilings"]["product_tflops"]
        work.append(("train", train_rows(args, processes, product)))
    if args.cases in ("startup", "all"):
        work.append(("startup", startup_rows(args, processes)))
    if args.cases in ("kernels", "all"):
        work.append(("kernels", kernel_rows(args, processes, limits["ceilings"])))
    results = report.merge([{"gpu": limits["gpu"], "runs": [run], **rows}])
    for kind, source in work:
        for row in source:
            print(summary(row), flush=True)
            rows[kind].append(row)
            results = report.merge([{"gpu": limits["gpu"], "runs": [run], **rows}])
            write(results, args.out)
    return results


def shown_command(argv: Sequence[str]) -> str:
    """The command, with names such as CHECKPOINTS for the folders of this machine."""
    folders = {"--checkpoints", "--out", "--peer-site"}
    shown = [
        before.strip("-").upper().replace("-", "_") if before in folders else argument
        for before, argument in zip(["", *argv], argv, strict=False)
    ]
    return shlex.join(["python", "-m", "benchmarks.run", *shown])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    return command_line.parse(__doc__ or "", argv)


def main() -> None:
    args = parse()
    if args.merge:
        try:
            results = report.merge([read_results(path) for path in args.merge])
        except (UnreadableResults, report.DifferentGPUs) as error:
            sys.exit(str(error))
    else:
        results = measured(args)
    path = write(results, args.out)
    print(f"\n{path.read_text()}\nwritten to {path}")
    wrong = disagreements(results)
    if wrong:
        sys.exit("\n".join(["no speeds, since the programs disagree:", *wrong]))


if __name__ == "__main__":
    main()
