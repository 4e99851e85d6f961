"""Backward of the gated activation between two stacks with LoRA, their sums over rows on the way.

Shapes: T rows, F ffn, R ranks, padded. gate, up, y, dy [T, F]; V [T, R] of down_proj; U [T, R] of
gate|up, the ranks of gate before those of up.

           dgate = dy * up * act'(gate);   dup = dy * act(gate)        (`glu.py`)
           dA_down = V^T y,  y = act(gate) * up
           dB_gate = dgate^T U_gate;       dB_up = dup^T U_up
DoRA wants sum_T dgate (gate - b) and sum_T dup (up - b) as well (`dora.py`): its dots, [2 F].

A sum over rows costs one read of its wide operand and little else, so apart these three cost three
passes over [T, F] and y a fourth, to be written. Here the operands are still in registers. A
program has some columns: it walks down the rows and keeps its columns of the sums, and y is never
written. To fill the device the rows are walked in parts, whose sums are added in order afterwards;
nothing is added atomically, so runs repeat bit for bit.

Bytes moved: three reads and two writes of [T, F]. 8192 x 14336 in bf16 on an H100: 490 us, apart
758 (500 for dgate, dup and y); DoRA's dots apart would read four of [T, F] more. The forward stays
apart: X A^T wants whole rows, which leaves too few programs to hide the exponential (500 us against
341).
Rounding: as in `glu.py`; the sums are of rounded factors, in fp32 or wider.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.ops.dora import column_dots
from sloth.kernels.ops.glu import Activation, gate_and_slope_tile, glu_bwd
from sloth.kernels.rows import compute_dtype, next_power_of_2, sum_over_rows

# Wider adapters leave no registers for the tile: their sums stay apart.
MAX_RANK = 64
# Of a matrix instruction.
MIN_RANK = 16
# Rows that one program walks: 8 parts at 8192 rows, 1792 programs.
SPAN = 1024
_BLOCK_T, _BLOCK_F = 16, 64
_OPTIONS = {"num_warps": 4, "num_stages": 3}
# With the dots a program of few ranks takes 180 registers instead of 120, which halves how many run
# at a time; held to these it spills six.
_DOTS_OPTIONS = _OPTIONS | {"maxnreg": 128}


class GLUSums(NamedTuple):
    """Sums over rows, fp32 or wider: dA of down_proj [rank, F]; dB of gate and of up [F, rank];
    DoRA's dots of gate and up [2 F], None where not asked for."""

    dA_down: Tensor
    dB_gate: Tensor
    dB_up: Tensor
    dots: Tensor | None = None


class Ranks(NamedTuple):
    """Of the three adapters."""

    down: int
    gate: int
    up: int


@jit
def _glu_lora_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    v_ptr,
    low_ptr,
    bias_ptr,
    sums_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    v_stride,
    low_stride,
    num_rows,
    num_cols,
    span,
    first_up_rank,
    num_v_ranks,
    num_low_ranks,
    GELU: tl.constexpr,
    DOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Sums of a part stand below each other: dA, dB of gate, dB of up, and with DOTS two rows."""
    first, part = tl.program_id(0).to(tl.int64) * BLOCK_F, tl.program_id(1).to(tl.int64)
    # Inside a tile offsets fit 32 bits; where it begins takes 64.
    cols, ranks = tl.arange(0, BLOCK_F)[None, :], tl.arange(0, RANK)[:, None]
    down, across = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    inside = cols < num_cols - first
    dA = tl.zeros((RANK, BLOCK_F), tl.float32)
    dB_gate = tl.zeros((RANK, BLOCK_F), tl.float32)
    dB_up = tl.zeros((RANK, BLOCK_F), tl.float32)
    if DOTS:  # summed in place, over threads at the end
        gate_dots = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        up_dots = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        gate_bias = tl.zeros((1, BLOCK_F), tl.float32)
        up_bias = tl.zeros((1, BLOCK_F), tl.float32)
        if HAS_BIAS:
            gate_bias += tl.load(bias_ptr + first + cols, mask=inside, other=0.0).to(tl.float32)
            up_at = bias_ptr + num_cols + first + cols
            up_bias += tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, num_rows), BLOCK_T):
        mask = (down < num_rows - start) & inside
        dy_tile = dy_ptr + start * dy_stride + first + (down * dy_stride + cols)
        gate_tile = gate_ptr + start * gate_stride + first + (down * gate_stride + cols)
        up_tile = up_ptr + start * up_stride + first + (down * up_stride + cols)
        dy = tl.load(dy_tile, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up_tile, mask=mask, other=0.0).to(tl.float32)
        p, slope = gate_and_slope_tile(g, GELU)
        dgate = (dy * u * slope).to(dgate_ptr.dtype.element_ty)
        dup = (dy * g * p).to(dup_ptr.dtype.element_ty)
        y = (g * p * u).to(dy_ptr.dtype.element_ty)
        dgate_tile = dgate_ptr + start * dgate_stride + first + (down * dgate_stride + cols)
        dup_tile = dup_ptr + start * dup_stride + first + (down * dup_stride + cols)
        tl.store(dgate_tile, dgate, mask=mask)
        tl.store(dup_tile, dup, mask=mask)
        if DOTS:
            gate_dots += dgate.to(tl.float32) * (g - gate_bias)
            up_dots += dup.to(tl.float32) * (u - up_bias)
        # The small factors come turned, [RANK, BLOCK_T].
        seen = across < num_rows - start
        v_tile = v_ptr + start * v_stride + (across * v_stride + ranks)
        low_tile = low_ptr + start * low_stride + (across * low_stride + ranks)
        v = tl.load(v_tile, mask=seen & (ranks < num_v_ranks), other=0.0)
        low_gate = tl.load(low_tile, mask=seen & (ranks < num_low_ranks), other=0.0)
        up_seen = seen & (ranks < num_low_ranks - first_up_rank)
        low_up = tl.load(low_tile + first_up_rank, mask=up_seen, other=0.0)
        dA = tl.dot(v, y, dA, input_precision="ieee")
        dB_gate = tl.dot(low_gate, dgate, dB_gate, input_precision="ieee")
        dB_up = tl.dot(low_up, dup, dB_up, input_precision="ieee")
    num_sums = 3 * RANK + 2 if DOTS else 3 * RANK
    out, whole = sums_ptr + (part * num_sums + ranks) * num_cols + first + cols, RANK * num_cols
    tl.store(out, dA, mask=inside)
    tl.store(out + whole, dB_gate, mask=inside)
    tl.store(out + 2 * whole, dB_up, mask=inside)
    if DOTS:
        out = sums_ptr + (part * num_sums + 3 * RANK) * num_cols + first + cols
        tl.store(out, tl.sum(gate_dots, axis=0)[None, :], mask=inside)
        tl.store(out + num_cols, tl.sum(up_dots, axis=0)[None, :], mask=inside)


def _options(rank: int, dots: bool, has_bias: bool) -> dict[str, int]:
    return _DOTS_OPTIONS if dots and not has_bias and rank == MIN_RANK else _OPTIONS


def _compile_entry(rank: int, gelu: bool, dots: bool, has_bias: bool = False) -> dict[str, Any]:
    rows = "dy gate up dgate dup v low"
    return {
        "signature": {
            **{f"{name}_ptr": "*bf16" for name in f"{rows} bias".split()},
            "sums_ptr": "*fp32",
            **{f"{name}_stride": "i32:16" for name in rows.split()},
            **dict.fromkeys(("num_rows", "first_up_rank"), "i32"),
            **dict.fromkeys(("num_cols", "span", "num_v_ranks", "num_low_ranks"), "i32:16"),
        },
        "constexprs": {
            **{"GELU": gelu, "DOTS": dots, "HAS_BIAS": has_bias},
            **{"RANK": rank, "BLOCK_T": _BLOCK_T, "BLOCK_F": _BLOCK_F},
        },
        "options": _options(rank, dots, has_bias),
    }


COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_glu_lora_bwd_kernel": [
        _compile_entry(MIN_RANK, gelu=True, dots=False),
        _compile_entry(MIN_RANK, gelu=False, dots=True),
        _compile_entry(MAX_RANK, gelu=False, dots=True, has_bias=True),
    ]
}


def _glu_lora_bwd_triton(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    v: Tensor,
    low: Tensor,
    ranks: Ranks,
    outs: tuple[Tensor, Tensor],
    dots: bool = False,
    bias: Tensor | None = None,
) -> GLUSums:
    num_rows, num_cols = gate.shape
    tile = max(next_power_of_2(max(ranks)), MIN_RANK)
    parts = max(-(-num_rows // SPAN), 1)
    num_sums = 3 * tile + 2 * dots
    sums = torch.empty(parts, num_sums, num_cols, dtype=torch.float32, device=gate.device)
    _glu_lora_bwd_kernel[(-(-num_cols // _BLOCK_F), parts)](
        *(dy, gate, up, *outs, v, low, dy if bias is None else bias, sums),
        *(x.stride(0) for x in (dy, gate, up, *outs, v, low)),
        *(num_rows, num_cols, SPAN, ranks.gate, v.shape[1], low.shape[1]),
        GELU=activation == "gelu_tanh",
        DOTS=dots,
        HAS_BIAS=bias is not None,
        RANK=tile,
        BLOCK_T=_BLOCK_T,
        BLOCK_F=_BLOCK_F,
        **_options(tile, dots, bias is not None),
    )
    # Apart: dA goes on as a gradient, and a view would keep all of them until that is dropped.
    dA, rest = sums[:, : ranks.down].sum(0), sums[:, tile:].sum(0)
    dB_gate, dB_up = rest[: 2 * tile].view(2, tile, num_cols)
    found = rest[2 * tile :].flatten() if dots else None
    return GLUSums(dA, dB_gate[: ranks.gate].T, dB_up[: ranks.up].T, found)


def _glu_lora_bwd_apart(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    v: Tensor,
    low: Tensor,
    ranks: Ranks,
    outs: tuple[Tensor, Tensor],
    dots: bool = False,
    bias: Tensor | None = None,
) -> GLUSums:
    """By the vendor's products; dy becomes y."""
    dgate, dup = outs
    if dots:  # reads both afterwards
        gate, up = (
            x.clone() if x.data_ptr() == out.data_ptr() else x
            for x, out in zip((gate, up), outs, strict=True)
        )
    glu_bwd(dy, gate, up, activation, outs=(dgate, dup, dy))
    wide = compute_dtype(gate.dtype)
    low_gate, low_up = low[:, : ranks.gate], low[:, ranks.gate : ranks.gate + ranks.up]
    return GLUSums(
        sum_over_rows(v[:, : ranks.down], dy, wide),
        sum_over_rows(dgate, low_gate, wide),
        sum_over_rows(dup, low_up, wide),
        glu_dots(outs, (gate, up), bias) if dots else None,
    )


def glu_dots(
    grads: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """DoRA's dots of gate and up [2 F] by themselves; bias [2 F] of both."""
    biases = (None, None) if bias is None else bias.chunk(2)
    return torch.cat([column_dots(*each) for each in zip(grads, outputs, biases, strict=True)])


def glu_lora_bwd(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    v: Tensor,
    low: Tensor,
    ranks: Ranks,
    outs: tuple[Tensor, Tensor],
    dots: bool = False,
    bias: Tensor | None = None,
) -> GLUSums:
    """dy, gate, up [T, F], V [T, R] of down_proj, U [T, R] of gate|up -> the sums; dgate and dup
    into `outs`.

    All with inner stride 1 and any row stride, one dtype; columns of v and low from the adapters'
    ranks on are zeros. outs may be gate and up themselves, element for element. dy is overwritten.
    dots: whether DoRA's are wanted, of gate and up less their bias [2 F].
    """
    # An fp32 tile of all five operands leaves no room in shared memory.
    fits = max(ranks) <= MAX_RANK and gate.dtype != torch.float32
    fused = engine_for(gate) == "triton" and fits
    engine = _glu_lora_bwd_triton if fused else _glu_lora_bwd_apart
    return engine(dy, gate, up, activation, v, low, ranks, outs, dots, bias)
