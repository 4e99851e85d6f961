"""Models from GGUF files, as if they were a Hugging Face folder: config, tensors, tokenizer files.

Tensor names are mapped (`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`), values
dequantised to fp32 by the `gguf` package, one tensor at a time, and brought in Hugging Face's
layout: gguf_archs.py says per architecture what that takes, gguf_config.py gives config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.formats.gguf_config import ROPE_DIVISORS, arch_of_file, read_config
from sloth.formats.gguf_header import TensorEntry, read_header
from sloth.formats.gguf_tokenizer import rebuild_tokenizer


class GGUFFile:
    """A GGUF file under Hugging Face names.

    config: the config.json this model would have. names: tensor name -> shape; a tensor that has no
    counterpart keeps its own name, so that loading reports it. metadata: the file's own keys.
    Raises CheckpointMismatch for a damaged file, UnsupportedConfig for a model that cannot be
    represented.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._gguf = gguf_package("reading")
        header = read_header(self.path)
        self.metadata = header.metadata
        self._check_extents(header.tensors, header.size_bytes)
        self.arch = arch_of_file(self.metadata)
        self._entries = {self.arch.hf_name(name): entry for name, entry in header.tensors.items()}
        divisors = self._entries.get(ROPE_DIVISORS)
        with self._sensible_metadata():
            self.config = read_config(
                self.metadata,
                {name: entry.shape for name, entry in self._entries.items()},
                None if divisors is None else self._dequantise(ROPE_DIVISORS, divisors),
            )
        self._entries.pop(ROPE_DIVISORS, None)
        self.names = {name: entry.shape for name, entry in self._entries.items()}

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` in fp32 on the CPU, in Hugging Face's layout."""
        value = self._dequantise(name, self._entries[name])
        return self.arch.from_file(name, value, self.config)

    def tokenizer_files(self) -> dict[str, str]:
        """tokenizer.json, tokenizer_config.json, generation_config.json from the metadata."""
        with self._sensible_metadata():
            return rebuild_tokenizer(self.metadata)

    @contextmanager
    def _sensible_metadata(self) -> Iterator[None]:
        """Numbers where texts belong, heads that are zero, and the like."""
        try:
            yield
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise CheckpointMismatch(f"{self.path}: its metadata make no sense: {error}") from error

    def _bytes_of(self, name: str, entry: TensorEntry) -> tuple[int, Any]:
        """(size in bytes, quantization type) of a tensor."""
        try:
            kind = self._gguf.GGMLQuantizationType(entry.type_id)
        except ValueError as error:
            raise UnsupportedConfig(
                f"{self.path}: {name} is stored in a type ({entry.type_id}) that the installed "
                "gguf package does not know; `pip install -U gguf` may help"
            ) from error
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if entry.shape and entry.shape[-1] % block:
            raise CheckpointMismatch(
                f"{self.path}: {name} has rows of {entry.shape[-1]}, which {kind.name} cannot "
                f"store in its blocks of {block}"
            )
        return math.prod(entry.shape) // block * block_bytes, kind

    def _check_extents(self, tensors: dict[str, TensorEntry], file_bytes: int) -> None:
        for name, entry in tensors.items():
            size, _ = self._bytes_of(name, entry)
            if entry.start + size > file_bytes:
                raise CheckpointMismatch(
                    f"{self.path} ends before its tensor {name} does; the file is cut short"
                )

    def _dequantise(self, name: str, entry: TensorEntry) -> Tensor:
        import numpy

        size, kind = self._bytes_of(name, entry)
        raw = numpy.fromfile(self.path, dtype=numpy.uint8, count=size, offset=entry.start)
        rows = raw.reshape(*entry.shape[:-1], -1)
        try:
            values = self._gguf.quants.dequantize(rows, kind)
        except NotImplementedError as error:
            raise UnsupportedConfig(
                f"{self.path}: {name} is stored as {kind.name}, which the gguf package cannot "
                "dequantise"
            ) from error
        return torch.from_numpy(values.astype(numpy.float32, copy=False)).reshape(entry.shape)


def gguf_package(doing: str) -> Any:
    """The `gguf` package. Raises UnsupportedConfig, saying what to install for `doing` a file."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedConfig(
            f"{doing} a GGUF file needs the gguf package: pip install 'sloth-llm[gguf]'"
        ) from error
    return gguf
