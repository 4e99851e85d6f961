"""What ops that go row by row share: a 2-D view of any tensor, sums over rows, a fixed warp count.

A row-wise kernel sees [N, D] with any row stride and unit inner stride. One program holds one row
(or one tile of it) in registers, so the warp count follows from the tile's width alone; nothing is
autotuned, since an autotuner picks by timing and rounding order would differ between runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 8 to 16 elements a thread: enough loads in flight to reach memory bandwidth, few enough registers
# that the four fp32 copies of a row which the norm's backward holds do not spill.
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16

_HALF = (torch.float16, torch.bfloat16)


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., D] as [N, D] with inner stride 1: a view where strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype of every op: fp32 or the input's, whichever is wider."""
    return torch.promote_types(dtype, torch.float32)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n`: a Triton tile's width."""
    return 1 << max(n - 1, 0).bit_length()


def warps_for(num_elements: int) -> int:
    """Warps of a program whose tile holds `num_elements`: a power of two from 1 to 16."""
    return min(max(num_elements // _ELEMENTS_PER_WARP, 1), _MAX_WARPS)


def sum_over_rows(left_NP: Tensor, right_NQ: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right [P, Q] in `dtype`, accumulated in fp32 or wider and rounded to `dtype` alone."""
    if left_NP.is_cuda and dtype == torch.float32 and left_NP.dtype in _HALF:
        # An fp32 result costs nothing extra, and rules out the 16-bit partial sums of split K.
        return torch.mm(left_NP.T, right_NQ, out_dtype=torch.float32)
    wide = torch.promote_types(left_NP.dtype, dtype)
    return (left_NP.T.to(wide) @ right_NQ.to(wide)).to(dtype)
