"""Safetensors folders: guarded reading, one tensor at a time, and writing shards with an index.

The safetensors library refuses most damaged files by itself; before it opens one, the header is
looked at here, because a legal header can still be a bomb (millions of empty tensors), hold one
name twice, or be named by an index that points outside the folder. Pickled weights are refused:
reading one runs its code.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sloth.errors import CheckpointMismatch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 200_000
MAX_NAME_CHARACTERS = 255  # of a file, on any common file system
MAX_SHARD_BYTES = 5_000_000_000

_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what its header says: dtype by safetensors' name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


class SafetensorsFolder:
    """Tensors of a model folder by name. Raises CheckpointMismatch for anything unsafe or damaged.

    names: every tensor's `TensorInfo`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, TensorInfo] = {}
        index = folder / INDEX_NAME
        weight_map = _read_index(index) if index.exists() else None
        files = _shards(folder, weight_map)
        for file in files:
            for name, info in read_header(file).items():
                if name in self.names:
                    raise CheckpointMismatch(
                        f"{name} is in two files: {self.names[name].file.name} and {file.name}"
                    )
                self.names[name] = info
        for name, shard in (weight_map or {}).items():
            if name not in self.names or self.names[name].file.name != shard:
                raise CheckpointMismatch(f"{index} says {name} is in {shard}, but it is not there")

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` on the CPU; it may map the file, so copy what is kept."""
        info = self.names[name]
        with _damage_named(info.file), safe_open(info.file, framework="pt", device="cpu") as file:
            return file.get_tensor(name)


def stored_names(folder: Path) -> Collection[str] | None:
    """Names of a folder's tensors, without reading any: those of the index, which may be there
    before its shards are, else of the one file; None where there is neither.

    Raises CheckpointMismatch for an index or a file that is unsafe or damaged.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        return _read_index(index).keys()
    return read_header(single).keys() if single.is_file() else None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """What a safetensors file says it holds. Raises CheckpointMismatch before allocating much."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointMismatch(
                f"{file} has a header of {length} bytes in a file of {size}; it is damaged or no "
                f"safetensors file (at most {MAX_HEADER_BYTES} bytes are read)"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointMismatch(f"the header of {file} cannot be read: {error}") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise CheckpointMismatch(
            f"the header of {file} is no object of at most {MAX_TENSORS} tensors"
        )
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if not _describes_tensor(entry):
            raise CheckpointMismatch(f"the header of {file} does not describe {name[:200]}")
        infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), file)
    with _damage_named(file), safe_open(file, framework="pt", device="cpu"):
        pass  # the library checks offsets, overlaps, holes and the file's length
    return infos


def _describes_tensor(entry: Any) -> bool:
    """Whether a header's entry has a tensor's parts, each of its type."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    return all(
        isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)
        for sizes in (entry.get("shape"), entry.get("data_offsets"))
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} appears twice")
        result[key] = value
    return result


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointMismatch(f"{file} is damaged or incomplete: {error}") from error


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, each a plain name inside the folder."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in entries.values()):
            raise TypeError("a file name that is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointMismatch(f"{index} is no shard index: {error!r:.200}") from error
    for shard in set(entries.values()):
        is_plain = _SHARD_NAME.fullmatch(shard) and len(shard) <= MAX_NAME_CHARACTERS
        if not is_plain or not _inside(index.parent, index.parent / shard):
            raise CheckpointMismatch(
                f"{index} names the shard {shard[:200]!r}; only plain *.safetensors names in the "
                "folder are read"
            )
    return entries


def _inside(folder: Path, file: Path) -> bool:
    """Whether a file lies in its folder. A hub cache links to blobs of the same repository."""
    resolved = file.resolve()
    if resolved.is_relative_to(folder.resolve()):
        return True
    blobs = folder.resolve().parent.parent / "blobs"
    return folder.resolve().parent.name == "snapshots" and resolved.parent == blobs


def _shards(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE_NAME]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        outside = [file.name for file in files if not _inside(folder, file)]
        if outside:
            raise CheckpointMismatch(f"{folder}: {outside[0]} links to a place outside the folder")
        return files
    pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind))
    if weight_map is None and pickles:
        raise CheckpointMismatch(
            f"{folder} holds only pickled weights ({pickles[0]}); reading them runs code from the "
            "file. Convert them first, in an environment you trust: load the model with "
            "transformers and call save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointMismatch(f"{folder} lacks {', '.join(missing[:4])}")


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write (name, tensor) pairs as one file, or as shards with an index; returns the files.

    At most one shard is held in memory. Files get the mode that the umask gives.
    """
    names: list[list[str]] = []
    files: list[Path] = []
    total_bytes = total_parameters = 0
    for shard in _grouped(tensors, max_shard_bytes):
        file = folder / f"model-{len(files) + 1:05d}.partial.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        set_mode_by_umask(file)
        names.append(list(shard))
        files.append(file)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        total_parameters += sum(tensor.numel() for tensor in shard.values())
    if len(files) == 1:
        return [files[0].rename(folder / SINGLE_NAME)]
    weight_map: dict[str, str] = {}
    for position, (file, members) in enumerate(zip(files, names, strict=True)):
        final = folder / f"model-{position + 1:05d}-of-{len(files):05d}.safetensors"
        files[position] = file.rename(final)
        weight_map |= dict.fromkeys(members, final.name)
    metadata = {"total_size": total_bytes, "total_parameters": total_parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _grouped(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
    yield shard


def set_mode_by_umask(file: Path) -> None:
    """safetensors writes files as 0600; give them the mode any new file would have."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
