"""The fused twin of the Llama block: the chain rule of one layer, written out, base frozen.

    n1 = norm(x);  q, k, v = rope(P_q(n1)), rope(P_k(n1)), P_v(n1);  o = attention(q, k, v)
    h = x + P_o(o);  n2 = norm(h);  g, u = P_gate(n2), P_up(n2);  y = h + P_down(silu(g) * u)

Each P is a frozen matrix, dense or NF4, with or without bias and LoRA; those that read one input
are one product (`stacked.py`). The backward walks these two lines from their end to their start and
forms gradients of x and of the LoRA matrices alone; where nothing earlier wants one (layer 0 under
frozen embeddings) it stops.

A frozen W needs no saved input, and a LoRA A needs one that is a cheap function of what is kept. So
a layer keeps at most

    x, q and k after RoPE, v, o and its log-sum-exp, h, g, u; per stack its rank-wide X A^T, and one
    byte per input element of a LoRA with dropout

in 16 bits 2 (2 D + 2 H E + 2 K E + 2 F) bytes a token, about half of what autograd would keep, and
nothing of size T x T. It makes n1, n2 and silu(g) * u again, and whatever else `context.keep` does
not name; only P_down is never computed twice, since nothing needs its output. Norms, RoPE and the
MLP work row by row, so `keep.tile_tokens` bounds what the MLP holds at a time.

The model file is the specification (`sloth/models/llama.py`); a test pins this file to it. Forward
and backward call the ops' host functions, so they run on either engine.
Shapes: B batch, T tokens, N = B T rows, D model, H query heads, K kv heads, E head dim, F ffn, R
rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.errors import KernelUnavailable
from sloth.kernels.context import BlockContext, Keep
from sloth.kernels.layer import FusedLayer, Workspace
from sloth.kernels.ops.add_rms_norm import add_rms_norm_fwd
from sloth.kernels.ops.attention import attention_bwd, attention_fwd
from sloth.kernels.ops.glu import glu_bwd, glu_fwd
from sloth.kernels.ops.rms_norm import rms_norm_bwd, rms_norm_fwd
from sloth.kernels.ops.rope import rope_bwd, rope_fwd
from sloth.kernels.rows import as_rows
from sloth.kernels.saved import Gradients, Saved

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


class LlamaBlockFunction(torch.autograd.Function):
    """One layer. Inputs after the context: A and B of every projection in stack order, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FusedLayer, context: BlockContext, *matrices: Tensor | None
    ) -> Tensor:
        layer.fill()
        keep, x_ND = context.keep, as_rows(x)
        saved = Saved(layer, x_ND)
        qkv = _project_qkv(layer, x_ND, x.shape, context, saved)
        o, stats = _attend(layer, qkv, x.shape, context)
        delta = _project_o(layer, o, saved)
        if keep.qkv:
            saved.qkv = qkv
        if keep.attention:
            saved.o, saved.stats = o, stats
        del qkv, o, stats
        if keep.tile_tokens is None:
            n2 = layer.gate_up.new_input(len(x_ND))
            norm = layer.norms[1]
            _, h, _ = add_rms_norm_fwd(
                delta, x_ND, norm.weight, norm.eps, norm.offset, out=n2[:, : layer.gate_up.K]
            )
            del delta
            y = _mlp(layer, h, n2, keep, saved, slice(0, len(h)))
        else:
            h = delta.add_(x_ND)
            y = torch.empty_like(h)
            for rows in _tiles(len(h), keep.tile_tokens):
                y[rows] = _mlp(layer, h[rows], _norm2(layer, h[rows])[0], keep, saved, rows)
        if keep.hidden:
            saved.h = h
        saved.store(ctx, matrices)
        ctx.layer, ctx.context, ctx.shape = layer, context, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer: FusedLayer = ctx.layer
        context: BlockContext = ctx.context
        saved, dy_ND, need_dx = Saved.restore(ctx, layer), as_rows(dy), ctx.needs_input_grad[0]
        grads = Gradients(layer, ctx.needs_input_grad[3:])
        layer.fill()
        # Is a gradient wanted before this point? Front to back: into q, k, v; of h; of g and u.
        into_attention = need_dx or grads.wants("qkv")
        into_h = into_attention or grads.wants("o")

        # What was not kept is made again, in the forward's order.
        x, qkv, o, h = saved.x, saved.qkv, saved.o, saved.h
        if qkv is None:
            qkv = _project_qkv(layer, x, ctx.shape, context, saved)
        if o is None:
            o, saved.stats = _attend(layer, qkv, ctx.shape, context)
        if h is None:
            h = _project_o(layer, o, saved).add_(x)

        # y = h + P_down(silu(g) * u);  g, u = P(n2);  n2 = norm(h)
        dh = layer.o.new_output_gradient(len(x))
        for rows in _tiles(len(x), context.keep.tile_tokens or len(x)):
            _mlp_backward(layer, dy_ND[rows], h[rows], dh[rows], saved, rows, grads, into_h)
        saved.gate = saved.up = h = None
        if not into_h:
            return None, None, None, *grads.in_order()

        # h = x + P_o(o)
        layer.o.spread(dh)
        o_ND = _merged(o)
        grads.add("o", dh, o_ND, saved)
        if not into_attention:
            return None, None, None, *grads.in_order()
        do = layer.o.input_gradient(dh, saved.masks_of("o"))

        # o = attention(q, k, v);  q, k = rope(..);  q, k, v = P(n1);  n1 = norm(x)
        dqkv = layer.qkv.new_output_gradient(len(x))
        _attend_backward(layer, do, qkv, o, dqkv, ctx.shape, context, saved)
        del do, qkv, o, o_ND
        layer.qkv.spread(dqkv)
        norm = layer.norms[0]
        n1, rstd1 = rms_norm_fwd(x, norm.weight, norm.eps, norm.offset)
        grads.add("qkv", dqkv, n1, saved)
        dx = None
        if need_dx:
            del n1
            dn1 = layer.qkv.input_gradient(dqkv, saved.masks_of("qkv"))
            del dqkv
            # x reaches h directly too
            dresidual = dh[:, : layer.o.N]
            dx, _ = rms_norm_bwd(
                dn1, x, norm.weight, rstd1, norm.offset, False, dresidual=dresidual
            )
            dx = dx.view(ctx.shape)
        return dx, None, None, *grads.in_order()


# -- the pieces, which the forward runs once and a backward that kept less runs again --------------


def _project_qkv(
    layer: FusedLayer, x_ND: Tensor, shape: torch.Size, context: BlockContext, saved: Saved
) -> Tensor:
    """q and k after RoPE, v: [N, (H + 2 K) E]."""
    n1, norm = layer.qkv.new_input(len(x_ND)), layer.norms[0]
    rms_norm_fwd(x_ND, norm.weight, norm.eps, norm.offset, out=n1[:, : layer.qkv.K])
    qkv, saved.lows["qkv"] = layer.qkv.forward(n1, saved.masks_of("qkv"))
    q_BTHE, k_BTKE, _ = _heads(layer, qkv, shape)
    cos, sin = _tables(context)
    rope_fwd(q_BTHE, k_BTKE, cos, sin, outs=(q_BTHE, k_BTKE))
    return qkv


def _attend(layer: FusedLayer, qkv: Tensor, shape: torch.Size, context: BlockContext) -> Any:
    """(o [B, H, T, E], what its backward needs)."""
    q, k, v = (x.transpose(1, 2) for x in _heads(layer, qkv, shape))
    return attention_fwd(q, k, v, layer.scale, context.layout)


def _attend_backward(
    layer: FusedLayer,
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    dqkv: Tensor,
    shape: torch.Size,
    context: BlockContext,
    saved: Saved,
) -> None:
    """Fill dqkv [N, (H + 2 K) E] from do [N, H E]."""
    q, k, v = (x.transpose(1, 2) for x in _heads(layer, qkv, shape))
    do_BHTE = do.view(*shape[:-1], -1, layer.head_dim).transpose(1, 2)
    grads = attention_bwd(do_BHTE, q, k, v, o, saved.stats, layer.scale, context.layout)
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    q_out, k_out, v_out = _heads(layer, dqkv, shape)
    cos, sin = _tables(context)
    rope_bwd(dq, dk, cos, sin, outs=(q_out, k_out))
    v_out.copy_(dv)


def _project_o(layer: FusedLayer, o_BHTE: Tensor, saved: Saved) -> Tensor:
    """P_o(o) [N, D]."""
    o_ND = _merged(o_BHTE)
    wide = layer.o.new_input(len(o_ND))
    wide[:, : layer.o.K] = o_ND
    delta, saved.lows["o"] = layer.o.forward(wide, saved.masks_of("o"))
    return delta


def _norm2(layer: FusedLayer, h: Tensor) -> tuple[Tensor, Tensor]:
    """n2 with room for its tail, and its rstd."""
    n2, norm = layer.gate_up.new_input(len(h)), layer.norms[1]
    _, rstd = rms_norm_fwd(h, norm.weight, norm.eps, norm.offset, out=n2[:, : layer.gate_up.K])
    return n2, rstd


def _mlp(layer: FusedLayer, h: Tensor, n2: Tensor, keep: Keep, saved: Saved, rows: slice) -> Tensor:
    """h + P_down(silu(g) * u) of some rows."""
    gate_up, low = layer.gate_up.forward(n2, saved.masks_of("gate_up", rows))
    saved.put_low("gate_up", low, rows)
    ffn = layer.down.K
    gate, up = gate_up[:, :ffn], gate_up[:, ffn:]
    product = layer.down.new_input(len(h))
    glu_fwd(gate, up, "silu", out=product[:, :ffn])
    y, low = layer.down.forward(product, saved.masks_of("down", rows), add=h)
    saved.put_low("down", low, rows)
    if keep.up:
        saved.gate, saved.up = gate, up
    elif keep.gate:
        saved.gate = gate.clone()  # a view would keep the other half
    return y


def _mlp_backward(
    layer: FusedLayer,
    dy: Tensor,
    h: Tensor,
    dh: Tensor,
    saved: Saved,
    rows: slice,
    grads: Gradients,
    into_h: bool,
) -> None:
    """Gradients of the MLP's LoRA and, in dh [n, D + R], of h, for some rows."""
    ffn, dim = layer.down.K, layer.down.N
    dy_wide = layer.down.new_output_gradient(len(dy))
    dy_wide[:, :dim] = dy
    layer.down.spread(dy_wide)
    d_gate_up = layer.gate_up.new_output_gradient(len(dy))
    dgate, dup = d_gate_up[:, :ffn], d_gate_up[:, ffn : 2 * ffn]
    gate, up = saved.gate, saved.up
    n2, rstd2 = _norm2(layer, h)
    if gate is None or up is None:
        # Into the places of their gradients, which take over element by element.
        masks = saved.masks_of("gate_up", rows)
        missing = None if gate is None else 1
        out = d_gate_up[:, : 2 * ffn] if missing is None else dup
        layer.gate_up.forward(n2, masks, out=out, member=missing)
        gate, up = dgate if gate is None else gate, dup
    if not (into_h or grads.wants("gate_up")):
        product = glu_fwd(gate, up, "silu")
        grads.add("down", dy_wide, product, saved, rows)
        return
    dproduct = layer.down.input_gradient(dy_wide, saved.masks_of("down", rows))
    glu_bwd(dproduct, gate, up, "silu", outs=(dgate, dup, dproduct))
    grads.add("down", dy_wide, dproduct, saved, rows)  # by now the product itself
    del dproduct, gate, up
    layer.gate_up.spread(d_gate_up)
    grads.add("gate_up", d_gate_up, n2, saved, rows)
    if into_h:
        del n2
        dn2 = layer.gate_up.input_gradient(d_gate_up, saved.masks_of("gate_up", rows))
        norm = layer.norms[1]
        out = dh[:, :dim]
        rms_norm_bwd(dn2, h, norm.weight, rstd2, norm.offset, False, dresidual=dy, out=out)


# -- views ----------------------------------------------------------------------------------------


def _heads(layer: FusedLayer, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, T, heads, E] of q, k and v in a stacked buffer [N, ..]."""
    parts = (qkv[:, slot.rows] for slot in layer.qkv.slots)
    q, k, v = (x.unflatten(0, shape[:-1]).unflatten(-1, (-1, layer.head_dim)) for x in parts)
    return q, k, v


def _merged(x_BHTE: Tensor) -> Tensor:
    """[B, H, T, E] -> [N, H E]."""
    return x_BHTE.transpose(1, 2).flatten(2).flatten(0, 1)


def _tables(context: BlockContext) -> tuple[Tensor, Tensor]:
    assert context.cos is not None and context.sin is not None, "every Llama layer has RoPE"
    return context.cos, context.sin


def _tiles(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def block(
    module: Any, hidden_BTD: Tensor, context: BlockContext, workspace: Workspace | None = None
) -> Tensor:
    """One Llama layer: hidden [B, T, D] -> [B, T, D]; differentiable in hidden and LoRA matrices.

    module: a block with Hugging Face's names (`sloth.models.llama.Block`). workspace: the network's
    scratch; without one the call makes its own. Raises KernelUnavailable where a parameter other
    than LoRA's wants a gradient, and for a context with a cache.
    """
    if context.cache is not None:
        raise KernelUnavailable("the fused block keeps no cache; decode with the plain block")
    layer = (workspace or Workspace()).layer(module, GROUPS, NORMS, hidden_BTD.dtype)
    return LlamaBlockFunction.apply(hidden_BTD, layer, context, *layer.matrices)
