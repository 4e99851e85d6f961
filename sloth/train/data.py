"""Rows -> examples -> batches, counted; and the order of rows as a pure function of seed and epoch.

`load_data` reads a JSONL file, a list of rows or an iterator of them. Rows longer than max_length
are cut on the right; rows left without a trained token are dropped; both are counted, and a set
without any trained token is refused with the cause. Step s of a run reads rows [s R, (s + 1) R) of
the endless sequence epoch 0, epoch 1, ..., each a shuffle of its own, so the step number alone is
the data cursor. Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor

from sloth.errors import DataError
from sloth.train.encode import UNTRAINED, Example, encode_row, kind_of

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

Source = str | Path | Iterable[dict[str, Any]]

SHOWN_CHARACTERS = 1500
_TRAINED_STYLE = "bold green"
_CONTROL = {code: "\ufffd" for code in range(32) if chr(code) not in "\n\t"} | {127: "\ufffd"}


@dataclass
class DataCounts:
    """What became of the rows. Truncated and dropped count examples; a dropped one is not kept."""

    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    truncated: int = 0
    dropped_by_truncation: int = 0
    dropped_by_mask: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    @property
    def dropped(self) -> int:
        """Examples without a trained token."""
        return self.dropped_by_truncation + self.dropped_by_mask

    def summary(self) -> str:
        """One line with the counts and shares."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        seen = max(self.examples + self.dropped, 1)
        return (
            f"{self.rows} rows ({kinds}): {self.examples} examples, {self.tokens} tokens, "
            f"{self.trained_tokens / max(self.tokens, 1):.1%} trained; "
            f"{self.truncated} truncated ({self.truncated / seen:.1%}), "
            f"{self.dropped} dropped ({self.dropped / seen:.1%})"
        )


@dataclass(frozen=True)
class Dataset:
    """Examples ready for batches. fingerprint: sha256 over their tokens and labels, in order."""

    name: str
    examples: list[Example]
    counts: DataCounts
    fingerprint: str


@dataclass(frozen=True)
class Batch:
    """tokens and labels [B, T], right-padded; num_trained labels count after the shift."""

    tokens: Tensor
    labels: Tensor
    num_tokens: int
    num_trained: int


def load_data(source: Source, tokenizer: Tokenizer, max_length: int, name: str = "data") -> Dataset:
    """Read, encode, mask and count every row of `source`.

    Raises DataError for malformed rows (place, field, expectation), for no rows, and for no
    trained token.
    """
    counts, examples, longest = DataCounts(), [], 0
    if isinstance(source, (str, Path)):
        name = str(source)
    for where, row in _rows(source, name):
        kind = kind_of(row, where)
        counts.rows += 1
        counts.kinds[kind] = counts.kinds.get(kind, 0) + 1
        for example in encode_row(tokenizer, row, where):
            longest = max(longest, len(example.tokens))
            cut = Example(example.tokens[:max_length], example.labels[:max_length])
            counts.truncated += len(cut.tokens) < len(example.tokens)
            num_trained = cut.num_trained
            if not num_trained:
                counts.dropped_by_truncation += example.num_trained > 0
                counts.dropped_by_mask += example.num_trained == 0
                continue
            counts.examples += 1
            counts.tokens += len(cut.tokens)
            counts.trained_tokens += num_trained
            examples.append(cut)
    if not counts.rows:
        raise DataError(f"{name} holds no rows")
    if not examples:
        raise DataError(
            f"{name}: nothing to train on in {counts.rows} rows; "
            f"{_why(counts, max_length, longest)}"
        )
    return Dataset(name, examples, counts, _fingerprint(examples))


def _why(counts: DataCounts, max_length: int, longest: int) -> str:
    causes = []
    if counts.dropped_by_truncation:
        causes.append(
            f"truncation: {counts.dropped_by_truncation} lost every trained token to "
            f"max_length={max_length} (the longest has {longest} tokens); raise max_length"
        )
    if counts.dropped_by_mask:
        causes.append(
            f"mask: {counts.dropped_by_mask} hold nothing that is trained (chat rows need a "
            "message with role assistant, other rows a text)"
        )
    return "; ".join(causes)


def _fingerprint(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(array("q", example.tokens).tobytes())
        digest.update(array("q", example.labels).tobytes())
    return digest.hexdigest()


def _rows(source: Source, name: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row; the place is file:line or name[index]."""
    if isinstance(source, (str, Path)):
        yield from _read_jsonl(Path(source))
    elif isinstance(source, dict) or not isinstance(source, Iterable):
        raise DataError(f"{name}: expected a JSONL path or rows, got a {type(source).__name__}")
    else:
        for index, row in enumerate(source):
            yield f"{name}[{index}]", row


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with one JSON object per line, UTF-8, blank lines and a byte-order mark
    allowed.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"data file {path} {what}; expected a file with one JSON object per line")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
            except RecursionError as error:
                raise DataError(f"{where}: JSON nested too deeply") from error
            except ValueError as error:
                raise DataError(
                    f"{where}: expected one JSON object on the line: {error}"
                ) from error
            if isinstance(row, list):
                raise DataError(f"{where}: expected one JSON object per line, got a JSON list")
            yield where, row


# -- what a person sees --------------------------------------------------------------------------


def describe_row(example: Example, tokenizer: Tokenizer) -> Text:
    """The row as the model reads it, trained spans in `[+ ... +]` and, on a terminal, in green.

    Decoded with its special tokens and cut to a screenful; control characters are replaced.
    `.plain` is the string.
    """
    text = Text()
    pairs = list(zip(example.tokens, [UNTRAINED, *example.labels[1:]], strict=True))
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != UNTRAINED):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        piece = piece.translate(_CONTROL)
        room = SHOWN_CHARACTERS - len(text)
        cut = f"{piece[:room]} ..." if len(piece) > room else piece
        text.append(f"[+{cut}+]" if trained else cut, _TRAINED_STYLE if trained else "dim")
        if len(piece) > room:
            break
    return text


# -- order and batches ---------------------------------------------------------------------------


@lru_cache(maxsize=2)
def order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The rows of an epoch, shuffled: a pure function of its arguments."""
    rows = list(range(num_rows))
    random.Random(f"sloth rows {seed} {epoch}").shuffle(rows)
    return tuple(rows)


@dataclass(frozen=True)
class StepPlan:
    """Which rows each optimizer step reads. rows_per_step = batch_size * grad_accum."""

    num_rows: int
    batch_size: int
    grad_accum: int
    seed: int
    total_rows: int

    @classmethod
    def of(
        cls,
        num_rows: int,
        batch_size: int,
        grad_accum: int,
        seed: int,
        max_steps: int | None,
        epochs: float | None,
    ) -> StepPlan:
        """Whichever of max_steps and epochs ends first; one epoch when neither is given."""
        limits = []
        if max_steps is not None:
            limits.append(max_steps * batch_size * grad_accum)
        if epochs is not None or max_steps is None:
            limits.append(max(1, round((epochs or 1.0) * num_rows)))
        return cls(num_rows, batch_size, grad_accum, seed, min(limits))

    @property
    def rows_per_step(self) -> int:
        """Rows of a whole step; the last one may have fewer."""
        return self.batch_size * self.grad_accum

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.total_rows / self.rows_per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return min(step * self.rows_per_step, self.total_rows) / self.num_rows

    def rows(self, step: int) -> list[int]:
        """Row indices of a step, in order."""
        first = step * self.rows_per_step
        places = range(first, min(first + self.rows_per_step, self.total_rows))
        return [
            order(self.num_rows, self.seed, place // self.num_rows)[place % self.num_rows]
            for place in places
        ]

    def micro_batches(self, step: int) -> list[list[int]]:
        """The step's rows, batch_size at a time."""
        rows = self.rows(step)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Right-padded int64 tensors. Padding is seen by no real token (attention is causal) nor
    trained.
    """
    length = max(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), length), pad_id, dtype=torch.long)
    labels = torch.full((len(examples), length), UNTRAINED, dtype=torch.long)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    num_tokens = sum(len(example.tokens) for example in examples)
    return Batch(tokens, labels, num_tokens, sum(example.num_trained for example in examples))
