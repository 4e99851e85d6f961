"""A projection y = x W^T + b with a slot for LoRA: `q_proj.weight` keeps its name with or without
one.

`Projection` is the interface that models and twins see: `base` (a dense matrix or NF4 codes),
`bias`, and `lora` (the low-rank operands, or None). `Linear` stores the matrix dense;
`quant.Linear4bit` in NF4. The adapter is injected, not wrapped around: `lora_A` and `lora_B` are
None or children holding `weight`, so `q_proj.lora_A.weight` is PEFT's key without its prefix; so is
`q_proj.lora_magnitude_vector`, the trained row lengths of DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sloth.kernels.dispatch import OPS, Ops
from sloth.kernels.ops.dora import Magnitude, squared_row_norms
from sloth.kernels.ops.lora_linear import Base, LoraOperands, adapted_row_norms
from sloth.kernels.rows import compute_dtype


class OpModule(nn.Module):
    """A module that computes through an op table, so that one attribute sets its kernel level."""

    ops: Ops = OPS


class LoraFactor(nn.Module):
    """One of the two low-rank matrices; a module so that its parameter is named `.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Projection(OpModule):
    """Shared half of every projection: shapes, bias and the LoRA slot."""

    lora_A: LoraFactor | None
    lora_B: LoraFactor | None
    lora_magnitude_vector: nn.Parameter | None
    token_adapter: Any  # trained rows of an output head, `embedding.TokenRows`; read by the decoder
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self.register_module("lora_A", None)
        self.register_module("lora_B", None)
        self.register_parameter("lora_magnitude_vector", None)
        self.register_module("token_adapter", None)
        self.lora_scale = 1.0
        self.lora_dropout = 0.0
        self.lora_enabled = True
        self._squared_norms: tuple[object, Tensor] | None = None
        self._held_norms: Tensor | None = None
        self._held_factors: tuple[Tensor, Tensor] | None = None

    @property
    def base(self) -> Base:
        """The frozen or trained matrix [out, in]: a tensor, or NF4 codes."""
        raise NotImplementedError

    @property
    def address(self) -> int:
        """Where the matrix lies in memory: another number when it was replaced."""
        raise NotImplementedError

    @property
    def lora(self) -> LoraOperands | None:
        """The adapter's operands, None without one or while it is switched off."""
        return self.lora_slot if self.lora_enabled else None

    @property
    def lora_slot(self) -> LoraOperands | None:
        """The adapter's operands, switched on or off; None without one."""
        if self.lora_A is None or self.lora_B is None:
            return None
        A, B = self.factors_in_use
        return LoraOperands(A, B, self.lora_scale, self.lora_dropout, self._magnitude())

    @property
    def factors_in_use(self) -> tuple[Tensor, ...]:
        """A and B as they compute: the held ones where some are, but never for a gradient, which
        belongs to the parameters. None without an adapter."""
        held = None if torch.is_grad_enabled() else self._held_factors
        return held or self.lora_factors

    @property
    def has_lora(self) -> bool:
        """Whether an adapter is attached, switched on or off."""
        return self.lora_A is not None

    @property
    def lora_factors(self) -> tuple[Tensor, ...]:
        """A and B as they are trained, none without an adapter."""
        if self.lora_A is None or self.lora_B is None:
            return ()
        return self.lora_A.weight, self.lora_B.weight

    def attach_lora(
        self,
        rank: int,
        scale: float,
        dropout: float,
        device: torch.device,
        use_dora: bool = False,
    ) -> None:
        """Fill the slot with fp32 A [rank, in] and B [out, rank], zeros until `draw_lora`; with
        use_dora the magnitudes [out] start at the norms of the base's rows.
        """
        self.lora_A = LoraFactor(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = LoraFactor(torch.zeros(self.out_features, rank, device=device))
        self.lora_scale, self.lora_dropout = scale, dropout
        if use_dora:
            lengths = torch.empty(self.out_features, device=device)
            if device.type != "meta":
                lengths = self.squared_norms(torch.float32).sqrt()
            self.lora_magnitude_vector = nn.Parameter(lengths)

    @torch.no_grad()
    def draw_lora(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(in), B zero: PEFT's start (Kaiming uniform with a = sqrt(5))."""
        assert self.lora_A is not None and self.lora_B is not None
        bound = 1 / math.sqrt(self.in_features)
        self.lora_A.weight.uniform_(-bound, bound, generator=generator)
        self.lora_B.weight.zero_()

    def squared_norms(self, dtype: torch.dtype) -> Tensor:
        """||W_j||^2 [out] of the base's rows in `dtype`; kept while the base stays as it is."""
        base = self.base
        version = None
        if isinstance(base, Tensor) and not base.is_inference():
            version = base._version  # counts what was written in place
        key = (self.address, version, base.dtype, dtype)
        if self._squared_norms is None or self._squared_norms[0] != key:
            self._squared_norms = key, squared_row_norms(base, dtype)
        return self._squared_norms[1]

    def hold_adapter(self, dtype: torch.dtype | None = None) -> None:
        """Take DoRA's norms once, as the factors are now, and the factors in `dtype` if one is
        given, until `release_adapter`."""
        lora = self.lora_slot
        if lora is None:
            return
        if lora.magnitude is not None:
            self._held_norms = adapted_row_norms(self.base, lora, self.base.dtype)
        if dtype is not None:
            self._held_factors = lora.A.detach().to(dtype), lora.B.detach().to(dtype)

    @property
    def held_norms(self) -> Tensor | None:
        """DoRA's norms as they are held, None while they follow the factors."""
        return self._held_norms

    def release_adapter(self) -> None:
        """Follow the factors again."""
        self._held_norms = self._held_factors = None

    def _magnitude(self) -> Magnitude | None:
        m = self.lora_magnitude_vector
        if m is None or self.lora_A is None:
            return None
        if self._held_norms is not None:
            return Magnitude(m, None, self._held_norms)
        return Magnitude(m, self.squared_norms(compute_dtype(self.lora_A.weight.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        return self.ops.lora_linear(x, self.base, self.bias, self.lora, self.training)


class Linear(Projection):
    """Projection with a dense weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    @property
    def base(self) -> Base:
        return self.weight

    @property
    def address(self) -> int:
        return self.weight.data_ptr()


# A decoder asks for each projection by its path, so that a checkpoint can decide what is quantized.
ProjectionFactory = Callable[[str, int, int, bool], Projection]


def dense_projection(path: str, in_features: int, out_features: int, bias: bool) -> Projection:
    """The factory that stores every projection dense."""
    return Linear(in_features, out_features, bias)
