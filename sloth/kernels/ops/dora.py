"""DoRA: the rows of an adapted matrix keep their direction and get a trained length.

Shapes: N rows of x, I in, O out, R rank. W [O, I] frozen, A [R, I], B [O, R], m [O].

    V = W + s B A;   n_j = ||V_j||;   W' = (m / n) V, row by row;   y = x W'^T + b

n counts as a constant in the backward (section 4.3 of the paper, and PEFT), so a row is scaled by
a number g = m / n, its gain, and DoRA is LoRA on the matrices gW and gB:

Forward:   y = x (gW)^T + s u (gB)^T + b,            u = x' A^T,  x' = x or dropout(x)
Backward:  v = s dy (gB);   dx = dy (gW) + mask * (v A)
           dA = v^T x';     dB = g s dy^T u
           dm_j = sum_N dy_j z_j / n_j with z = x W^T + s u B^T, so that y = g z + b:
                = sum_N dy_j (y_j - b_j) / m_j

A twin multiplies by a copy of W anyway (codes unpacked, a scratch filled) and folds the gains into
it, so that no output is touched once more; the op by itself scales y and dy. dm reads y and dy
once; it needs no product. m starts at n, where g is 1; a magnitude of exactly 0 cannot tell z from
y and stays there, and a row of zeros, which has no direction, has gain 0.

The norms need no V either:

    n_j^2 = ||W_j||^2 + 2 s <W_j, (BA)_j> + s^2 ||(BA)_j||^2
          = ||W_j||^2 + sum_r (2 W A^T + sB (A A^T))_jr sB_jr

||W_j||^2 is computed once, W A^T reads W once, the rest is of size O R. All in fp32 (fp64 for fp64)
from the operands that the product uses. A twin reads W as it is stored (`dora_gains.py`): of an 8B
model's layer 112 MB of codes, where a matrix unpacked for it would be written and read, 0.9 GB. The
dots read Y and dY, 1.4 GB a layer at 8192 tokens; a twin forms them where dY is read anyway, beside
other sums over rows (`dora_sums.py`, `glu_lora.py`), and pays for 0.24 GB of Y.

With dropout PEFT computes W x + (g - 1) W x' + g s B A x', where the frozen product sees dropped
inputs as soon as g is not 1; here dropout is the adapter's alone. Without it both are the same.
Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for, jit, tl, triton
from sloth.kernels.ops.nf4 import NF4Weight, nf4_dequantize
from sloth.kernels.rows import compute_dtype, sum_over_rows

# Rows of a matrix that are held in fp32 at a time.
_SLICE_ROWS = 1024
# Tile of a program of the dots: 64 columns are whole 128-byte lines in 16 bits.
_DOT_COLS, _DOT_ROWS = 64, 32
# Rows a program sums: 32 programs a column tile at 8192 rows.
_DOT_SPAN = 256


@dataclass(frozen=True)
class Magnitude:
    """DoRA's part of an adapter, each [out].

    m: trained row lengths. Either squared: ||W_j||^2 of the frozen base, fp32 or wider, to take the
    norms of W + s B A as the factors are; or norms: those, while they are held fixed.
    """

    m: Tensor
    squared: Tensor | None
    norms: Tensor | None = None


class Gains(NamedTuple):
    """Of each output row of a stack [N], fp32 or wider.

    rows: g = m / n. scaled: s g, which dB takes. inverse: 1 / m or 0, which turns dots into dm.
    """

    rows: Tensor
    scaled: Tensor
    inverse: Tensor

    def of(self, rows: slice) -> Gains:
        """Views of some rows."""
        return Gains(*(x[rows] for x in self))

    def put(self, m: Tensor, norms: Tensor, scale: float) -> None:
        """Those of trained lengths m and norms n [N]."""
        self.rows.copy_(gains_of(m, norms))
        torch.mul(self.rows, scale, out=self.scaled)
        self.inverse.copy_(torch.where(m != 0, 1 / m, 0.0))


def squared_row_norms(base: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """||W_j||^2 [O] of a matrix or its codes, summed in `dtype`."""
    if isinstance(base, NF4Weight):
        base = nf4_dequantize(base, dtype)
    parts = base.detach().split(_SLICE_ROWS)
    return torch.cat([part.to(dtype).square().sum(1) for part in parts])


@torch.no_grad()
def adapted_norms(weight: Tensor, A: Tensor, sB: Tensor, squared: Tensor) -> Tensor:
    """||W_j + (sB A)_j|| [O], in the dtype of `squared`.

    weight [O, I] and A [R, I] of one dtype; sB [O, R], the scale inside. Adapters of several
    matrices below each other may stand in one call: sB is then zero off its blocks.
    """
    wide = squared.dtype
    cross, sB = sum_over_rows(weight.T, A.T, wide), sB.to(wide)
    gram = A.to(wide) @ A.to(wide).T
    total = squared + ((2 * cross + sB @ gram) * sB).sum(1)
    return total.clamp_(min=0).sqrt_()


def gains_of(m: Tensor, norms: Tensor) -> Tensor:
    """g = m / n, 0 for rows of zeros."""
    return torch.where(norms > 0, m / norms, 0.0)


def magnitude_gradient(dy: Tensor, y: Tensor, bias: Tensor | None, m: Tensor) -> Tensor:
    """dm [O] of y = g z + b; dy, y [N, O] with inner stride 1."""
    dots = column_dots(dy, y, bias)
    return torch.where(m != 0, dots / m, 0.0).to(m.dtype)


def column_dots(dy: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum_N dy (y - bias) [O] of dy, y [N, O] with inner stride 1, in fp32 or wider."""
    if engine_for(dy) == "triton":
        return _column_dots_triton(dy, y, bias)
    wide = compute_dtype(dy.dtype)
    z = y.to(wide) if bias is None else y.to(wide) - bias.to(wide)
    return (dy.to(wide) * z).sum(0)


@jit
def _column_dots_kernel(
    dy_ptr,
    y_ptr,
    bias_ptr,
    out_ptr,
    dy_stride,
    y_stride,
    num_rows,
    num_cols,
    HAS_BIAS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """SPAN rows of COLS columns; the spans' sums stand below each other in `out`."""
    cols = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    span = tl.program_id(1).to(tl.int64)
    known = cols < num_cols
    total = tl.zeros((ROWS, COLS), tl.float32)
    bias = tl.zeros((COLS,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + cols, mask=known, other=0.0).to(tl.float32)
    for start in range(0, SPAN, ROWS):
        rows = span * SPAN + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & known[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0)
        y = tl.load(y_ptr + rows[:, None] * y_stride + cols[None, :], mask=mask, other=0.0)
        total += dy.to(tl.float32) * (y.to(tl.float32) - bias[None, :])
    tl.store(out_ptr + span * num_cols + cols, tl.sum(total, axis=0), mask=known)


_OPTIONS = {"num_warps": 4}
_SIZES = {"SPAN": _DOT_SPAN, "ROWS": _DOT_ROWS, "COLS": _DOT_COLS}
_SIGNATURE = {
    **{f"{name}_ptr": "*bf16" for name in ("dy", "y", "bias")},
    "out_ptr": "*fp32",
    **{name: "i32:16" for name in ("dy_stride", "y_stride", "num_cols")},
    "num_rows": "i32",
}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_column_dots_kernel": [
        {
            "signature": _SIGNATURE,
            "constexprs": {"HAS_BIAS": True, **_SIZES},
            "options": _OPTIONS,
        }
    ]
}


def _column_dots_triton(dy: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    num_rows, num_cols = dy.shape
    spans = triton.cdiv(num_rows, _DOT_SPAN)
    out = torch.empty(spans, num_cols, dtype=torch.float32, device=dy.device)
    if num_rows and num_cols:
        _column_dots_kernel[(triton.cdiv(num_cols, _DOT_COLS), spans)](
            dy,
            y,
            dy if bias is None else bias,
            out,
            dy.stride(0),
            y.stride(0),
            num_rows,
            num_cols,
            HAS_BIAS=bias is not None,
            **_SIZES,
            **_OPTIONS,
        )
    return out.sum(0)
