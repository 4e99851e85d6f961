"""DoRA's gains of all projections of a layer, taken from NF4 codes where they lie, in few launches.

Shapes: O rows of a matrix, K columns, r its rank. W [O, K] frozen, A [r, K], B [O, r], m [O].

    C = W A^T  [O, r];   G = A A^T  [r, r];   sB = s B
    n_j^2 = ||W_j||^2 + sum_r (2 C + sB G)_jr sB_jr;   g = m / n        (`dora.py`)

C and G are summed over spans of columns, each by a program of its own, and the spans are added in
order by the programs that take the gains: nothing is added atomically. One launch makes C of all
matrices in NF4, unpacking their codes on the way to the product and writing no matrix; one makes C
of the dense ones and every G, where A stands for W; one takes the gains.

Bytes moved, a layer of an 8B model (218 million weights, r = 16): 112 MB of codes, 14 MB of sums;
unpacked first it would be 980 MB. Operations: a dozen a weight to unpack, 2 r to multiply.
Rounding: W, A and sB as the product takes them, all sums in fp32. The torch engine, fp64, ranks
above 64 and columns that are no whole blocks unpack W into its place in the scratch first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.engine import HAS_TRITON, engine_for, jit, tl, triton_dtype
from sloth.kernels.ops.batch import part_of
from sloth.kernels.ops.dora import Gains
from sloth.kernels.ops.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, NF4Weight, nf4_code
from sloth.kernels.rows import next_power_of_2

# More leave no registers for the tile; fewer are no matrix instruction.
MAX_RANK, _MIN_RANK = 64, 16
# Rows of a program's tile; columns that it sums: 1664 programs of one length for an 8B layer.
_ROWS, SPAN = 64, 2048
_COLS = 64
# Rows whose gains a program takes.
_GAIN_ROWS = 32
_CROSS_OPTIONS = {"num_warps": 4, "num_stages": 3}
# As the codes are unpacked elsewhere: a scale is rounded before its offset is added.
_CODE_OPTIONS = {**_CROSS_OPTIONS, "enable_fp_fusion": False}
_CODE_FIELDS, _DENSE_FIELDS, _GAINS_FIELDS = 11, 9, 13


@jit
def _code_cross_kernel(
    table_ptr,
    code_ptr,
    map_ptr,
    sums_ptr,
    NUM_PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """A row of the table: first program, place of its sums, rows, columns, ranks, A and its row
    stride, codes, absmax, nested absmax, offset."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + part_of(program, table_ptr, NUM_PARTS, FIELDS) * FIELDS
    num_rows, num_cols = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    A_ptr = tl.multiple_of(tl.load(row_ptr + 5).to(tl.pointer_type(DTYPE)), 16)
    A_stride = tl.multiple_of(tl.load(row_ptr + 6), 8)
    codes_ptr = tl.multiple_of(tl.load(row_ptr + 7).to(tl.pointer_type(tl.uint8)), 16)
    absmax_address = tl.load(row_ptr + 8)
    if NESTED:
        absmax_ptr = absmax_address.to(tl.pointer_type(tl.uint8))
    else:
        absmax_ptr = absmax_address.to(tl.pointer_type(tl.float32))
    nested_absmax_ptr = tl.load(row_ptr + 9).to(tl.pointer_type(tl.float32))
    offset = 0.0
    if NESTED:
        offset = tl.load(tl.load(row_ptr + 10).to(tl.pointer_type(tl.float32)))
    spans = (num_cols + SPAN - 1) // SPAN
    tile = program - tl.load(row_ptr)
    span = tile % spans
    rows = (tile // spans) * ROWS + tl.arange(0, ROWS)
    known = rows < num_rows
    ranks = tl.arange(0, RANK)
    ranks_known = (ranks < tl.load(row_ptr + 4))[None, :]
    # A block never straddles rows; block numbers fit 32 bits.
    first_block = (rows * (num_cols // BLOCKSIZE) + span * (SPAN // BLOCKSIZE)).to(tl.int32)
    half: tl.constexpr = BLOCKSIZE // 2
    codes_at = codes_ptr + tl.multiple_of((rows * num_cols + span * SPAN) // 2, 32)
    codes_at = codes_at[:, None] + tl.arange(0, half)[None, :]
    A_at = A_ptr + span * SPAN + ranks[None, :] * A_stride + tl.arange(0, BLOCKSIZE)[:, None]
    codebook = tl.load(code_ptr + tl.arange(0, 16))
    sums = tl.zeros((ROWS, RANK), tl.float32)
    num_blocks = tl.minimum(num_cols - span * SPAN, SPAN).to(tl.int32) // BLOCKSIZE
    for i in range(0, num_blocks):
        packed = tl.load(codes_at + i * half, mask=known[:, None], other=0).to(tl.int32)
        block = first_block + i
        absmax = tl.load(absmax_ptr + block, mask=known, other=0)
        if NESTED:
            value = tl.load(map_ptr + absmax.to(tl.int32))
            nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=known, other=0.0)
            absmax = value * nested + offset
        flat = tl.reshape(packed, (ROWS * half,))
        high = tl.reshape(tl.gather(codebook, flat >> 4, 0), (ROWS, half)) * absmax[:, None]
        low = tl.reshape(tl.gather(codebook, flat & 15, 0), (ROWS, half)) * absmax[:, None]
        W = tl.reshape(tl.join(high, low).to(DTYPE), (ROWS, BLOCKSIZE))
        A = tl.load(A_at + i * BLOCKSIZE, mask=ranks_known, other=0.0)
        sums = tl.dot(W, A, sums, input_precision="ieee")
    at = sums_ptr + tl.load(row_ptr + 1) + (span * num_rows + rows)[:, None] * RANK
    tl.store(at + ranks[None, :], sums, mask=known[:, None])


@jit
def _dense_cross_kernel(
    table_ptr,
    sums_ptr,
    NUM_PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """A row of the table: first program, place of its sums, rows, columns, ranks, A and its row
    stride, W and its row stride."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + part_of(program, table_ptr, NUM_PARTS, FIELDS) * FIELDS
    num_rows, num_cols = tl.load(row_ptr + 2), tl.multiple_of(tl.load(row_ptr + 3), 16)
    A_ptr = tl.multiple_of(tl.load(row_ptr + 5).to(tl.pointer_type(DTYPE)), 16)
    W_ptr = tl.multiple_of(tl.load(row_ptr + 7).to(tl.pointer_type(DTYPE)), 16)
    spans = (num_cols + SPAN - 1) // SPAN
    tile = program - tl.load(row_ptr)
    span = tile % spans
    rows = (tile // spans) * ROWS + tl.arange(0, ROWS)
    known = rows < num_rows
    ranks, cols = tl.arange(0, RANK), tl.arange(0, COLS)
    ranks_known = (ranks < tl.load(row_ptr + 4))[None, :]
    A_at = A_ptr + ranks[None, :] * tl.multiple_of(tl.load(row_ptr + 6), 8)
    W_at = W_ptr + rows[:, None] * tl.multiple_of(tl.load(row_ptr + 8), 8)
    sums = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(span * SPAN, tl.minimum((span + 1) * SPAN, num_cols), COLS):
        at = start + cols
        inside = at < num_cols
        W = tl.load(W_at + at[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        A = tl.load(A_at + at[:, None], mask=ranks_known & inside[:, None], other=0.0)
        sums = tl.dot(W, A, sums, input_precision="ieee")
    at = sums_ptr + tl.load(row_ptr + 1) + (span * num_rows + rows)[:, None] * RANK
    tl.store(at + ranks[None, :], sums, mask=known[:, None])


@jit
def _scaled(B_at, ranks, num_ranks, known, scale, DTYPE: tl.constexpr):
    """Some columns of sB as the product takes them, in fp32."""
    mask = known[:, None] & (ranks < num_ranks)[None, :]
    B = tl.load(B_at + ranks[None, :], mask=mask, other=0.0).to(tl.float32)
    return (B * scale).to(DTYPE).to(tl.float32)


@jit
def _gains_kernel(
    table_ptr,
    scales_ptr,
    sums_ptr,
    NUM_PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    FACTOR: tl.constexpr,
    LENGTH: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A row of the table: first program, places of the sums C and G, spans, rows, ranks, B and its
    row stride, m, squared norms, g, s g, 1 / m."""
    program = tl.program_id(0).to(tl.int64)
    part = part_of(program, table_ptr, NUM_PARTS, FIELDS)
    row_ptr = table_ptr + part * FIELDS
    num_rows, num_ranks = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    rows = (program - tl.load(row_ptr)) * ROWS + tl.arange(0, ROWS)
    known, ranks = rows < num_rows, tl.arange(0, RANK)
    B_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(FACTOR))
    B_at = B_ptr + rows[:, None] * tl.load(row_ptr + 7)
    scale, spans = tl.load(scales_ptr + part), tl.load(row_ptr + 3)
    sB = _scaled(B_at, ranks, num_ranks, known, scale, DTYPE)
    cross_at = sums_ptr + tl.load(row_ptr + 1) + rows[:, None] * RANK + ranks[None, :]
    cross = tl.zeros((ROWS, RANK), tl.float32)
    for span in range(0, spans):
        cross += tl.load(cross_at + span * num_rows * RANK, mask=known[:, None], other=0.0)
    total = 2.0 * cross
    for first in range(0, RANK, CHUNK):  # of ranks, or the product's operands would spill
        some = first + tl.arange(0, CHUNK)
        gram_at = sums_ptr + tl.load(row_ptr + 2) + some[:, None] * RANK + ranks[None, :]
        gram = tl.zeros((CHUNK, RANK), tl.float32)
        for span in range(0, spans):
            ours = (some < num_ranks)[:, None]
            gram += tl.load(gram_at + span * num_ranks * RANK, mask=ours, other=0.0)
        part_sB = _scaled(B_at, some, num_ranks, known, scale, DTYPE)
        total = tl.dot(part_sB, gram, total, input_precision="ieee")
    squared_ptr = tl.load(row_ptr + 9).to(tl.pointer_type(tl.float32))
    squared = tl.load(squared_ptr + rows, mask=known, other=0.0) + tl.sum(total * sB, axis=1)
    n = tl.sqrt(tl.maximum(squared, 0.0))
    m_ptr = tl.load(row_ptr + 8).to(tl.pointer_type(LENGTH))
    m = tl.load(m_ptr + rows, mask=known, other=0.0).to(tl.float32)
    gains = tl.where(n > 0.0, m / tl.where(n > 0.0, n, 1.0), 0.0)
    inverse = tl.where(m != 0.0, 1.0 / tl.where(m != 0.0, m, 1.0), 0.0)
    gains_ptr = tl.load(row_ptr + 10).to(tl.pointer_type(tl.float32))
    scaled_ptr = tl.load(row_ptr + 11).to(tl.pointer_type(tl.float32))
    inverse_ptr = tl.load(row_ptr + 12).to(tl.pointer_type(tl.float32))
    tl.store(gains_ptr + rows, gains, mask=known)
    tl.store(scaled_ptr + rows, gains * scale, mask=known)
    tl.store(inverse_ptr + rows, inverse, mask=known)


_DTYPE = tl.bfloat16 if HAS_TRITON else None
_WIDE = tl.float32 if HAS_TRITON else None
_TABLE = {"table_ptr": "*i64", "sums_ptr": "*fp32"}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_code_cross_kernel": [
        {
            "signature": {**_TABLE, "code_ptr": "*fp32", "map_ptr": "*fp32"},
            "constexprs": {
                **{"NUM_PARTS": 7, "FIELDS": _CODE_FIELDS, "DTYPE": _DTYPE, "NESTED": True},
                **{"BLOCKSIZE": BLOCKSIZE, "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE},
                **{"RANK": rank, "ROWS": _ROWS, "SPAN": SPAN},
            },
            "options": _CODE_OPTIONS,
        }
        for rank in (_MIN_RANK, MAX_RANK)
    ],
    "_dense_cross_kernel": [
        {
            "signature": _TABLE,
            "constexprs": {
                **{"NUM_PARTS": 14, "FIELDS": _DENSE_FIELDS, "DTYPE": _DTYPE, "RANK": MAX_RANK},
                **{"ROWS": _ROWS, "COLS": _COLS, "SPAN": SPAN},
            },
            "options": _CROSS_OPTIONS,
        }
    ],
    "_gains_kernel": [
        {
            "signature": {**_TABLE, "scales_ptr": "*fp32"},
            "constexprs": {
                **{"NUM_PARTS": 7, "FIELDS": _GAINS_FIELDS, "DTYPE": _DTYPE, "RANK": MAX_RANK},
                **{"FACTOR": _WIDE, "LENGTH": _WIDE, "ROWS": _GAIN_ROWS},
                "CHUNK": _MIN_RANK,
            },
        }
    ],
}


class Adapted(NamedTuple):
    """A frozen matrix [O, K]; A [r, K] in the dtype that the product takes it in; B [O, r], m and
    ||W_j||^2 [O], s; what takes the gains."""

    base: Tensor | NF4Weight
    A: Tensor
    B: Tensor
    m: Tensor
    squared: Tensor
    scale: float
    gains: Gains


def is_fused(each: Adapted) -> bool:
    """Whether the kernels take this matrix."""
    A, B, base, floats = each.A, each.B, each.base, (torch.float16, torch.bfloat16, torch.float32)
    if engine_for(A) != "triton" or not 0 < len(A) <= MAX_RANK or B.stride(1) != 1:
        return False
    if B.dtype not in floats or each.m.dtype not in floats:
        return False
    dense = [A, base] if isinstance(base, Tensor) else [A]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 for x in dense)
    if isinstance(base, Tensor):
        same = base.dtype == A.dtype and base.stride(1) == 1
        return same and aligned and base.shape[1] % 16 == 0
    aligned &= base.codes.data_ptr() % 16 == 0
    blocks = base.blocksize, base.nested_blocksize
    return aligned and blocks == (BLOCKSIZE, NESTED_BLOCKSIZE) and A.shape[1] % BLOCKSIZE == 0


class GainsLaunches:
    """The gains of matrices that are fused, of one dtype of B and one of m, in three launches.

    Addresses are read once, here: the caller keeps the tensors alive.
    """

    def __init__(self, matrices: list[Adapted]) -> None:
        first, self._num_sums = matrices[0], 0
        rank = max(next_power_of_2(max(len(each.A) for each in matrices)), _MIN_RANK)
        codes: dict[bool, list[list[int]]] = {}
        dense: list[list[int]] = []
        gains: list[list[int]] = []
        for base, A, B, m, squared, _, own in matrices:
            num_rows, num_cols = len(B), A.shape[1]
            spans = -(-num_cols // SPAN)
            cross, gram = self._num_sums, self._num_sums + spans * num_rows * rank
            self._num_sums = gram + spans * len(A) * rank
            tail = [num_cols, len(A), A.data_ptr(), A.stride(0)]
            dense.append([spans, gram, len(A), *tail, A.data_ptr(), A.stride(0)])
            if isinstance(base, NF4Weight):
                stored = (base.codes, base.absmax, base.nested_absmax, base.offset)
                addresses = [0 if x is None else x.data_ptr() for x in stored]
                kind = base.nested_absmax is not None
                codes.setdefault(kind, []).append([spans, cross, num_rows, *tail, *addresses])
            else:
                place = base.data_ptr(), base.stride(0)
                dense.append([spans, cross, num_rows, *tail, *place])
            addresses = [x.data_ptr() for x in (m, squared, *own)]
            factor = [len(A), B.data_ptr(), B.stride(0)]
            gains.append([1, cross, gram, spans, num_rows, *factor, *addresses])
        self._device = device = first.A.device
        same = {"DTYPE": triton_dtype(first.A.dtype), "RANK": rank}
        maps = [each.base.nested_map for each in matrices if isinstance(each.base, NF4Weight)]
        code, sizes = nf4_code(device), {"SPAN": SPAN, "ROWS": _ROWS, **same}
        self._launches: list[Callable[..., object]] = []
        for nested, rows in codes.items():
            numbers = next((x for x in maps if x is not None), code)
            blocks = {"BLOCKSIZE": BLOCKSIZE, "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE}
            options = {"NESTED": nested, **blocks, **sizes, **_CODE_OPTIONS}
            self._add(_code_cross_kernel, rows, 2, (code, numbers), options)
        self._add(_dense_cross_kernel, dense, 2, (), {"COLS": _COLS, **sizes, **_CROSS_OPTIONS})
        factors = [float(each.scale) for each in matrices]
        scales = torch.tensor(factors, dtype=torch.float32, device=device)
        kinds = {"FACTOR": triton_dtype(first.B.dtype), "LENGTH": triton_dtype(first.m.dtype)}
        options = {"ROWS": _GAIN_ROWS, "CHUNK": _MIN_RANK, **kinds, **same}
        self._add(_gains_kernel, gains, 4, (scales,), options)

    def _add(
        self,
        kernel: Any,
        rows: list[list[int]],
        size: int,
        pointers: tuple[Tensor, ...],
        options: dict[str, Any],
    ) -> None:
        """A launch for rows of a table, whose first field is how many programs a tile of matrix
        rows takes, and field `size` the number of these rows. pointers: between table and sums."""
        programs = 0
        for row in rows:
            own = row[0] * -(-row[size] // options["ROWS"])
            row[0] = programs
            programs += own
        table = torch.tensor(rows, device=self._device)
        options |= {"NUM_PARTS": len(rows), "FIELDS": len(rows[0])}
        self._launches.append(partial(kernel[(programs,)], table, *pointers, **options))

    def run(self) -> None:
        """Take the gains."""
        sums = torch.empty(self._num_sums, dtype=torch.float32, device=self._device)
        for launch in self._launches:
            launch(sums)
