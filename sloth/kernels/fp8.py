"""Frozen matrices as 8-bit floats: a stack whose two wide products run on e4m3 numbers.

    forward  Y = e4m3(X) e4m3(W)^T + s U B^T,     U = X A^T
    backward dX = e4m3(dY) e4m3(W^T)^T + V A,     V = dY sB

Rows of X and dY are cast as they come, those of W once, when the layer is prepared: [N, K] with a
scale for each output for the forward and, since both operands of such a product are read along the
summed dimension, W^T [K, N] with a scale for each input for the backward: 2 bytes a weight beside
the stored matrix, dense or NF4, which stays as it is. Everything of LoRA is computed as in
`stacked.py`, from the X and dY that are not cast, in their dtype; dA, dB and the sums that follow
derive as ever. Only these two products are approximate.

The error: e4m3 rounds an element by at most 2^-4 of its size, so a sum of K products of random sign
errs by about 4% of its size, forward and backward alike, where bf16 errs by 0.3%. It is no bias,
and the adapter learns on top of it; still this is another network than the one that is saved, and
it is chosen by name. On an H100 such a product runs 1.8 to 1.9 times as fast as in bf16 at the
sizes of an 8B model.

LoRA's part comes in a second pass over the output, for a product of 8-bit floats has no room for
16-bit columns. DoRA scales the rows of W anew each step, which rows cast once cannot follow: it is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sloth.errors import KernelUnavailable
from sloth.kernels.ops.batch import NF4Batch, NF4Part
from sloth.kernels.ops.fp8_cast import FP8, fp8_cast
from sloth.kernels.ops.fp8_product import CAPABILITY, MULTIPLE, fp8_product
from sloth.kernels.ops.nf4 import NF4Weight
from sloth.kernels.stack_shape import StackShape, wide_rows
from sloth.kernels.stacked import LoraStack, Masks

# What the products with the frozen matrices run on; None: the dtype of the activations.
BaseCompute = Literal["fp8"] | None

# Columns of W that are turned and cast at a time.
TURNED_COLUMNS = 1024
# Short sums are fast, and forward their error is below that of the casts. A gradient passes through
# every layer's on its way back, so there they are wide.
_FAST_FORWARD, _FAST_BACKWARD = True, False


class FP8Weight(NamedTuple):
    """The matrices of a stack below each other, cast by output and, turned, by input.

    rows [N, K], turned [K, N] e4m3; row_scales [N], turned_scales [K] fp32.
    """

    rows: Tensor
    row_scales: Tensor
    turned: Tensor
    turned_scales: Tensor

    @classmethod
    def of(cls, members: Sequence[Any], dtype: torch.dtype) -> FP8Weight:
        """Cast the bases of a stack, unpacked to `dtype` first; they share a device."""
        dense = _unpacked(members, dtype)
        rows, row_scales = fp8_cast(dense)
        turned = torch.empty(dense.shape[::-1], dtype=FP8, device=dense.device)
        scales = []
        for start in range(0, len(turned), TURNED_COLUMNS):
            columns = slice(start, start + TURNED_COLUMNS)
            scales.append(fp8_cast(dense[:, columns].T, out=turned[columns])[1])
        return cls(rows, row_scales, turned, torch.cat(scales))


def _unpacked(members: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`."""
    bases = [member.base for member in members]
    if len(bases) == 1 and isinstance(bases[0], Tensor):
        return bases[0].detach().to(dtype)
    num_rows, num_columns = sum(m.out_features for m in members), members[0].in_features
    device = _codes_or_values(bases[0]).device
    dense = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
    places = dense.split([member.out_features for member in members])
    for base, place in zip(bases, places, strict=True):
        if isinstance(base, Tensor):
            place.copy_(base.detach())
    pairs = zip(bases, places, strict=True)
    NF4Batch([NF4Part(b, place) for b, place in pairs if isinstance(b, NF4Weight)]).run()
    return dense


def _codes_or_values(base: Any) -> Tensor:
    return base.codes if isinstance(base, NF4Weight) else base


def stamp(member: Any) -> tuple[int, int | None]:
    """Another value once a member's matrix was replaced or, by any in-place operation, written."""
    return member.address, version_of(_codes_or_values(member.base))


def version_of(values: Tensor) -> int | None:
    """A count of in-place writes; None for a tensor of inference mode, which has none."""
    return None if values.is_inference() else values._version


class FP8Stack(LoraStack):
    """A stack that multiplies by an `FP8Weight`.

    factors: zeros from `StackShape.factors`, which layers may share.
    """

    def __init__(
        self, members: Sequence[Any], shape: StackShape, factors: Tensor, weight: FP8Weight
    ) -> None:
        K, N, R = shape.num_inputs, shape.num_outputs, shape.rank
        A, sB = factors.split((R * K, N * R))
        super().__init__(members, shape, A.view(R, K), sB.view(N, R))
        self.weight = weight

    def new_input(self, num_rows: int) -> Tensor:
        """X [T, K]: nothing stands behind it."""
        return wide_rows(num_rows, self.K, self.A)

    def taken_in(self, x: Tensor, masks: Masks = None) -> tuple[Tensor, Tensor | None]:
        """x itself."""
        return x, None

    def forward(
        self,
        x: Tensor,
        masks: Masks = None,
        add: Tensor | None = None,
        out: Tensor | None = None,
        member: int | None = None,
        low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """LoRA and `add` are added to the rounded product."""
        rows = slice(0, self.N) if member is None else self.slots[member].rows
        x, w = x[:, : self.K], self.weight
        low = self.low_product(x, masks) if low is None else low
        x8, scales = fp8_cast(x)
        bias = None if self.bias is None else self.bias[rows]
        y = fp8_product(
            *(x8, scales, w.rows[rows], w.row_scales[rows], x.dtype, bias, _FAST_FORWARD)
        )
        if not self.R:
            y = y if out is None else out.copy_(y)
        elif out is None:
            y.addmm_(low, self.sB[rows].T)
        else:
            y = torch.addmm(y, low, self.sB[rows].T, out=out)
        return y if add is None else y.add_(add), low

    def input_gradient(self, dy: Tensor, masks: Masks = None) -> Tensor:
        """The frozen part of e4m3 numbers, LoRA's added to it."""
        w = self.weight
        dy8, scales = fp8_cast(dy[:, : self.N])
        dx = fp8_product(*(dy8, scales, w.turned, w.turned_scales, dy.dtype, None, _FAST_BACKWARD))
        del dy8
        return self.add_lora_gradient(dx, dy, masks)


def check_base_compute(value: str | None) -> BaseCompute:
    """The setting, or ValueError."""
    if value not in (None, "fp8"):
        raise ValueError(f"base_compute must be 'fp8' or None, got {value!r}")
    return "fp8" if value else None


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise KernelUnavailable where products of 8-bit floats cannot run.

    A CPU emulates them in any dtype; a GPU needs the instructions, and gives bf16.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise KernelUnavailable(
            f"base_compute='fp8' runs on CUDA and, emulated, on a CPU; the model is on {device}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise KernelUnavailable(
            f"base_compute='fp8' needs a GPU that multiplies 8-bit floats, of compute capability "
            f"8.9 or above (Ada, Hopper, Blackwell); {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}. Load without base_compute"
        )
    if dtype != torch.bfloat16:
        raise KernelUnavailable(
            f"base_compute='fp8' gives bfloat16 on a GPU, and the model computes in {dtype}; load "
            "with dtype='bfloat16'"
        )


def refuse_dora() -> None:
    """Raise KernelUnavailable: rows cast once cannot follow gains that change every step."""
    raise KernelUnavailable(
        "base_compute='fp8' casts the frozen matrices once, and DoRA scales their rows at every "
        "step; attach LoRA without use_dora, or load without base_compute"
    )


def require_fp8_stack(name: str, shape: StackShape, is_dora: bool) -> None:
    """Raise KernelUnavailable for a stack that cannot be one of 8-bit floats."""
    if is_dora:
        refuse_dora()
    sizes = (shape.num_inputs, *shape.outputs)
    if any(size % MULTIPLE for size in sizes):
        raise KernelUnavailable(
            f"base_compute='fp8' multiplies matrices whose sizes are multiples of {MULTIPLE}; "
            f"{name} has {shape.num_inputs} inputs and {', '.join(map(str, shape.outputs))} "
            "outputs. Load without base_compute"
        )
