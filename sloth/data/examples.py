"""Examples, held compactly: 5 bytes a token instead of a Python integer's 36, in memory or on disk.

    shard:  tokens int32 [N]   trained uint8 [N], 1 where the label is the token
            ends int64 [examples]   begins uint8 [examples], 1 where a row of the data begins

Back to back, a shard's example i is tokens[ends[i - 1]:ends[i]]. With a folder, a full shard goes
to a safetensors file and is mapped back, so that a million rows cost address space, not memory;
the pages that a step reads come from the disk cache. `Example` is what one row looks like to the
rest: lists of ids and labels, the labels at their token's own index (the loss shifts them), -100
where not trained.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from torch import Tensor

from sloth.constants import IGNORE_INDEX
from sloth.formats.tensor_file import write_tensors

SHARD_TOKENS = 2**24  # 80 MiB of tokens and marks: the most that preparing a file holds at once

Shard = dict[str, Tensor]
_TENSORS = ("tokens", "trained", "ends", "begins")


@dataclass(frozen=True)
class Example:
    """tokens and labels of equal length."""

    tokens: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """Labels that the loss sees; the first token is never a target."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Examples(Sequence[Example]):
    """Many examples. lengths: int32 [examples], tokens of each. rows: int64 [examples], from which
    row of the data each comes, counted from 0. in_use: kept as long as they are.
    """

    def __init__(self, shards: Sequence[Shard], in_use: object = None) -> None:
        self._shards, self.in_use = list(shards), in_use
        self._places: Tensor | None = None  # of a part: where its examples are among all
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard["ends"]))
        parts = [shard["ends"].diff(prepend=torch.zeros(1).long()) for shard in self._shards]
        self.lengths = torch.cat(parts).int() if parts else torch.zeros(0, dtype=torch.int32)
        begins = [shard["begins"] for shard in self._shards]
        self.rows = torch.cat(begins).long().cumsum(0) - 1 if begins else torch.zeros(0).long()

    def part(self, places: Tensor) -> Examples:
        """Some of them, by index; they share the shards."""
        assert self._places is None
        part = Examples(self._shards, self.in_use)
        part._places, part.lengths, part.rows = places, self.lengths[places], self.rows[places]
        return part

    @property
    def largest_id(self) -> int:
        """Of all tokens; a part's may be less."""
        return max((int(shard["tokens"].max()) for shard in self._shards), default=-1)

    def __len__(self) -> int:
        return self._starts[-1] if self._places is None else len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        at = at if self._places is None else int(self._places[at])
        number = bisect_right(self._starts, at) - 1
        shard, at = self._shards[number], at - self._starts[number]
        first, last = int(shard["ends"][at - 1]) if at else 0, int(shard["ends"][at])
        tokens = shard["tokens"][first:last].tolist()
        marks = shard["trained"][first:last].tolist()
        labels = [
            token if mark else IGNORE_INDEX for token, mark in zip(tokens, marks, strict=True)
        ]
        return Example(tokens, labels)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Examples):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class ExamplesWriter:
    """Collects examples into shards. folder: where full ones go; None keeps them in memory.

    files: name, size and sha256 of each file written. fingerprint: sha256 over all tokens and marks
    in order, so of what is trained on, whatever the shards.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.files: list[dict[str, Any]] = []
        self._shards: list[Shard] = []
        self._digest = hashlib.sha256()
        self._clear()

    def _clear(self) -> None:
        self._tokens, self._trained, self._ends = array("i"), bytearray(), array("q")
        self._begins = bytearray()

    def add(self, example: Example, begins_row: bool = True) -> None:
        """Append one. begins_row: whether it is the first of what its row became."""
        tokens = array("i", example.tokens)
        marks = bytes(label != IGNORE_INDEX for label in example.labels)
        self._digest.update(len(tokens).to_bytes(8, "little"))
        self._digest.update(tokens)
        self._digest.update(marks)
        self._tokens.extend(tokens)
        self._trained += marks
        self._ends.append(len(self._tokens))
        self._begins.append(begins_row)
        if len(self._tokens) >= SHARD_TOKENS:
            self._flush()

    def finish(self) -> tuple[Examples, str]:
        """All of them, and their fingerprint."""
        if self._ends:
            self._flush()
        return Examples(self._shards), self._digest.hexdigest()

    def _flush(self) -> None:
        shard = {
            "tokens": torch.frombuffer(self._tokens, dtype=torch.int32),
            "trained": torch.frombuffer(self._trained, dtype=torch.uint8),
            "ends": torch.frombuffer(self._ends, dtype=torch.int64),
            "begins": torch.frombuffer(self._begins, dtype=torch.uint8),
        }
        if self.folder is not None:
            name = f"{len(self._shards):05d}.safetensors"
            written = write_tensors(self.folder / name, shard)
            self.files.append({"name": name, **written})
            shard = map_shard(self.folder / name)
        self._shards.append(shard)
        self._clear()


def map_shard(file: Path) -> Shard:
    """A shard's tensors, mapped: read from the disk when they are looked at."""
    with safe_open(str(file), "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in _TENSORS}
