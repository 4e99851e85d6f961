"""The command line of `benchmarks.run`: what there is to measure, checked before anything is."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import OPS
from tools.shapes import SHAPES

# name -> module and its --variant
PEERS = {
    "hf": ("benchmarks.peers.hf_peft_step", "plain"),
    "hf-checkpoint": ("benchmarks.peers.hf_peft_step", "checkpoint"),
    "hf-prepared": ("benchmarks.peers.hf_peft_step", "prepared"),
    "liger": ("benchmarks.peers.hf_liger_step", "plain"),
    "liger-checkpoint": ("benchmarks.peers.hf_liger_step", "checkpoint"),
    "unsloth": ("benchmarks.peers.unsloth_step", "default"),
    "unsloth-best": ("benchmarks.peers.unsloth_step", "best"),
}
SLOTH_LEVELS = ("auto", "fused", "ops", "reference")
DTYPES = ("nf4", "bf16")


def whole_number(least: int) -> Callable[[str], int]:
    """What reads a whole number that is at least so large."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return read


def seconds(text: str) -> float:
    """A time that a process may take."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def parse_shape(text: str) -> tuple[int, int, bool]:
    """ "4x2048" -> (4, 2048, False), "1x8192p" -> (1, 8192, True)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(p?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 4x2048 or 1x8192p")
    return int(found[1]), int(found[2]), bool(found[3])


def program(who: str) -> list[str]:
    """Module and options that measure a contender: a peer's name, or a setting of sloth."""
    if who in PEERS:
        module, variant = PEERS[who]
        return [module, "--variant", variant]
    levels = "|".join(SLOTH_LEVELS)
    found = re.fullmatch(rf"sloth(?:-(fp8|dora)|:({levels}))?(?:@(\d+(?:\.\d+)?))?", who)
    if found is None or (found[3] and not float(found[3]) > 0):
        raise argparse.ArgumentTypeError(
            f"{who!r} is neither sloth[:LEVEL][@GIB], sloth-fp8[@GIB], sloth-dora[@GIB] nor one of "
            f"{', '.join(PEERS)}; LEVEL: {', '.join(SLOTH_LEVELS)}; GIB: a number above 0"
        )
    variant, cap_gib = found[1] or found[2], found[3]
    options = ["--variant", variant] if variant else []
    return ["benchmarks.train.sloth_step", *options, *(["--memory-gib", cap_gib] * bool(cap_gib))]


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """What reads a name of these."""

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; known: {', '.join(known)}")
        return text

    return read


def by_commas(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What reads several of them."""
    return lambda text: [read(each) for each in text.split(",")]


def contender(who: str) -> str:
    """A name that `program` knows."""
    program(who)
    return who


def peers(text: str) -> list[str]:
    """Their names; "all" and "none" are some, too."""
    every: dict[str, list[str]] = {"all": list(PEERS), "none": []}
    return every[text] if text in every else by_commas(one_of(PEERS))(text)


def options(description: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, read: Callable[[str], Any], default: Any = None, **more: Any) -> None:
        parser.add_argument(name, type=read, default=default, **more)

    add("--cases", str, "all", choices=(*report.KINDS, "all"))
    models = by_commas(one_of(SHAPES))
    add("--models", models, "llama-3.1-8b", help="shapes of tools/shapes.py, by commas")
    add("--shapes", by_commas(parse_shape), "4x2048,1x8192", help="by commas; 1x8192p is packed")
    add("--dtypes", by_commas(one_of(DTYPES)), "nf4", help="of the base: nf4, bf16, by commas")
    add("--sloth", by_commas(contender), "sloth", help="settings of sloth, by commas")
    add("--peers", peers, "all", help="all, none, or by commas: " + ", ".join(PEERS))
    add("--checkpoints", Path, help="folder of random checkpoints, filled on first use")
    add("--out", Path, required=True, help="folder for <gpu>.json and <gpu>.md")
    add("--ranks", by_commas(whole_number(1)), "16", help="of the adapter, by commas")
    add("--steps", whole_number(0), 20, help="0: the first step alone, compilation included")
    parser.add_argument(
        "--in-memory", action="store_true", help="random weights made by sloth, none on the disk"
    )
    add("--rounds", whole_number(1), 1)
    add("--ops", by_commas(one_of(OPS)), ",".join(OPS), help="kernel cases, by commas")
    tokens = by_commas(whole_number(1))
    add("--tokens", tokens, "2048,8192", help="rows of the kernel cases, by commas")
    add("--peer-site", Path, help="folder that tools/pack_peers.py's tarball was unpacked to")
    add("--timeout", seconds, 600.0, help="seconds that one process may take")
    add("--merge", Path, nargs="+", help="join these .json files instead of measuring")
    return parser


def parse(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Check the command line before anything is measured, and split its lists."""
    parser = options(description)
    args = parser.parse_args(argv)
    args.contenders = [*args.sloth, *args.peers]
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is no folder")
    if not args.merge and args.cases != "kernels" and args.checkpoints is None:
        parser.error("--checkpoints is needed for training steps")
    return args
