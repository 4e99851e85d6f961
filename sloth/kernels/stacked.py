"""Projections that read one input as one product, their LoRA inside it: q|k|v, o, gate|up, down.

Shapes: T tokens, K in, N out of all members together, R the sum of their ranks, padded.

    scratch  W~ = | W  sB |  [N + R, K + R]    W the matrices below each other, B on the blocks of
                  | A   0 |                    its members, A the members' below each other
    forward  U = X A^T;    Y = [X U] [W sB]^T             = X W^T + s U B^T
    backward V = dY sB;    dX = [dY V] [W; A]             = dY W + s (dY B) A
             dA = V^T X;   dB = s dY^T U                  (its diagonal blocks)

So each direction is one wide product: LoRA costs R / K more operations instead of reading and
writing every output once more (+0 to 3% against +18 to 31% on an H100). X and dY stand in buffers
with room for their tails, which the kernels before write into. The sum of base and LoRA is rounded
once. A, sB, U and V are in the dtype of X, dA and dB are summed in fp32.

LoRA dropout gives every member an input of its own, so there the low-rank products stay apart.

NF4 matrices are unpacked into the scratch, which layers of one shape share, at every pass; dense
ones live in a scratch of their own, `weight` a view of it, so that nothing is copied.

DoRA multiplies the rows of W and sB by gains (`ops/dora.py`), which stand in the scratch already:
nothing above changes, but that dB gets its gains as well, and that the magnitudes' gradient wants
the outputs Y beside dY, over the same rows as dB. Such a stack copies dense matrices too: a gain
belongs to one step.
Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; block products by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.gains import GainsPart
from sloth.kernels.normed import Normed
from sloth.kernels.ops.batch import CopyPart, NF4Part
from sloth.kernels.ops.dora import Gains
from sloth.kernels.ops.dora_sums import output_sums
from sloth.kernels.ops.lora_linear import LoraOperands
from sloth.kernels.ops.nf4 import NF4Weight
from sloth.kernels.ops.thin_products import copy_low
from sloth.kernels.rows import sum_over_rows
from sloth.kernels.stack_shape import Slot, StackShape, wide_rows

Masks = list[Tensor | None] | None
# Of A, B and the magnitudes.
Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted = Sequence[tuple[bool, bool, bool]]


class Sums(NamedTuple):
    """Sums over rows that a kernel formed on its way; None for those still to be formed.

    dA: of all members below each other [R or less, K]. dB: of each member [its N, its rank], not
    scaled yet. dots: sum dY (Y - b) [N], for a stack with DoRA (`ops/dora.py`).
    """

    dA: Tensor | None = None
    dB: Sequence[Tensor] | None = None
    dots: Tensor | None = None


_NO_SUMS = Sums()
# Ranks of a stack above which the zeros between its members' blocks cost more than the launches
# that leave them out: 5 ms of a step's 528 for gate and up at r = 256 (8B, 4x2048, H100).
_BLOCKS_APART = 192
# Gradients lie as their parameters do, or autograd would copy them.
_ROWS = torch.contiguous_format


class LoraStack:
    """What a twin sees of a stack: the members, their LoRA, and the two directions.

    How the product with W itself is formed is the subclass's: `Stack` here, `fp8.FP8Stack`.
    A [R, K], sB [N, R]: what the members' factors are copied into, zero elsewhere. gains: of each
    output row, of a stack with DoRA; None for another. is_own: W stays unpacked in scratch that
    nothing else writes.
    """

    is_own = False

    def __init__(
        self,
        members: Sequence[Any],
        shape: StackShape,
        A: Tensor,
        sB: Tensor,
        gains: Gains | None = None,
    ) -> None:
        self.members, self.shape, self.A, self.sB = list(members), shape, A, sB
        self.slots = shape.slots
        self.K, self.N, self.R = shape.num_inputs, shape.num_outputs, shape.rank
        self.num_ranks = sum(shape.ranks)
        # Off its diagonal blocks sB is zero: multiplied too where that costs no second read of dY.
        aligned = all(rank and rank % 8 == 0 for rank in shape.ranks)
        self._apart = len(shape.ranks) > 1 and self.R > _BLOCKS_APART and aligned
        self.bias = _stacked_bias(self.members, shape)
        self.gains = gains

    @property
    def is_dora(self) -> bool:
        """Whether a member has magnitudes, so that their gradient will ask for outputs."""
        return self.gains is not None

    # -- what fills the scratch ------------------------------------------------------------------

    def codes(self) -> list[NF4Part]:
        """What unpacks each quantized member at every pass, DoRA's gains inside."""
        return []

    def copies(self) -> list[CopyPart]:
        """What copies every A and B; a switched-off adapter counts as zero."""
        parts = []
        for member, slot in zip(self.members, self.slots, strict=True):
            if member.lora_slot is None:
                continue
            lora: LoraOperands = member.lora_slot
            on = 1.0 if member.lora_enabled else 0.0
            gains = self._gains_at(slot)
            parts.append(CopyPart(lora.A, self.A[slot.ranks], on))
            parts.append(CopyPart(lora.B, self.sB[slot.rows, slot.ranks], on * lora.scale, gains))
        return parts

    def _gains_at(self, slot: Slot) -> Tensor | None:
        return None if self.gains is None else self.gains.rows[slot.rows]

    def output_sums(self, dy: Tensor, y: Tensor | None, low: Tensor) -> Sums:
        """What dy, y [n, N or more] and U [n, R] give: dots of a stack with DoRA, and dB where it
        comes along; nothing of another stack."""
        if not self.is_dora:
            return _NO_SUMS
        assert y is not None
        dots, dB = output_sums(dy[:, : self.N], y[:, : self.N], self.bias, low, self.num_ranks)
        dBs = None if dB is None else [dB[slot.rows, slot.ranks] for slot in self.slots]
        return Sums(dB=dBs, dots=dots)

    # -- the two directions ----------------------------------------------------------------------

    def new_input(self, num_rows: int) -> Tensor:
        """Room for X [T, K] and what `forward` puts behind it, with rows that are aligned."""
        raise NotImplementedError

    def taken_in(self, x: Tensor, masks: Masks = None) -> tuple[Tensor, Tensor | None]:
        """x [T, K] where `forward` takes it, and U if that came along."""
        raise NotImplementedError

    def new_output_gradient(self, num_rows: int) -> Tensor:
        """Room for [dY V], [T, N + R]."""
        return wide_rows(num_rows, self.N + self.R, self.A)

    def forward(
        self,
        x: Tensor,
        masks: Masks = None,
        add: Tensor | None = None,
        out: Tensor | None = None,
        member: int | None = None,
        low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x from `new_input`, its first K columns filled, or `taken_in` -> (Y [T, N], U [T, R]).

        masks: dropout of each member's LoRA input. add [T, N] joins the sum. out: takes Y. member:
        this member's columns alone, [T, its N]. low: U, where it is known.
        """
        raise NotImplementedError

    def input_gradient(self, dy: Tensor, masks: Masks = None) -> Tensor:
        """dX [T, K] of a spread dy [T, N + R]."""
        raise NotImplementedError

    def low_product(self, x: Tensor, masks: Masks) -> Tensor:
        """U = X A^T [T, R]; with masks, of each member's own dropped X."""
        x = x[:, : self.K]
        if masks is None:
            return x @ self.A.T
        low = x.new_zeros(len(x), self.R)
        for slot, mask in zip(self.slots, masks, strict=True):
            low[:, slot.ranks] = _dropped(x, mask) @ self.A[slot.ranks].T
        return low

    def spread(self, dy: Tensor) -> Tensor:
        """Fill V, the last R columns of dy [T, N + R], from the first N; returns dy."""
        v = dy[:, self.N :]
        if self._apart:
            v[:, self.num_ranks :].zero_()
            for slot in self.slots:
                sB = self.sB[slot.rows, slot.ranks]
                torch.mm(dy[:, slot.rows], sB, out=v[:, slot.ranks])
        elif self.R:
            torch.mm(dy[:, : self.N], self.sB, out=v)
        return dy

    def add_lora_gradient(self, dx: Tensor, dy: Tensor, masks: Masks) -> Tensor:
        """dX [T, K] of the base, plus what comes through A of a spread dy, in place."""
        v = dy[:, self.N :]
        if masks is None:
            return dx.addmm_(v, self.A) if self.R else dx
        for slot, mask in zip(self.slots, masks, strict=True):
            dx += _dropped(v[:, slot.ranks] @ self.A[slot.ranks], mask)
        return dx

    def factor_gradients(
        self,
        dy: Tensor,
        x: Tensor | Normed | None,
        low: Tensor,
        masks: Masks,
        wanted: Wanted,
        sums: Sums = _NO_SUMS,
    ) -> list[Factors]:
        """(dA, dB, dm) of each member, where wanted, of a spread dy [T, N + R].

        x: the stack's input [T, K or more], None where sums has dA.
        """
        v, (dA, dBs, dots) = dy[:, self.N :], sums
        loras = [member.lora_slot for member in self.members]
        any_dA, any_dB, _ = (any(want[i] for want in wanted) for i in (0, 1, 2))
        rows = None
        if any_dA and dA is None:
            dtype = _dtype_of([lora.A for lora in loras if lora])
            if masks is None and isinstance(x, Normed):
                dA = x.sum_with(v, self.num_ranks, dtype)
            else:
                assert x is not None
                rows = (x.wide if isinstance(x, Normed) else x)[:, : self.K]
                dA = sum_over_rows(v, rows, dtype) if masks is None else None
            if dA is not None and len(dA) > self.num_ranks:
                # A gradient that is a view keeps all of the padding until it is dropped.
                dA = dA[: self.num_ranks].clone()
        if any_dB and dBs is None:
            dtype = _dtype_of([lora.B for lora in loras if lora])
            if self._apart:
                pairs = ((dy[:, slot.rows], low[:, slot.ranks]) for slot in self.slots)
                dBs = [sum_over_rows(*pair, dtype) for pair in pairs]
            else:
                dB = sum_over_rows(dy[:, : self.N], low, dtype)
                dBs = [dB[slot.rows, slot.ranks] for slot in self.slots]
        if dots is not None and self.gains is not None:
            dots = dots * self.gains.inverse
        factors: list[Factors] = []
        for index, (lora, slot) in enumerate(zip(loras, self.slots, strict=True)):
            need_dA, need_dB, need_dm = wanted[index]
            own_dA = own_dB = dm = None
            if need_dA and dA is not None:
                own_dA = dA[slot.ranks].to(lora.A.dtype)
            elif need_dA and masks is not None and rows is not None:
                dropped = _dropped(rows, masks[index])
                own_dA = sum_over_rows(v[:, slot.ranks], dropped, lora.A.dtype)
            if need_dB and dBs is not None:
                own_dB = torch.empty_like(dBs[index], dtype=lora.B.dtype, memory_format=_ROWS)
                scale = lora.scale if self.gains is None else self.gains.scaled[slot.rows, None]
                torch.mul(dBs[index], scale, out=own_dB)
            if need_dm:
                assert dots is not None
                dm = dots[slot.rows].to(lora.magnitude.m.dtype)
            factors.append((own_dA, own_dB, dm))
        return factors


class Stack(LoraStack):
    """One stack of a layer, in a scratch that `layer.FusedLayer.fill` keeps current, its `own` or
    one that others share."""

    def __init__(
        self,
        members: Sequence[Any],
        shape: StackShape,
        scratch: Tensor,
        gains: Gains | None = None,
        own: bool = False,
    ) -> None:
        N, K = shape.num_outputs, shape.num_inputs
        super().__init__(members, shape, scratch[N:, :K], scratch[:N, K:], gains)
        self.scratch, self.is_own = scratch, own

    def codes(self) -> list[NF4Part]:
        parts = []
        for member, slot in zip(self.members, self.slots, strict=True):
            base, place = member.base, self.scratch[slot.rows, : self.K]
            if isinstance(base, NF4Weight):
                parts.append(NF4Part(base, place, self._gains_at(slot)))
        return parts

    def copies(self) -> list[CopyPart]:
        """With DoRA dense matrices come along, which take its gains."""
        parts = super().copies()
        for member, slot in zip(self.members, self.slots, strict=True):
            gains = self._gains_at(slot)
            if gains is not None and isinstance(member.base, Tensor):
                parts.append(CopyPart(member.base, self.scratch[slot.rows, : self.K], 1.0, gains))
        return parts

    def gain_parts(self) -> list[GainsPart]:
        """What takes the gains of every member with magnitudes; the others' are set here."""
        parts: list[GainsPart] = []
        if self.gains is None:
            return parts
        for member, slot in zip(self.members, self.slots, strict=True):
            own, lora = self.gains.of(slot.rows), member.lora
            own.rows.fill_(1.0), own.inverse.zero_()
            own.scaled.fill_(1.0 if lora is None else lora.scale)
            if lora is not None and lora.magnitude is not None:
                place, A = self.scratch[slot.rows, : self.K], self.A[slot.ranks]
                parts.append(GainsPart(member, place, A, own))
        return parts

    def new_input(self, num_rows: int) -> Tensor:
        """[X U], [T, K + R]."""
        return wide_rows(num_rows, self.K + self.R, self.scratch)

    def taken_in(self, x: Tensor, masks: Masks = None) -> tuple[Tensor, Tensor | None]:
        """A copy with room behind it, x itself where no rank asks for any; U on the way, unless
        members drop inputs of their own."""
        if not self.R:
            return x, None
        wide = self.new_input(len(x))
        place = wide[:, : self.K]
        if masks is None:
            return wide, copy_low(x, self.A, self.num_ranks, place)
        place.copy_(x)
        return wide, None

    def forward(
        self,
        x: Tensor,
        masks: Masks = None,
        add: Tensor | None = None,
        out: Tensor | None = None,
        member: int | None = None,
        low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One product of [X U] [T, K + R], the sum with `add` rounded once; with masks two."""
        rows = slice(0, self.N) if member is None else self.slots[member].rows
        weight, bias = self.scratch[rows], None if self.bias is None else self.bias[rows]
        if not self.R:
            return _product(x, weight, bias, add, out), x.new_empty(len(x), 0)
        if masks is None:
            low = self.low_product(x, None) if low is None else low
            x[:, self.K :] = low
            return _product(x, weight, bias, add, out), low
        low = self.low_product(x, masks)
        y = _product(x[:, : self.K], weight[:, : self.K], bias, add, out)
        return y.addmm_(low, self.sB[rows].T), low

    def input_gradient(self, dy: Tensor, masks: Masks = None) -> Tensor:
        if masks is None:
            return dy @ self.scratch[:, : self.K]
        dx = dy[:, : self.N] @ self.scratch[: self.N, : self.K]
        return self.add_lora_gradient(dx, dy, masks)


def _dtype_of(matrices: list[Tensor]) -> torch.dtype:
    return matrices[0].dtype


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor | None
) -> Tensor:
    """x weight^T + bias + add, into `out` if given; then there is nothing to add."""
    assert add is None or out is None
    if bias is not None:
        y = (
            torch.addmm(bias, x, weight.T)
            if out is None
            else torch.addmm(bias, x, weight.T, out=out)
        )
        return y if add is None else y.add_(add)
    if add is not None:
        return torch.addmm(add, x, weight.T)
    return torch.mm(x, weight.T) if out is None else torch.mm(x, weight.T, out=out)


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _stacked_bias(members: list[Any], shape: StackShape) -> Tensor | None:
    """The members' biases in a row, zeros for one without; None if none has one."""
    present = [m.bias for m in members if m.bias is not None]
    if not present:
        return None
    parts = [
        present[0].new_zeros(n) if m.bias is None else m.bias.detach()
        for m, n in zip(members, shape.outputs, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
