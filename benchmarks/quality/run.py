"""Does it train as well? The same QLoRA run on real text in sloth and in the peer, several seeds.

    python -m benchmarks.quality.run --model MODEL --gsm8k FOLDER --work WORK --out OUT
    python -m benchmarks.quality.run --programs sloth,fp8 --model MODEL ...
    python -m benchmarks.quality.run --draw OUT/quality.json

MODEL is a folder, alias or GGUF file of a real model; FOLDER holds gsm8k_train.jsonl and
gsm8k_test.jsonl. Programs run in processes of their own, `--together` of them at a time: nothing is
timed. The verdict: sloth's mean held-out loss lies between the peer's best and worst seed. The
program fp8 is sloth with the frozen products in 8-bit floats: its mean may not lie above sloth's
worst seed. Its adapters are judged on the model as it is stored, which is what they will be used
with; the loss in 8 bits is kept too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.quality.work import prepare
from benchmarks.run import Processes

PROGRAMS = {
    "sloth": "benchmarks.quality.sloth_run",
    "hf": "benchmarks.quality.hf_run",
    "fp8": "benchmarks.quality.fp8_run",
}
SMOOTHED_STEPS = 20
Runs = list[dict[str, Any]]


def finals(runs: Runs, name: str) -> list[float]:
    """Held-out losses of a program after the last step, by seed."""
    return [list(run["held_out"].values())[-1] for run in runs if run["name"] == name]


def verdict(runs: Runs) -> tuple[bool, str]:
    """Whether sloth's mean held-out loss is inside the peer's seeds, and a line that says so."""
    ours, peers = finals(runs, "sloth"), finals(runs, "hf")
    mean = sum(ours) / len(ours)
    inside = min(peers) <= mean <= max(peers)
    spread = f"{min(peers):.4f} to {max(peers):.4f}"
    return inside, (
        f"held-out loss: sloth {mean:.4f} ({', '.join(f'{x:.4f}' for x in ours)}), "
        f"peer {spread} over {len(peers)} seeds: {'inside' if inside else 'OUTSIDE'}"
    )


def fp8_verdict(runs: Runs) -> tuple[bool, str]:
    """Whether products in 8 bits train as well as those without, and a line that says so."""
    exact, approximate = finals(runs, "sloth"), finals(runs, "fp8")
    means = [sum(losses) / len(losses) for losses in (exact, approximate)]
    near, above = means[1] <= max(exact), means[1] / means[0] - 1
    return near, (
        f"held-out loss: fp8 {means[1]:.4f} ({', '.join(f'{x:.4f}' for x in approximate)}), "
        f"sloth {means[0]:.4f} ({min(exact):.4f} to {max(exact):.4f}): {above:+.2%}, "
        f"{'no worse than' if near else 'OUTSIDE'} its seeds"
    )


def smoothed(losses: Sequence[float], width: int = SMOOTHED_STEPS) -> list[float]:
    """Means of the last `width` steps."""
    return [
        sum(losses[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(losses))
    ]


def rounded(value: Any) -> Any:
    """Every float of a result to six decimals: a loss has no more to say."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def draw(runs: Runs, path: Path) -> None:
    """Training curves of every seed, smoothed, and held-out losses, in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    train, held_out = figure.subplots(1, 2)
    colours = {"sloth": "#3465a4", "hf": "#cc4400", "fp8": "#4e9a06"}
    for run in runs:
        look = {"color": colours[run["name"]], "alpha": 0.7, "linewidth": 1}
        label = run["name"] if run["seed"] == runs[0]["seed"] else None
        train.plot(smoothed(run["losses"]), label=label, **look)
        steps = [int(step) for step in run["held_out"]]
        held_out.plot(steps, list(run["held_out"].values()), marker="o", label=label, **look)
    train.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED_STEPS} steps")
    held_out.set(xlabel="step", ylabel="held-out loss")
    for axes in (train, held_out):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


# program -> what holds it and sloth against each other.
JUDGES = {"hf": verdict, "fp8": fp8_verdict}


def measured(args: argparse.Namespace) -> Runs:
    """Prepare the work folder and run every program with every seed."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    prepare(args.model, args.gsm8k, args.work, args.steps, seeds)
    processes = Processes(args.peer_site, args.timeout)

    def run(job: tuple[int, str]) -> tuple[Runs, str | None]:
        seed, name = job
        command = [PROGRAMS[name], str(args.work), "--seed", str(seed)]
        results, why = processes.run(command, is_peer=name == "hf")
        said = f"{finals(results, name)[0]:.4f}" if why is None else f"failed: {why}"
        print(f"{name}, seed {seed}: {said}", flush=True)
        return results, why

    jobs = [(seed, name) for seed in seeds for name in args.programs.split(",")]
    with ThreadPoolExecutor(args.together) as pool:
        ended = list(pool.map(run, jobs))
    runs = [found for results, _ in ended for found in results]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(rounded(runs)) + "\n")
    failed = sum(why is not None for _, why in ended)
    if failed:
        sys.exit(f"{failed} of {len(jobs)} processes failed; {args.out} has the others' curves")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model")
    add("--gsm8k", type=Path, help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl")
    add("--work", type=Path, help="folder for the prepared model and batches")
    add("--out", type=Path, help="folder for quality.json")
    add("--steps", type=int, default=400)
    add("--seeds", default="0,1,2", help="by commas")
    add("--programs", default="sloth,hf", help="by commas: " + ", ".join(PROGRAMS))
    add("--together", type=int, default=1, help="processes that share the GPU")
    add("--peer-site", type=Path, help="folder that tools/pack_peers.py's tarball was unpacked to")
    add("--timeout", type=float, default=600, help="seconds that one process may take")
    add("--draw", type=Path, help="only draw quality.svg beside this quality.json")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text()), args.draw.with_suffix(".svg"))
        return
    if not (args.model and args.gsm8k and args.work and args.out):
        parser.error("--model, --gsm8k, --work and --out are needed")
    asked = set(args.programs.split(","))
    if not {"sloth"} < asked <= set(PROGRAMS):
        parser.error(f"--programs takes sloth and more of {', '.join(PROGRAMS)}")
    runs = measured(args)
    verdicts = [judge(runs) for name, judge in JUDGES.items() if name in asked]
    print("\n".join(line for _, line in verdicts))
    sys.exit(not all(good for good, _ in verdicts))


if __name__ == "__main__":
    main()
