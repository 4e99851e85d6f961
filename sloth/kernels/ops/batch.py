"""Many small matrices by one launch: NF4 codes unpacked, or values cast, scaled and copied.

Either may multiply each row by a number of its own, a gain, which is how DoRA's magnitudes come
into a layer's matrices (`dora.py`).

A layer's scratch is made of seven frozen matrices and fourteen LoRA matrices. One launch for each
would cost more than the work: a 1024 x 4096 matrix unpacks in 4 us. So a batch writes the
addresses, shapes and strides of its matrices into a table on the device, once, and every program
finds its own in it.

Bytes moved: those of the copies. Rounding: NF4 as in `nf4.py`, a gain before it is rounded; a copy
is cast to fp32, scaled, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.engine import HAS_TRITON, engine_for, jit, tl, triton, triton_dtype
from sloth.kernels.ops.nf4 import (
    BLOCKSIZE,
    NESTED_BLOCKSIZE,
    UNPACK_BLOCKS,
    UNPACK_OPTIONS,
    NF4Weight,
    nf4_code,
    nf4_dequantize_reference,
    num_programs,
    unpack_blocks,
)
from sloth.kernels.rows import compute_dtype

# Numbers a matrix has in the table of a batch.
_NF4_FIELDS, _COPY_FIELDS = 10, 9
# Rows and columns of one program's tile of a copy: thin LoRA matrices stand both ways.
_TILE = 64


@jit
def part_of(program, table_ptr, NUM_PARTS: tl.constexpr, FIELDS: tl.constexpr):
    """Row of the table that a program works on; its first field is the part's first program."""
    part = 0
    for i in tl.static_range(1, NUM_PARTS):
        part += (program >= tl.load(table_ptr + i * FIELDS)).to(tl.int32)
    return part


@jit
def _nf4_batch_kernel(
    table_ptr,
    code_ptr,
    map_ptr,
    NUM_PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    GAINS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A row of the table is a matrix: its first program, addresses, element count, columns, row
    stride, address of its gains."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + part_of(program, table_ptr, NUM_PARTS, FIELDS) * FIELDS
    codes_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.uint8))
    absmax_address = tl.load(row_ptr + 2)
    if NESTED:
        absmax_ptr = absmax_address.to(tl.pointer_type(tl.uint8))
    else:
        absmax_ptr = absmax_address.to(tl.pointer_type(tl.float32))
    nested_absmax_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    offset_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(OUT))
    gains_ptr = tl.load(row_ptr + 9).to(tl.pointer_type(tl.float32))
    if WHOLE_ROWS:
        codes_ptr = tl.multiple_of(codes_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
    unpack_blocks(
        codes_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        offset_ptr,
        code_ptr,
        map_ptr,
        gains_ptr,
        out_ptr,
        (program - tl.load(row_ptr)) * BLOCKS,
        tl.load(row_ptr + 6),
        tl.load(row_ptr + 7),
        tl.load(row_ptr + 8),
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        NESTED,
        GAINS,
        WHOLE_ROWS,
        BLOCKS,
    )


@jit
def _copy_batch_kernel(
    table_ptr,
    scales_ptr,
    NUM_PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    SOURCE: tl.constexpr,
    OUT: tl.constexpr,
    GAINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row of the table is a matrix: its first program, addresses, rows, columns, row strides,
    tiles a row, and the address of its gains."""
    program = tl.program_id(0).to(tl.int64)
    part = 0
    for i in range(1, NUM_PARTS):
        part += (program >= tl.load(table_ptr + i * FIELDS)).to(tl.int32)
    row_ptr = table_ptr + part * FIELDS
    source_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(SOURCE))
    out_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(OUT))
    tiles = tl.load(row_ptr + 7)
    tile = program - tl.load(row_ptr)
    rows = (tile // tiles) * TILE + tl.arange(0, TILE)[:, None]
    cols = (tile % tiles) * TILE + tl.arange(0, TILE)[None, :]
    mask = (rows < tl.load(row_ptr + 3)) & (cols < tl.load(row_ptr + 4))
    scale = tl.load(scales_ptr + part + 0 * rows)
    read = mask & (scale != 0)  # else zeros, not 0 times what may be infinite
    x = tl.load(source_ptr + rows * tl.load(row_ptr + 5) + cols, mask=read, other=0.0)
    y = x.to(tl.float32) * scale
    if GAINS:
        gains_ptr = tl.load(row_ptr + 8).to(tl.pointer_type(tl.float32))
        y *= tl.load(gains_ptr + rows, mask=rows < tl.load(row_ptr + 3), other=0.0)
    tl.store(out_ptr + rows * tl.load(row_ptr + 6) + cols, y.to(OUT), mask=mask)


_OUT = tl.bfloat16 if HAS_TRITON else None
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_nf4_batch_kernel": [
        {
            "signature": {"table_ptr": "*i64", "code_ptr": "*fp32", "map_ptr": "*fp32"},
            "constexprs": {
                "NUM_PARTS": 7,
                "FIELDS": _NF4_FIELDS,
                "OUT": _OUT,
                "BLOCKSIZE": BLOCKSIZE,
                "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE,
                "NESTED": True,
                "GAINS": gains,
                "WHOLE_ROWS": True,
                "BLOCKS": UNPACK_BLOCKS,
            },
            "options": UNPACK_OPTIONS,
        }
        for gains in (False, True)
    ],
    "_copy_batch_kernel": [
        {
            "signature": {"table_ptr": "*i64", "scales_ptr": "*fp32"},
            "constexprs": {
                "NUM_PARTS": 14,
                "FIELDS": _COPY_FIELDS,
                "SOURCE": tl.float32 if HAS_TRITON else None,
                "OUT": _OUT,
                "GAINS": gains,
                "TILE": _TILE,
            },
        }
        for gains in (False, True)
    ],
}


class NF4Part(NamedTuple):
    """An NF4 matrix, the view [out, in] that takes it, and fp32 gains [out] of its rows or None."""

    weight: NF4Weight
    out: Tensor
    gains: Tensor | None = None


class CopyPart(NamedTuple):
    """out [n, k] = scale * source [n, k], row i times gains[i] (fp32) where there are gains.

    A scale of 0 gives zeros, whatever the source holds.
    """

    source: Tensor
    out: Tensor
    scale: float
    gains: Tensor | None = None


class NF4Batch:
    """Matrices that are unpacked together, each into a view of its own: one launch.

    parts: each `out` of the dtype to unpack to, inner stride 1, any row stride. The addresses are
    read once, here, the gains at every run; the batch keeps its tensors alive.
    """

    def __init__(self, parts: Sequence[NF4Part]) -> None:
        self.parts = list(parts)
        self._launches: list[Callable[[], object]] = []
        if not self.parts:
            return
        if engine_for(self.parts[0].out) == "torch":
            self._launches = [partial(_unpack_torch, *part) for part in self.parts]
            return
        kinds: dict[tuple[bool, bool, bool], list[NF4Part]] = {}
        for part in self.parts:
            w, out, gains = part
            aligned = w.codes.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
            whole_rows = aligned and w.shape[1] % w.blocksize == 0 and out.stride(0) % 8 == 0
            kind = w.nested_absmax is not None, whole_rows, gains is not None
            kinds.setdefault(kind, []).append(part)
        self._launches = [_batch_launch(same, *kind) for kind, same in kinds.items()]

    def run(self) -> None:
        """Unpack every part."""
        for launch in self._launches:
            launch()


def _unpack_torch(w: NF4Weight, out: Tensor, gains: Tensor | None) -> None:
    if gains is None:
        out.copy_(nf4_dequantize_reference(w, out.dtype))
    else:
        out.copy_(nf4_dequantize_reference(w, gains.dtype) * gains[:, None])


def _batch_launch(
    parts: list[NF4Part], nested: bool, whole_rows: bool, has_gains: bool
) -> Callable[[], object]:
    rows, programs = [], 0
    for w, out, gains in parts:
        tensors = (w.codes, w.absmax, w.nested_absmax, w.offset, out)
        addresses = [_address(x) for x in tensors]
        sizes = (w.shape[0] * w.shape[1], w.shape[1], out.stride(0))
        rows.append([programs, *addresses, *sizes, _address(gains)])
        programs += num_programs(w)
    device, dtype = parts[0].out.device, parts[0].out.dtype
    table, code = torch.tensor(rows, device=device), nf4_code(device)
    return partial(
        _nf4_batch_kernel[(programs,)],
        table,
        code,
        parts[0].weight.nested_map if nested else code,
        NUM_PARTS=len(parts),
        FIELDS=_NF4_FIELDS,
        OUT=triton_dtype(dtype),
        BLOCKSIZE=parts[0].weight.blocksize,
        NESTED_BLOCKSIZE=parts[0].weight.nested_blocksize,
        NESTED=nested,
        GAINS=has_gains,
        WHOLE_ROWS=whole_rows,
        BLOCKS=UNPACK_BLOCKS,
        **UNPACK_OPTIONS,
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class CopyBatch:
    """out = scale * source for many matrices, cast to out's dtype: one launch.

    parts: sources and outs with inner stride 1. The addresses are read once, here, the values and
    gains at every run; the batch keeps its tensors alive.
    """

    def __init__(self, parts: Sequence[CopyPart]) -> None:
        self.parts = list(parts)
        self._launches: list[Callable[[], object]] = []
        if not self.parts:
            return
        if engine_for(self.parts[0].out) == "torch":
            self._launches = [partial(_copy_torch, *part) for part in self.parts]
            return
        kinds: dict[tuple[torch.dtype, bool], list[CopyPart]] = {}
        for part in self.parts:
            kinds.setdefault((part.source.dtype, part.gains is not None), []).append(part)
        self._launches = [_copy_launch(same, kind[1]) for kind, same in kinds.items()]

    def run(self) -> None:
        """Copy every part."""
        for launch in self._launches:
            launch()


def _copy_torch(source: Tensor, out: Tensor, scale: float, gains: Tensor | None) -> None:
    if scale == 0:
        out.zero_()
        return
    wide = source.detach().to(compute_dtype(source.dtype)) * scale
    out.copy_(wide if gains is None else wide * gains[:, None])


def _copy_launch(parts: list[CopyPart], has_gains: bool) -> Callable[[], object]:
    rows, programs = [], 0
    for source, out, _, gains in parts:
        num_rows, num_cols = source.shape
        tiles = triton.cdiv(num_cols, _TILE)
        strides = (source.stride(0), out.stride(0))
        addresses = (source.data_ptr(), out.data_ptr())
        sizes = (num_rows, num_cols, *strides, tiles)
        rows.append([programs, *addresses, *sizes, _address(gains)])
        programs += tiles * triton.cdiv(num_rows, _TILE)
    device = parts[0].out.device
    return partial(
        _copy_batch_kernel[(programs,)],
        torch.tensor(rows, device=device),
        torch.tensor([part.scale for part in parts], dtype=torch.float32, device=device),
        NUM_PARTS=len(parts),
        FIELDS=_COPY_FIELDS,
        SOURCE=triton_dtype(parts[0].source.dtype),
        OUT=triton_dtype(parts[0].out.dtype),
        GAINS=has_gains,
        TILE=_TILE,
    )
