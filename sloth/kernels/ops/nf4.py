"""NF4: 4-bit codes of normally distributed weights, one scale per 64 of them, scales in 8 bits.

Layout: the weight [out, in] flattened row by row; element 2k sits in the high half of byte k, 2k +
1 in the low. Block b covers elements 64 b .. 64 b + 63. With double quantization a block's scale is
itself a code q into a 256-entry map, scaled per 256 blocks and shifted:

    a = map[q] * absmax2 + offset        (rounded after the product: fusing the two changes 3-6% of
    a) w = code[c] * a                      fp32, then cast once to the dtype asked for

Nothing is differentiated: codes are frozen. Reads 0.516 bytes a weight, writes 2 (16 bits); both
scale levels are resolved in the one launch, and `batch.NF4Batch` unpacks all matrices of a layer in
one, since the small ones alone are bound by the launch. Bit-exact with bitsandbytes.
Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import INTERPRET, engine_for, jit, tl, triton

# Quantiles of N(0, 1) scaled to [-1, 1], exact at both ends and at zero.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256

# Blocks one program (a single warp) unpacks. On an H200 at 28672 x 4096 16 give 81% of copy
# bandwidth, 64 by four warps 72%; a codebook in memory instead of registers 72%, a tree of selects
# 45%. On an H100 64 by one warp win alone (4096 x 4096: 18.1 us, 16: 19.5) and not in a batch.
UNPACK_BLOCKS, _BLOCKS_ALONE = 16, 64
_RECIPROCALS = 1024


@cache
def nf4_code(device: torch.device) -> Tensor:
    """The codebook [16], fp32."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 8-bit map [256], fp32, sorted: seven decades of midpoints, both signs, 0 and 1.

    Decade e holds the midpoints of 2^e + 1 points from 0.1 to 1, times 10^(e - 6).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10 ** (exponent - 6) * middles).tolist()
        values += scaled + [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class NF4Weight:
    """One quantized matrix.

    codes: uint8 [ceil(n / 2), 1]. absmax: one scale per block, fp32, or uint8 with double
    quantization. shape: (out, in). dtype: what it was quantized from. nested_absmax: fp32 per 256
    blocks; offset: fp32 0-dim; nested_map: fp32 [256]; these three are None without double
    quantization.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    nested_map: Tensor | None = None
    blocksize: int = BLOCKSIZE
    nested_blocksize: int = NESTED_BLOCKSIZE

    def to(self, device: torch.device) -> NF4Weight:
        """The same weight on another device."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=moved(self.nested_absmax),
            offset=moved(self.offset),
            nested_map=moved(self.nested_map),
        )


def nf4_absmax(w: NF4Weight) -> Tensor:
    """The fp32 scale of every block."""
    if w.nested_absmax is None or w.offset is None or w.nested_map is None:
        return w.absmax
    scale = w.nested_absmax.repeat_interleave(w.nested_blocksize)[: w.absmax.numel()]
    return w.nested_map[w.absmax.int()] * scale + w.offset


def nf4_dequantize_reference(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Codes -> [out, in] in `dtype`, by the formula."""
    num_elements = w.shape[0] * w.shape[1]
    codes = w.codes.flatten()
    pairs = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[:num_elements]
    values = nf4_code(codes.device)[pairs.int()]
    scales = nf4_absmax(w).repeat_interleave(w.blocksize)[:num_elements]
    return (values * scales).to(dtype).view(w.shape)


@jit
def block_scales(
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    map_ptr,
    block,
    mask,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """The fp32 scale of each of these blocks."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        value = tl.load(map_ptr + absmax.to(tl.int32))
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        absmax = value * nested + tl.load(offset_ptr)
    return absmax


@jit
def unpack_blocks(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    code_ptr,
    map_ptr,
    gains_ptr,
    out_ptr,
    first_block,
    num_elements,
    num_cols,
    row_stride,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    GAINS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of codes from `first_block` on, each scaled once, into rows of `out`; with
    GAINS every row is multiplied by a number of its own before it is rounded."""
    # Block numbers fit 32 bits, whose divisions are fast; element numbers may not.
    block = first_block.to(tl.int32) + tl.arange(0, BLOCKS)
    start = block.to(tl.int64) * BLOCKSIZE
    block_mask = start < num_elements
    absmax = block_scales(
        absmax_ptr,
        nested_absmax_ptr,
        offset_ptr,
        map_ptr,
        block,
        block_mask,
        NESTED,
        NESTED_BLOCKSIZE,
    )
    if WHOLE_ROWS:  # no block straddles two rows: one division a block
        blocks_per_row = (num_cols // BLOCKSIZE).to(tl.int32)
        row = block // blocks_per_row
        if GAINS:
            absmax *= tl.load(gains_ptr + row, mask=block_mask, other=0.0)
    byte = (start // 2)[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :]
    byte_mask = block_mask[:, None] if WHOLE_ROWS else 2 * byte < num_elements
    packed = tl.load(codes_ptr + byte, mask=byte_mask, other=0).to(tl.int32)
    # The codebook sits in the lanes' registers: a gather is a shuffle, not a load.
    codebook = tl.load(code_ptr + tl.arange(0, 16))
    flat = tl.reshape(packed, (BLOCKS * BLOCKSIZE // 2,))
    high = tl.reshape(tl.gather(codebook, flat >> 4, 0), (BLOCKS, BLOCKSIZE // 2))
    low = tl.reshape(tl.gather(codebook, flat & 15, 0), (BLOCKS, BLOCKSIZE // 2))
    pairs = tl.join(high * absmax[:, None], low * absmax[:, None])
    lanes = tl.arange(0, BLOCKSIZE)[None, :]
    if WHOLE_ROWS:
        values = tl.reshape(pairs.to(out_ptr.dtype.element_ty), (BLOCKS, BLOCKSIZE))
        col = (block - row * blocks_per_row) * BLOCKSIZE
        at = tl.multiple_of(row.to(tl.int64) * row_stride + col, 8)
        tl.store(out_ptr + at[:, None] + lanes, values, mask=block_mask[:, None])
    else:
        element = start[:, None] + lanes
        row = element // num_cols
        at = row * row_stride + (element - row * num_cols)
        wide = tl.reshape(pairs, (BLOCKS, BLOCKSIZE))
        if GAINS:
            wide *= tl.load(gains_ptr + row, mask=element < num_elements, other=0.0)
        values = wide.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, values, mask=element < num_elements)


@jit
def _nf4_dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    code_ptr,
    map_ptr,
    out_ptr,
    num_elements,
    num_cols,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    unpack_blocks(
        codes_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        offset_ptr,
        code_ptr,
        map_ptr,
        code_ptr,  # no gains
        out_ptr,
        first,
        num_elements,
        num_cols,
        num_cols,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        NESTED,
        False,
        WHOLE_ROWS,
        BLOCKS,
    )


@jit
def _reciprocal_kernel(
    x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=1.0)
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(out_ptr + offsets, y, mask=mask)


UNPACK_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
_SIZES = {"BLOCKSIZE": BLOCKSIZE, "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE, "BLOCKS": _BLOCKS_ALONE}
_SIGNATURE = {
    "codes_ptr": "*u8",
    "code_ptr": "*fp32",
    "map_ptr": "*fp32",
    "out_ptr": "*bf16",
    "num_elements": "i64:16",
    "num_cols": "i32:16",
}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_nf4_dequantize_kernel": [
        {
            "signature": _SIGNATURE
            | {"absmax_ptr": "*u8", "nested_absmax_ptr": "*fp32", "offset_ptr": "*fp32"},
            "constexprs": _SIZES | {"NESTED": True, "WHOLE_ROWS": True},
            "options": UNPACK_OPTIONS,
        },
        {
            "signature": _SIGNATURE | {"absmax_ptr": "*fp32"},
            "constexprs": _SIZES
            | {"NESTED": False, "WHOLE_ROWS": False, "nested_absmax_ptr": None, "offset_ptr": None},
            "options": UNPACK_OPTIONS,
        },
    ],
    "_reciprocal_kernel": [
        {
            "signature": {"x_ptr": "*fp32", "out_ptr": "*fp32", "num_elements": "i64"},
            "constexprs": {"BLOCK": _RECIPROCALS, "INTERPRETED": False},
        }
    ],
}


def num_programs(w: NF4Weight, num_blocks: int = UNPACK_BLOCKS) -> int:
    """Programs of so many blocks that unpack a matrix."""
    return triton.cdiv(w.shape[0] * w.shape[1], w.blocksize * num_blocks)


def _nf4_dequantize_triton(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(w.shape, dtype=dtype, device=w.codes.device)
    nested = w.nested_absmax is not None
    code = nf4_code(w.codes.device)
    _nf4_dequantize_kernel[(num_programs(w, _BLOCKS_ALONE),)](
        w.codes,
        w.absmax,
        w.nested_absmax,
        w.offset,
        code,
        w.nested_map if nested else code,
        out,
        out.numel(),
        w.shape[1],
        BLOCKSIZE=w.blocksize,
        NESTED_BLOCKSIZE=w.nested_blocksize,
        NESTED=nested,
        WHOLE_ROWS=w.shape[1] % w.blocksize == 0,
        BLOCKS=_BLOCKS_ALONE,
        **UNPACK_OPTIONS,
    )
    return out


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Codes -> [out, in] in `dtype` (fp64 holds the fp32 values). Bit-exact with bitsandbytes."""
    probe = torch.empty(0, dtype=dtype, device=w.codes.device)
    if engine_for(probe) == "triton":
        return _nf4_dequantize_triton(w, dtype)
    return nf4_dequantize_reference(w, dtype)


def nf4_reciprocal(absmax: Tensor) -> Tensor:
    """1 / absmax [n], fp32, as the quantizer scales with it.

    On a GPU it is the hardware's approximate reciprocal, which bitsandbytes' CUDA build compiles
    to; an IEEE division differs from it in the last bit of one scale in eight. Against bitsandbytes
    on an H200, fp32 weights that fall on a threshold to the last bit flip 13 codes in 2e8 (19 with
    a division), 16-bit weights none in 2.7e8.
    """
    if engine_for(absmax) == "torch":
        return 1.0 / absmax
    out = torch.empty_like(absmax)
    grid = (triton.cdiv(absmax.numel(), _RECIPROCALS),)
    _reciprocal_kernel[grid](absmax, out, absmax.numel(), BLOCK=_RECIPROCALS, INTERPRETED=INTERPRET)
    return out
