"""One row times an NF4 matrix, read as stored: y = g * (x W^T + u B^T) + b with u = s x A^T.

Shapes: x [I], W [O, I] in NF4 with I a multiple of 64, A [R, I], B [O, R], gains g and bias b [O].

A step of decoding reads every weight once for one row, so that bytes are its price: 0.516 a weight
here, 2 in a 16-bit copy. A program of one warp takes a few outputs and walks the blocks of their
rows: codes are looked up by a shuffle from the lanes' registers, multiplied by x and summed over a
block before the block's scale is taken, all in fp32; W is never rounded to 16 bits. LoRA's u is
summed by a kernel before, a program to each of its R rows; the rest of LoRA is in the same launch
as W. No backward: nothing is trained while decoding.
Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.ops.nf4 import NF4Weight, block_scales, nf4_code
from sloth.kernels.rows import next_power_of_2, warps_for

# Blocks that a program takes at a time of each of its outputs, on which x is spent before the next
# is read: 29 us at 14336 x 4096 on an H100, where a product with the 16-bit copy takes 42. Of small
# matrices fewer outputs each, for more programs.
_BLOCKS, _OUTPUTS, _FEW_OUTPUTS, _SMALL = 16, 4, 2, 2048
_WARPS = 1


@jit
def _low_rank_kernel(x_ptr, A_ptr, low_ptr, scale, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < num_cols
    x = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(A_ptr + row * num_cols + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(low_ptr + row, tl.sum(x * a, 0) * scale)


@jit
def _nf4_matvec_kernel(
    x_ptr,
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    code_ptr,
    map_ptr,
    low_ptr,
    B_ptr,
    gains_ptr,
    bias_ptr,
    y_ptr,
    num_outputs,
    num_blocks,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCKSIZE // 2
    row = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = row < num_outputs
    codebook = tl.load(code_ptr + tl.arange(0, 16))
    lanes = tl.arange(0, HALF)
    acc = tl.zeros((OUTPUTS, BLOCKS), tl.float32)
    for first in range(0, num_blocks, BLOCKS):
        column = first + tl.arange(0, BLOCKS)
        whole = column < num_blocks
        block = row[:, None] * num_blocks + column[None, :]
        seen = inside[:, None] & whole[None, :]
        at = codes_ptr + block[:, :, None] * HALF + lanes[None, None, :]
        packed = tl.load(at, mask=seen[:, :, None], other=0).to(tl.int32)
        absmax = block_scales(
            absmax_ptr,
            nested_absmax_ptr,
            offset_ptr,
            map_ptr,
            block,
            seen,
            NESTED,
            NESTED_BLOCKSIZE,
        )
        pairs = column[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
        x = tl.load(x_ptr + pairs, mask=whole[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (BLOCKS, HALF, 2)))
        flat = tl.reshape(packed, (OUTPUTS * BLOCKS * HALF,))
        high = tl.reshape(tl.gather(codebook, flat >> 4, 0), (OUTPUTS, BLOCKS, HALF))
        low = tl.reshape(tl.gather(codebook, flat & 15, 0), (OUTPUTS, BLOCKS, HALF))
        products = high * even[None, :, :] + low * odd[None, :, :]
        acc += tl.sum(products, 2) * absmax
    y = tl.sum(acc, 1)
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        used = ranks < RANK
        u = tl.load(low_ptr + ranks, mask=used, other=0.0)
        at_B = B_ptr + row[:, None] * RANK + ranks[None, :]
        b = tl.load(at_B, mask=inside[:, None] & used[None, :], other=0.0).to(tl.float32)
        y += tl.sum(b * u[None, :], 1)
    if gains_ptr is not None:
        y *= tl.load(gains_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=inside)


_MATVEC_SIGNATURE = {
    **{f"{name}_ptr": "*bf16" for name in ("x", "B", "gains", "bias", "y")},
    **{"codes_ptr": "*u8", "absmax_ptr": "*u8", "nested_absmax_ptr": "*fp32"},
    **{f"{name}_ptr": "*fp32" for name in ("offset", "code", "map", "low")},
    **{"num_outputs": "i32:16", "num_blocks": "i32:16"},
}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_low_rank_kernel": [
        {
            "signature": {
                **{"x_ptr": "*bf16", "A_ptr": "*bf16", "low_ptr": "*fp32"},
                **{"scale": "fp32", "num_cols": "i32:16"},
            },
            "constexprs": {"BLOCK": 32768},
            "options": {"num_warps": warps_for(32768)},
        }
    ],
    "_nf4_matvec_kernel": [
        {
            "signature": _MATVEC_SIGNATURE,
            "constexprs": {
                **{"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "NESTED": True},
                **{"RANK": 16, "BLOCK_R": 16, "OUTPUTS": _OUTPUTS, "BLOCKS": _BLOCKS},
            },
            "options": {"num_warps": _WARPS},
        }
    ],
}


def serves(base: object, dtype: torch.dtype) -> bool:
    """Whether one row of this dtype can be multiplied by the matrix as it is stored: 16 bits, on a
    GPU, NF4 whose blocks are whole in every row."""
    return (
        isinstance(base, NF4Weight)
        and base.shape[1] % base.blocksize == 0
        and dtype in (torch.float16, torch.bfloat16)
        and engine_for(torch.empty(0, dtype=dtype, device=base.codes.device)) == "triton"
    )


def nf4_matvec(
    x: Tensor,
    w: NF4Weight,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    gains: Tensor | None = None,
) -> Tensor:
    """g * (x W^T + s (x A^T) B^T) + b [..., O] for the one row of x [..., I], if `serves` says so.

    A, B: any float dtype, dense.
    """
    num_outputs, num_cols = w.shape
    x_I = x.reshape(num_cols).contiguous()
    y = torch.empty(num_outputs, dtype=x.dtype, device=x.device)
    code = nf4_code(x.device)
    outputs = _FEW_OUTPUTS if num_outputs <= _SMALL else _OUTPUTS
    rank, low = 0, code
    if A is not None and B is not None:
        rank, width = A.shape[0], next_power_of_2(num_cols)
        low = torch.empty(rank, dtype=torch.float32, device=x.device)
        _low_rank_kernel[(rank,)](
            x_I, A.contiguous(), low, scale, num_cols, BLOCK=width, num_warps=warps_for(width)
        )
    _nf4_matvec_kernel[(-(-num_outputs // outputs),)](
        x_I,
        w.codes,
        w.absmax,
        w.nested_absmax,
        w.offset,
        code,
        code if w.nested_map is None else w.nested_map,
        low,
        code if B is None else B.contiguous(),
        gains,
        bias,
        y,
        num_outputs,
        num_cols // w.blocksize,
        BLOCKSIZE=w.blocksize,
        NESTED_BLOCKSIZE=w.nested_blocksize,
        NESTED=w.nested_absmax is not None,
        RANK=rank,
        BLOCK_R=next_power_of_2(max(rank, 1)),
        OUTPUTS=outputs,
        BLOCKS=_BLOCKS,
        num_warps=_WARPS,
    )
    return y.view(*x.shape[:-1], num_outputs)
