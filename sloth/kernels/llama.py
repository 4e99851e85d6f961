"""The fused twin of the Llama block: the chain rule of one layer, written out, base frozen.

    n1 = norm(x);  q, k, v = rope(P_q(n1)), rope(P_k(n1)), P_v(n1);  o = attention(q, k, v)
    h = x + P_o(o);  n2 = norm(h);  g, u = P_gate(n2), P_up(n2);  y = h + P_down(silu(g) * u)

Each P is a frozen matrix, dense or NF4, with or without bias and LoRA. The backward walks these two
lines from their end to their start and forms gradients of x and of the LoRA matrices alone; where
nothing earlier wants one (layer 0 under frozen embeddings) it stops.

A frozen W needs no saved input, and a LoRA A needs one that is a cheap function of what is kept.
So a layer saves

    x, q and k after RoPE, v, o and its log-sum-exp, h, g, u; per LoRA its rank-wide x A^T, and one
    byte per input element of a LoRA with dropout

and rebuilds n1, n2 and silu(g) * u: in 16 bits 2 (2 D + 2 H E + 2 K E + 2 F) bytes a token, about
half of what autograd would keep, and nothing of size T x T. NF4 codes are unpacked once per
direction and dropped. Forward and backward call the ops' host functions, so they run on either
engine, and dtypes and accumulation are those of the ops.

The model file is the specification (`sloth/models/llama.py`); a test pins this file to it.
Shapes: B batch, T tokens, D model, H query heads, K kv heads, E head dim, F ffn, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.errors import KernelUnavailable
from sloth.kernels.context import BlockContext
from sloth.kernels.ops.add_rms_norm import add_rms_norm_bwd, add_rms_norm_fwd
from sloth.kernels.ops.attention import attention_bwd, attention_fwd
from sloth.kernels.ops.glu import glu_bwd, glu_fwd
from sloth.kernels.ops.lora_linear import (
    Base,
    LoraOperands,
    Needs,
    draw_dropout_mask,
    lora_linear_bwd,
    lora_linear_fwd,
)
from sloth.kernels.ops.rms_norm import rms_norm_bwd, rms_norm_fwd
from sloth.kernels.ops.rope import rope_bwd, rope_fwd

NAMES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class _Frozen:
    """A projection without its LoRA matrices: those are inputs of the Function, saved as such."""

    base: Base
    bias: Tensor | None
    scale: float
    dropout: float
    training: bool


@dataclass(frozen=True)
class _Block:
    """Everything of a block that gets no gradient, as it was at the time of the forward."""

    projections: dict[str, _Frozen]
    norm1: _Norm
    norm2: _Norm
    head_dim: int
    scale: float


class _Projections:
    """The seven projections of one call, by name: runs them both ways and keeps what that needs.

    lows: x A^T of each LoRA. masks: which inputs of A survived dropout, one byte each.
    wanted: whether A and B want a gradient. gradients: those of A and B.
    """

    def __init__(self, parts: _Block, matrices: Sequence[Tensor | None]) -> None:
        self.parts = parts.projections
        self.loras: dict[str, LoraOperands | None] = {}
        for name, A, B in zip(NAMES, matrices[::2], matrices[1::2], strict=True):
            part = self.parts[name]
            self.loras[name] = (
                None if A is None or B is None else LoraOperands(A, B, part.scale, part.dropout)
            )
        self.lows: dict[str, Tensor | None] = {}
        self.masks: dict[str, Tensor | None] = {}
        self.wanted: dict[str, tuple[bool, bool]] = {}
        self.gradients: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def forward(self, name: str, source: Tensor) -> Tensor:
        """P_name(source)."""
        part, lora = self.parts[name], self.loras[name]
        mask = draw_dropout_mask(source, lora, part.training)
        y, self.lows[name] = lora_linear_fwd(source, part.base, part.bias, lora, mask)
        self.masks[name] = None if mask is None else mask != 0
        return y

    def backward(self, name: str, dy: Tensor, source: Tensor | None, need_dsource: bool) -> Any:
        """Gradient of `source` given that of P_name(source); None where not needed.

        `source` itself is read for the gradient of A alone.
        """
        part, mask = self.parts[name], self.masks[name]
        if mask is not None:
            mask = mask.to(dy.dtype) / (1.0 - part.dropout)
        needs = Needs(need_dsource, False, False, *self.wanted[name])
        grads = lora_linear_bwd(
            dy, source, part.base, self.loras[name], self.lows[name], mask, needs
        )
        self.gradients[name] = grads.dA, grads.dB
        return grads.dx

    def learn(self, *names: str) -> bool:
        """Whether a LoRA matrix of one of these wants a gradient."""
        return any(any(self.wanted[name]) for name in names)


class LlamaBlockFunction(torch.autograd.Function):
    """One layer. Inputs after the context: A and B of q, k, v, o, gate, up, down, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: _Block, context: BlockContext, *matrices: Tensor | None
    ) -> Tensor:
        P = _Projections(parts, matrices)
        norm1, norm2, cos, sin = parts.norm1, parts.norm2, *_tables(context)
        heads = (*x.shape[:-1], -1, parts.head_dim)

        n1, _ = rms_norm_fwd(x, norm1.weight, norm1.eps, norm1.offset)
        q, k = P.forward("q", n1).view(heads), P.forward("k", n1).view(heads)
        v = P.forward("v", n1).view(heads).transpose(1, 2)
        q, k = rope_fwd(q, k, cos, sin)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        o, attention = attention_fwd(q, k, v, parts.scale, context.layout)
        delta = P.forward("o", _merged(o))

        n2, h, _ = add_rms_norm_fwd(delta, x, norm2.weight, norm2.eps, norm2.offset)
        gate, up = P.forward("gate", n2), P.forward("up", n2)
        y = h + P.forward("down", glu_fwd(gate, up, "silu"))

        lows, masks = (P.lows[name] for name in NAMES), (P.masks[name] for name in NAMES)
        ctx.save_for_backward(x, q, k, v, o, h, gate, up, *matrices, *lows, *masks, *attention)
        ctx.parts, ctx.context = parts, context
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts: _Block = ctx.parts
        context: BlockContext = ctx.context
        x, q, k, v, o, h, gate, up, *rest = ctx.saved_tensors
        num, need_dx = len(NAMES), ctx.needs_input_grad[0]
        P = _Projections(parts, rest[: 2 * num])
        P.lows = dict(zip(NAMES, rest[2 * num :], strict=False))
        P.masks = dict(zip(NAMES, rest[3 * num :], strict=False))
        attention = tuple(rest[4 * num :])
        wanted = ctx.needs_input_grad[3:]
        P.wanted = dict(zip(NAMES, zip(wanted[::2], wanted[1::2], strict=True), strict=True))
        norm1, norm2, cos, sin = parts.norm1, parts.norm2, *_tables(context)

        # Is a gradient wanted before this point? Front to back: into q, k, v; of h; of g and u.
        into_attention = need_dx or P.learn("q", "k", "v")
        into_h = into_attention or P.learn("o")
        into_mlp = into_h or P.learn("gate", "up")

        # y = h + P_down(silu(g) * u)
        product = glu_fwd(gate, up, "silu") if P.learn("down") else None
        dproduct = P.backward("down", dy, product, into_mlp)
        if into_mlp:
            # g, u = P_gate(n2), P_up(n2)
            dgate, dup = glu_bwd(dproduct, gate, up, "silu")
            n2, rstd2 = rms_norm_fwd(h, norm2.weight, norm2.eps, norm2.offset)
            dn2 = P.backward("gate", dgate, n2, into_h)
            dn2_up = P.backward("up", dup, n2, into_h)
        dh = dx = None
        if into_h:
            # n2 = norm(h); h reaches y directly too.   h = x + P_o(o)
            dn2 = dn2.add_(dn2_up)
            dh, _ = add_rms_norm_bwd(dn2, dy, h, norm2.weight, rstd2, norm2.offset, False)
            do = P.backward("o", dh, _merged(o), into_attention)
        if into_attention:
            # o = attention(q, k, v);  q, k = rope(..)
            do = do.view(*x.shape[:-1], -1, parts.head_dim).transpose(1, 2)
            dq, dk, dv = attention_bwd(do, q, k, v, o, attention, parts.scale, context.layout)
            dq, dk = rope_bwd(dq.transpose(1, 2), dk.transpose(1, 2), cos, sin)
            # q, k, v = P(n1)
            n1, rstd1 = rms_norm_fwd(x, norm1.weight, norm1.eps, norm1.offset)
            dn1 = P.backward("q", dq.flatten(2), n1, need_dx)
            dn1_k = P.backward("k", dk.flatten(2), n1, need_dx)
            dn1_v = P.backward("v", _merged(dv), n1, need_dx)
        if need_dx:
            # n1 = norm(x); x reaches h directly too
            dn1 = dn1.add_(dn1_k).add_(dn1_v)
            dx, _ = rms_norm_bwd(dn1, x, norm1.weight, rstd1, norm1.offset, False, dresidual=dh)
        factors = (d for name in NAMES for d in P.gradients.get(name, (None, None)))
        return dx, None, None, *factors


def block(module: Any, hidden_BTD: Tensor, context: BlockContext) -> Tensor:
    """One Llama layer: hidden [B, T, D] -> [B, T, D]; differentiable in hidden and LoRA matrices.

    module: a block with Hugging Face's names (`sloth.models.llama.Block`). Raises KernelUnavailable
    where a parameter other than LoRA's wants a gradient, and for a context with a cache.
    """
    if context.cache is not None:
        raise KernelUnavailable("the fused block keeps no cache; decode with the plain block")
    attention, mlp = module.self_attn, module.mlp
    members = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    projections: dict[str, _Frozen] = {}
    matrices: list[Tensor | None] = []
    for name, member in members.items():
        base, bias, lora = member.base, member.bias, member.lora
        _refuse_gradient(f"{name}_proj.weight", base)
        _refuse_gradient(f"{name}_proj.bias", bias)
        scale, dropout = (lora.scale, lora.dropout) if lora else (1.0, 0.0)
        projections[name] = _Frozen(base, bias, scale, dropout, member.training)
        matrices += (lora.A, lora.B) if lora else (None, None)
    norm1 = _norm("input_layernorm", module.input_layernorm)
    norm2 = _norm("post_attention_layernorm", module.post_attention_layernorm)
    parts = _Block(projections, norm1, norm2, attention.head_dim, attention.scale)
    return LlamaBlockFunction.apply(hidden_BTD, parts, context, *matrices)


def _norm(name: str, module: Any) -> _Norm:
    _refuse_gradient(f"{name}.weight", module.weight)
    return _Norm(module.weight, module.eps, module.offset)


def _refuse_gradient(name: str, value: Any) -> None:
    """The twin derives no gradient of the base: an error, rather than one that stays None."""
    if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
        raise KernelUnavailable(
            f"the fused level derives no gradient of {name}, which requires one; freeze the base "
            "(add_lora does) or load with level='ops'"
        )


def _tables(context: BlockContext) -> tuple[Tensor, Tensor]:
    assert context.cos is not None and context.sin is not None, "every Llama layer has RoPE"
    return context.cos, context.sin


def _merged(x_BHTE: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, H * E]."""
    return x_BHTE.transpose(1, 2).flatten(2)
