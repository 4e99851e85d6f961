"""What a person should see of a data set before training on it: `sloth data check`.

Everything comes from the same `load_data` that training calls, under the same settings, so the
counts are those of the run, and what training would refuse is refused here with the same words.

    time of an epoch = tokens * 4 N / (0.7 F)

N: parameters; 4 N: operations a token of a LoRA step, forward and to the inputs; F: what one large
matrix product reaches on this machine. Take it for the order of magnitude.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from sloth.data.batches import StepPlan
from sloth.data.dataset import Dataset, Notice, require_vocabulary
from sloth.data.examples import Examples
from sloth.data.held_out import load_both
from sloth.data.settings import RunSettings
from sloth.data.sources import Source

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

OPERATIONS_PER_PARAMETER, REACHED = 4, 0.7
HISTOGRAM_LINES, HISTOGRAM_WIDTH = 10, 40
_PROBE_SECONDS = 0.3


class BatchSettings(RunSettings, Protocol):
    """Of a run's settings, those that decide how its rows become batches."""

    @property
    def batch_size(self) -> int: ...
    @property
    def grad_accum(self) -> int: ...


@dataclass(frozen=True)
class DataCheck:
    """What was found. duplicates: examples (or pairs) equal to an earlier one; leaked: held-out
    ones that are trained on as well; padding: share of a padded epoch's batches.
    """

    data: Dataset
    held_out: Dataset | None
    duplicates: int
    leaked: int
    padding: float
    steps_per_epoch: int

    def lines(self, max_length: int, seconds: float | None) -> dict[str, str]:
        """Names and findings, in the order to show them. seconds: of an epoch, if known."""
        counts, unit = self.data.counts, "pairs" if self.data.pairs else "examples"
        total = max(self.data.num_rows if self.data.pairs else counts.examples, 1)
        found = {
            "data": self.data.name,
            "format": ", ".join(f"{kind} ({count} rows)" for kind, count in counts.kinds.items()),
            "examples": f"{counts.examples}, longest {counts.longest} tokens",
            "too long": _too_long(self.data, max_length),
            "malformed": f"{counts.malformed} rows skipped ({counts.malformed_share:.1%})",
            "not trained": f"{counts.dropped_by_mask} examples without a trained token, dropped",
            "tokens per epoch": f"{counts.tokens:,}, of which trained {counts.trained_tokens:,} "
            f"({counts.trained_tokens / max(counts.tokens, 1):.1%})",
            "end of turn": f"{counts.turns - counts.unstopped} of {counts.turns} assistant turns "
            "end in a stop token",
            "double BOS": f"{counts.double_bos} rows",
            "blank answers": f"{counts.empty} rows",
            "duplicates": f"{self.duplicates} {unit} ({self.duplicates / total:.1%})",
            "masks": f"{counts.by_prefixes} rows needed more than one rendering",
            "steps per epoch": str(self.steps_per_epoch),
            "rows": self._rows(),
            "epoch takes": "unknown" if seconds is None else f"about {_duration(seconds)} here",
            "fingerprint": self.data.fingerprint[:16],
        }
        if self.data.pairs:
            found["pairs"] = (
                f"{self.data.num_rows}; {counts.dropped_with_other} examples dropped with their "
                f"other half; {counts.same_answers} pairs have the same answer twice"
            )
        if not counts.turns:
            del found["end of turn"], found["masks"]
        if self.held_out is not None:
            found["held out"] = f"{self.held_out.summary()}; {self.leaked} are trained on, too"
        return found

    def _rows(self) -> str:
        if self.data.packing is not None:
            return f"{self.data.num_rows} packed ones, {self.data.packing.fill:.1%} full"
        each = "a pair of examples" if self.data.pairs else "one example"
        return f"{self.data.num_rows}, {each} each; {self.padding:.1%} of padded batches is padding"


def check_data(
    source: Source,
    tokenizer: Tokenizer,
    settings: BatchSettings,
    notice: Notice | None = None,
    vocab_size: int | None = None,
) -> DataCheck:
    """Look at data as training would. vocab_size: rows of the model's embedding, if known. Raises
    what training would raise.
    """
    data, held_out = load_both(settings, source, tokenizer, notice)
    if vocab_size is not None:
        for one in filter(None, (data, held_out)):
            require_vocabulary(one, vocab_size)
    plan = StepPlan.of(
        data.num_rows, settings.batch_size, settings.grad_accum, settings.seed, None, 1.0
    )
    lengths, padded = data.row_lengths(), 0
    for step in range(plan.num_steps):
        for rows in plan.micro_batches(step):
            own = [lengths[row] for row in rows]
            padded += len(own) * max(own)
    hashes = list(_hashes(data))
    seen = set(hashes)
    leaked = 0 if held_out is None else sum(one in seen for one in _hashes(held_out))
    padding = 1 - data.counts.tokens / padded
    return DataCheck(data, held_out, len(hashes) - len(seen), leaked, padding, plan.num_steps)


def _hashes(data: Dataset) -> Iterator[int]:
    """One number for each example, or pair of them."""
    tokens = (tuple(example.tokens) for example in data.examples)
    return map(hash, zip(tokens, tokens, strict=True) if data.pairs else tokens)


def _too_long(data: Dataset, max_length: int) -> str:
    counts = data.counts
    seen = max(counts.examples + counts.dropped, 1)
    said = [
        f"{counts.truncated} truncated ({counts.truncated / seen:.1%}), losing "
        f"{counts.cut_tokens:,} tokens; {counts.dropped_by_truncation} of them lost every trained "
        "token and are dropped"
    ]
    if counts.split:
        said = [f"{counts.split} split into {counts.pieces}"]
    if counts.dropped_by_length:
        said = [f"{counts.dropped_by_length} dropped ({counts.dropped_by_length / seen:.1%})"]
    return f"{said[0]} (max_length {max_length})"


def histogram(examples: Examples) -> list[str]:
    """Lines of a histogram of lengths: from, to, count, bar."""
    lengths = examples.lengths
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // HISTOGRAM_LINES)
    counts = torch.bincount((lengths - low) // width).tolist()
    digits, tallest = len(str(low + width * len(counts))), max(counts)
    lines = []
    for index, count in enumerate(counts):
        first = low + index * width
        last = first + width - 1
        bar = "#" * -(-count * HISTOGRAM_WIDTH // tallest)
        lines.append(f"{first:>{digits}} to {last:>{digits}}  {count:>8}  {bar}".rstrip())
    return lines


def epoch_seconds(tokens: int, num_parameters: int) -> float:
    """About what an epoch takes on this machine."""
    operations = tokens * OPERATIONS_PER_PARAMETER * num_parameters
    return operations / (REACHED * _operations_per_second())


def _operations_per_second() -> float:
    """What a large matrix product reaches: bf16 on a GPU, fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.ones(size, size, device="cuda" if cuda else "cpu", dtype=dtype)
    count, seconds = 0, 0.0
    a @ a
    while seconds < _PROBE_SECONDS:
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        count += 1
    return count * 2 * size**3 / seconds


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"
