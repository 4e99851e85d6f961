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
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import OPS
from benchmarks.common import find_results
from benchmarks.report import CASE_KEYS, Results, Row
from benchmarks.roofline import mfu

ROOT = Path(__file__).resolve().parent.parent
# name -> module and its --variant
PEERS = {
    "hf": ("benchmarks.peers.hf_peft_step", "plain"),
    "hf-checkpoint": ("benchmarks.peers.hf_peft_step", "checkpoint"),
    "liger": ("benchmarks.peers.hf_liger_step", "plain"),
    "liger-checkpoint": ("benchmarks.peers.hf_liger_step", "checkpoint"),
    "unsloth": ("benchmarks.peers.unsloth_step", "default"),
    "unsloth-best": ("benchmarks.peers.unsloth_step", "best"),
}


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


def parse_shape(text: str) -> tuple[int, int, bool]:
    """ "4x2048" -> (4, 2048, False), "1x8192p" -> (1, 8192, True)."""
    found = re.fullmatch(r"(\d+)x(\d+)(p?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 4x2048 or 1x8192p")
    return int(found[1]), int(found[2]), bool(found[3])


def program(who: str) -> list[str]:
    """Module and options that measure a contender: a peer's name, or a setting of sloth."""
    if who in PEERS:
        module, variant = PEERS[who]
        return [module, "--variant", variant]
    found = re.fullmatch(r"sloth(?:-(fp8|dora)|:(?!fp8|dora)(\w+))?(?:@([\d.]+))?", who)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{who!r} is neither sloth[:LEVEL][@GIB], sloth-fp8[@GIB], sloth-dora[@GIB] nor one of "
            + ", ".join(PEERS)
        )
    variant, cap_gib = found[1] or found[2], found[3]
    options = ["--variant", variant] if variant else []
    return ["benchmarks.train.sloth_step", *options, *(["--memory-gib", cap_gib] * bool(cap_gib))]


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
        command = ["benchmarks.cases", "--op", op, "--model", model, "--tokens", args.tokens]
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


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", choices=(*report.KINDS, "all"), default="all")
    add("--models", default="llama-3.1-8b", help="shapes of tools/shapes.py, by commas")
    add("--shapes", default="4x2048,1x8192", help="by commas; 1x8192p is packed")
    add("--dtypes", default="nf4", help="of the base: nf4, bf16, by commas")
    add("--sloth", default="sloth", help="settings of sloth, by commas")
    add("--peers", default="all", help="all, none, or by commas: " + ", ".join(PEERS))
    add("--checkpoints", type=Path, help="folder of random checkpoints, filled on first use")
    add("--out", type=Path, required=True, help="folder for <gpu>.json and <gpu>.md")
    add("--ranks", default="16", help="of the adapter, by commas")
    add("--steps", type=int, default=20, help="0: the first step alone, compilation included")
    add("--in-memory", action="store_true", help="random weights made by sloth, none on the disk")
    add("--rounds", type=int, default=1)
    add("--ops", default=",".join(OPS), help="kernel cases, by commas")
    add("--tokens", default="2048,8192", help="rows of the kernel cases, by commas")
    add("--peer-site", type=Path, help="folder that tools/pack_peers.py's tarball was unpacked to")
    add("--timeout", type=float, default=600, help="seconds that one process may take")
    add("--merge", type=Path, nargs="+", help="join these .json files instead of measuring")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Check the command line before anything is measured, and split its lists."""
    parser = options()
    args = parser.parse_args(argv)
    args.models, args.dtypes, args.ops = (
        text.split(",") for text in (args.models, args.dtypes, args.ops)
    )
    peers = {"all": list(PEERS), "none": []}.get(args.peers, args.peers.split(","))
    args.contenders = [*args.sloth.split(","), *peers]
    try:
        args.ranks = [int(text) for text in args.ranks.split(",")]
        args.shapes = [parse_shape(text) for text in args.shapes.split(",")]
        for who in args.contenders:
            program(who)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    unknown = (set(args.dtypes) - {"nf4", "bf16"}) | (set(args.ops) - set(OPS))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not args.merge and args.cases != "kernels" and args.checkpoints is None:
        parser.error("--checkpoints is needed for training steps")
    return args


def main() -> None:
    args = parse()
    if args.merge:
        results = report.merge([json.loads(path.read_text()) for path in args.merge])
    else:
        results = measured(args)
    path = write(results, args.out)
    print(f"\n{path.read_text()}\nwritten to {path}")
    wrong = disagreements(results)
    if wrong:
        sys.exit("\n".join(["no speeds, since the programs disagree:", *wrong]))


if __name__ == "__main__":
    main()
