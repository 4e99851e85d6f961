"""The header of a GGUF file: its metadata and where each tensor lies.

    "GGUF" | version u32 | tensors u64 | keys u64 | (key, type u32, value) ... |
    (name, dims u32, dim u64 ..., type u32, offset u64) ... | padding to the alignment | data

All little-endian; a string is its length (u64) and UTF-8 bytes; an array is its element type (u32),
its length (u64) and the elements. Dimensions are stored innermost first, offsets count from the
data. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Read here rather than with the `gguf` package, whose reader takes 14 s for the 400,000 strings of a
Llama 3 vocabulary (this one: 0.3 s) and believes every count that a damaged file states.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sloth.errors import CheckpointMismatch

MAX_KEYS = 100_000
MAX_TENSORS = 200_000
MAX_DIMS = 4

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it; start counts from the file's first byte."""

    shape: tuple[int, ...]  # outermost first, as torch has it
    type_id: int
    start: int


@dataclass(frozen=True)
class Header:
    """Everything before the data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    size_bytes: int  # of the whole file


def read_header(path: Path) -> Header:
    """Parse the header of `path`. Raises CheckpointMismatch for anything but a sound GGUF file."""
    size = path.stat().st_size
    if size < 24:
        raise CheckpointMismatch(f"{path} has {size} bytes, too few for a GGUF file")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        try:
            return _Parser(view, size).header()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise CheckpointMismatch(f"{path} is damaged or no GGUF file: {error}") from error


class _Parser:
    def __init__(self, view: mmap.mmap, size: int) -> None:
        self.view, self.size, self.at = view, size, 0

    def header(self) -> Header:
        if self.view[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; versions 2 and 3, little-endian, are read")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        if num_keys > MAX_KEYS or num_tensors > MAX_TENSORS:
            raise ValueError(f"it states {num_keys} keys and {num_tensors} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {key!r} appears twice")
            metadata[key] = self.value(self.number("I"))
        tensors = self.tensors(num_tensors)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data = -(-self.at // alignment) * alignment
        placed = {
            name: TensorEntry(entry.shape, entry.type_id, data + entry.start)
            for name, entry in tensors.items()
        }
        return Header(metadata, placed, self.size)

    def tensors(self, count: int) -> dict[str, TensorEntry]:
        """Entries whose start still counts from the data."""
        found: dict[str, TensorEntry] = {}
        for _ in range(count):
            name = self.string()
            if name in found:
                raise ValueError(f"the tensor {name!r} appears twice")
            num_dims = self.number("I")
            if num_dims > MAX_DIMS:
                raise ValueError(f"{name} has {num_dims} dimensions")
            shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
            found[name] = TensorEntry(shape, self.number("I"), self.number("Q"))
        return found

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.view, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        end = self.at + length
        if end > self.size:
            raise ValueError(f"a text of {length} bytes passes the file's end")
        text = self.view[self.at : end].decode("utf-8")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        item, count = self.number("I"), self.number("Q")
        least = 8 if item == _STRING else struct.calcsize(f"<{_SCALARS.get(item, 'B')}")
        if count * least > self.size - self.at:
            raise ValueError(f"an array of {count} passes the file's end")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise ValueError(f"an array of type {item}")
        values = list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self.view, self.at))
        self.at += count * least
        return values
