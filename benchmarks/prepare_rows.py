"""Preparing short chats for training: rows a second, resident memory, and the time of a million.

    python -m benchmarks.prepare_rows MODEL --rows 1000000

MODEL is an alias, repository, folder or .gguf file; of it only tokenizer and template are read. A
JSONL file of that many chats (two turns of some 20 words each, one in four with a system text) is
written to a folder that goes afterwards, and prepared twice as `sloth train` would: anew, and from
what was kept. Every row is checked to have become one example with trained tokens in it, and both
times to be the same, before a number is printed. Memory is the process's largest, less what it was
before the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

from sloth.commands.data import _read_model
from sloth.data.dataset import Dataset, load_data
from sloth.text.tokenizer import Tokenizer

MILLION, MIB = 1_000_000, 2**20
LENGTHS, SYSTEM_SHARE = (5, 35), 0.25
# Words as common as those of chats, so that a row has about as many tokens as words.
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know get through back "
    "much before go good new write our used me man too any day same right look think also "
    "around another came come work three word must because does part even place well such here "
    "take why things help put years different away again off went old number great tell men say "
    "small every found still between "
).split()


def write_chats(file: Path, num_rows: int) -> None:
    """Rows of random words, the same each time."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(*LENGTHS)))

    with file.open("w") as stream:
        for number in range(num_rows):
            opening = [{"role": "system", "content": text()}]
            turns = [
                {"role": "user", "content": f"{number} {text()}"},
                {"role": "assistant", "content": text()},
            ]
            messages = opening + turns if draw.random() < SYSTEM_SHARE else turns
            stream.write(json.dumps({"messages": messages}) + "\n")


def peak_bytes() -> int:
    """The most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepared(file: Path, tokenizer: Tokenizer, num_rows: int) -> tuple[Dataset, float]:
    """The data and the seconds that they took; refuses to time what is not all there."""
    began = time.perf_counter()
    data = load_data(file, tokenizer, 2048, notice=lambda said: print(f"  {said}", flush=True))
    seconds = time.perf_counter() - began
    counts = data.counts
    assert counts.rows == counts.examples == counts.turns == num_rows, counts
    assert 0 < counts.trained_tokens < counts.tokens and not counts.truncated
    return data, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=MILLION)
    args = parser.parse_args()
    tokenizer, *_ = _read_model(args.model, None)
    with tempfile.TemporaryDirectory(prefix="sloth-rows-") as folder:
        os.environ["SLOTH_CACHE"] = folder
        file = Path(folder) / "rows.jsonl"
        write_chats(file, args.rows)
        before = peak_bytes()
        data, seconds = prepared(file, tokenizer, args.rows)
        held = peak_bytes() - before
        again, again_seconds = prepared(file, tokenizer, args.rows)
        assert again.fingerprint == data.fingerprint
        size = file.stat().st_size
    rate = args.rows / seconds
    scaled = "" if args.rows == MILLION else f" (from {args.rows:,})"
    print(
        f"{args.rows:,} rows, {data.counts.tokens:,} tokens, {size / MIB:.0f} MiB of JSONL, on "
        f"{os.cpu_count()} cores\n"
        f"prepared    {rate:,.0f} rows/s, {MILLION / rate / 60:.1f} minutes a million{scaled}\n"
        f"memory      {held / MIB:.0f} MiB above the start\n"
        f"once more   {again_seconds:.1f} s, from what was kept"
    )


if __name__ == "__main__":
    main()
