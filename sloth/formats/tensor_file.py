"""Writing safetensors as a stream: one tensor at a time from its device to the file, hashed on the
way.

    8 bytes: header length   header: JSON {name: {dtype, shape, data_offsets}}   the tensors' bytes

The library's own writer wants all tensors on the CPU at once, hides the errno of a full disk in a
text, and leaves the hash to a second reading. Reading stays with the library. Format:
https://huggingface.co/docs/safetensors, little-endian, no holes, larger dtypes first so that
every tensor is aligned.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file; its size and sha256, of what was handed to the system. Raises OSError."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in (len(text).to_bytes(8, "little"), text):
            stream.write(part)
            digest.update(part)
        for name in names:
            held = tensors[name].detach().cpu().contiguous()
            if held.nbytes:  # an empty tensor has no address
                view = (ctypes.c_char * held.nbytes).from_address(held.data_ptr())
                stream.write(view)
                digest.update(view)
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """About what `write_tensors` will take on the disk."""
    return sum(tensor.nbytes + 160 + len(name) for name, tensor in tensors.items())


def are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())
