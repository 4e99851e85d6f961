"""DoRA's gains of a layer's projections, taken anew before each forward.

Where kernels can, straight from codes and dense matrices (`ops/dora_gains.py`); else one projection
after another, from its matrix without gains, unpacked into its place in the scratch first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth.kernels.ops.batch import CopyBatch, CopyPart, NF4Batch, NF4Part
from sloth.kernels.ops.dora import Gains, adapted_norms
from sloth.kernels.ops.dora_gains import Adapted, GainsLaunches, is_fused
from sloth.kernels.ops.nf4 import NF4Weight


class GainsPart(NamedTuple):
    """A projection with magnitudes, its adapter on: its places in the scratch, W's [O, K] and A's
    [r, K], and what takes its gains."""

    member: Any
    place: Tensor
    A: Tensor
    gains: Gains


class GainsBatch:
    """The gains of a layer's projections, by the factors and magnitudes of each run.

    Addresses are read once, here; the tensors are kept alive. A run writes A into the scratch too.
    """

    def __init__(self, parts: Sequence[GainsPart]) -> None:
        self.parts = list(parts)
        self._matrices = [_matrix(part) for part in self.parts]
        inputs = zip(self.parts, self._matrices, strict=True)
        self._inputs = CopyBatch([CopyPart(p.member.lora.A, each.A, 1.0) for p, each in inputs])
        fused = [each for each in self._matrices if is_fused(each)]
        if len({(each.B.dtype, each.m.dtype) for each in fused}) > 1:
            fused = []
        self._launches = GainsLaunches(fused) if fused else None
        # What unpacks a matrix of the others.
        self._apart: dict[int, NF4Batch] = {}
        for i, (part, each) in enumerate(zip(self.parts, self._matrices, strict=True)):
            if not any(each is other for other in fused):
                base = each.base
                codes = [NF4Part(base, part.place)] if isinstance(base, NF4Weight) else []
                self._apart[i] = NF4Batch(codes)

    @torch.no_grad()
    def run(self) -> None:
        """Take them; norms that are held stay as they are."""
        if not self.parts:
            return
        held = [part.member.held_norms for part in self.parts]
        self._inputs.run()
        if self._launches is not None:
            self._launches.run()
        for i, norms in enumerate(held):
            if norms is not None or i in self._apart:
                each = self._matrices[i]
                each.gains.put(each.m, self._norms(i) if norms is None else norms, each.scale)

    def _norms(self, i: int) -> Tensor:
        """By torch; a dense matrix is read where it lies."""
        base, A, B, _, squared, scale, _ = self._matrices[i]
        self._apart[i].run()
        W = base.detach().to(A.dtype) if isinstance(base, Tensor) else self.parts[i].place
        return adapted_norms(W, A, (B.to(squared.dtype) * scale).to(A.dtype), squared)


def _matrix(part: GainsPart) -> Adapted:
    member, gains = part.member, part.gains
    lora, squared = member.lora, member.squared_norms(gains.rows.dtype)
    return Adapted(member.base, part.A, lora.B, lora.magnitude.m, squared, lora.scale, gains)
