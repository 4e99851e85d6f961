"""The fused twin of the Llama block: the chain rule of one layer, written out, base frozen.

    n1 = norm(x);  q, k, v = rope(P_q(n1)), rope(P_k(n1)), P_v(n1);  o = attention(q, k, v)
    h = x + P_o(o);  n2 = norm(h);  g, u = P_gate(n2), P_up(n2);  y = h + P_down(silu(g) * u)

Each P is a frozen matrix, dense or NF4, with or without bias and LoRA; those that read one input
are one product (`stacked.py`). The backward walks these two lines from their end to their start and
forms gradients of x and of the LoRA matrices alone; where nothing earlier wants one (layer 0 under
frozen embeddings) it stops. What happens inside the two halves is in `halves.py`.

A frozen W needs no saved input, and a LoRA A needs one that is a cheap function of what is kept. So
a layer keeps at most

    x, q and k after RoPE, v, o and its log-sum-exp, h, g, u; per stack its rank-wide X A^T, of each
    norm what it divides by, and one byte per input element of a LoRA with dropout

in 16 bits 2 (2 D + 2 H E + 2 K E + 2 F) bytes a token, about half of what autograd would keep, and
nothing of size T x T. It makes n1, n2 and silu(g) * u again, inside the kernels that sum with them
where it can, and whatever else `context.keep` does not name; only P_down is never computed twice,
since nothing needs its output. Norms, RoPE and the MLP work row by row, so `keep.tile_tokens`
bounds what the MLP holds at a time.

DoRA's magnitudes do want outputs: q, k and v are then kept as they were before RoPE, P_o(o) in
place of h, one sum away from it, and the output of P_down beside the rest.

The model file is the specification (`sloth/models/llama.py`); a test pins this file to it. Forward
and backward call the ops' host functions, so they run on either engine. Every pre-norm family runs
through it with a `Wiring` of its own.
Shapes: B batch, T tokens, N = B T rows, D model, H query heads, K kv heads, E head dim, F ffn, R
rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sloth.kernels import halves
from sloth.kernels.context import BlockContext
from sloth.kernels.function import Function
from sloth.kernels.layer import FusedLayer, Wiring, Workspace, prepare
from sloth.kernels.normed import Normed, normed_input
from sloth.kernels.ops.add_rms_norm import add_rms_norm_fwd
from sloth.kernels.ops.rms_norm import rms_norm_bwd
from sloth.kernels.rows import as_rows
from sloth.kernels.saved import Gradients, Saved

WIRING = Wiring(norms=("input_layernorm", "post_attention_layernorm"))


class LlamaBlockFunction(Function):
    """One layer. Inputs after the context: A, B and magnitudes of every projection in stack order,
    each or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FusedLayer, context: BlockContext, *matrices: Tensor | None
    ) -> Tensor:
        layer.fill()
        keep, x_ND = context.keep, as_rows(x)
        saved = Saved(layer, x_ND)
        norm1, norm2 = layer.norms

        # q, k, v = P(norm(x));  o = attention(q, k, v)
        n1, rstd1 = normed_input(layer.qkv, norm1, x_ND)
        saved.put_rstd(1, rstd1)
        qkv = halves.project_qkv(layer, n1, x.shape, context, saved)
        del n1
        o, stats = halves.attend(layer, qkv, x.shape, context)
        delta = halves.project_o(layer, o, saved)
        if keep.qkv:
            saved.qkv = qkv
        if keep.attention:
            saved.o, saved.stats = o, stats
        del qkv, o, stats

        # h = x + P_o(o);  y = h + MLP(norm(h))
        if keep.hidden and layer.o.is_dora:
            saved.a = delta
        if keep.tile_tokens is None:
            n2 = layer.gate_up.new_input(len(x_ND))
            out = n2[:, : layer.gate_up.K]
            _, h, rstd2 = add_rms_norm_fwd(
                delta, x_ND, norm2.weight, norm2.eps, norm2.offset, out=out
            )
            saved.put_rstd(2, rstd2)
            del delta
            add = None if layer.down.is_dora else h
            y = halves.mlp(layer, n2, keep, saved, slice(0, len(h)), add=add)
            del n2
        else:
            h = delta + x_ND if layer.o.is_dora else delta.add_(x_ND)
            del delta
            y = torch.empty_like(h)
            for rows in halves.tiles(len(h), keep.tile_tokens):
                n2, rstd2 = normed_input(layer.gate_up, norm2, h[rows])
                saved.put_rstd(2, rstd2, rows)
                add = None if layer.down.is_dora else h[rows]
                y[rows] = halves.mlp(layer, n2, keep, saved, rows, add=add)
        if layer.down.is_dora:
            saved.m, y = y, h + y
        if keep.hidden and not layer.o.is_dora:
            saved.h = h
        saved.store(ctx, matrices, keep.offload)
        ctx.layer, ctx.context, ctx.shape = layer, context, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer: FusedLayer = ctx.layer
        context: BlockContext = ctx.context
        saved, dy_ND, need_dx = Saved.restore(ctx, layer), as_rows(dy), ctx.needs_input_grad[0]
        grads = Gradients(layer, ctx.needs_input_grad[3:])
        layer.refill()
        norm1, norm2 = layer.norms
        # Is a gradient wanted before this point? Front to back: into q, k, v; of h.
        into_attention = need_dx or grads.wants("qkv")
        into_h = into_attention or grads.wants("o")

        # What was not kept is made again, in the forward's order.
        x, qkv, o, a, h = saved.x, saved.qkv, saved.o, saved.a, saved.h
        if qkv is None:
            n1, _ = normed_input(layer.qkv, norm1, x)
            qkv = halves.project_qkv(layer, n1, ctx.shape, context, saved)
            del n1
        if o is None:
            o, saved.stats = halves.attend(layer, qkv, ctx.shape, context)
        if h is None:
            a = halves.project_o(layer, o, saved) if a is None else a
            h = a + x if layer.o.is_dora else a.add_(x)
        if not layer.o.is_dora:
            a = None

        # y = h + MLP(n2);  n2 = norm(h), and h reaches y directly too
        dh = layer.o.new_output_gradient(len(x))
        arrived = layer.handover.arrived(dy, layer.down)
        for rows in halves.tiles(len(x), context.keep.tile_tokens):
            if arrived is None:
                dy_wide = layer.down.new_output_gradient(len(dy_ND[rows]))
                dy_wide[:, : layer.down.N] = dy_ND[rows]
            else:
                dy_wide = arrived[rows]
            layer.down.spread(dy_wide)
            rstd2 = saved.rstds[2][rows]
            n2 = Normed(layer.gate_up, norm2, h[rows], rstd2)
            dn2 = halves.mlp_backward(layer, dy_wide, n2, saved, rows, grads, into_h)
            del dy_wide, n2
            if dn2 is not None:
                out = dh[rows, : layer.o.N]
                rms_norm_bwd(
                    *(dn2, h[rows], norm2.weight, rstd2, norm2.offset, False),
                    dresidual=dy_ND[rows],
                    out=out,
                )
                del dn2
        saved.gate = saved.up = h = arrived = None
        if not into_h:
            return None, None, None, *grads.in_order()

        # h = x + P_o(o)
        layer.o.spread(dh)
        sums = layer.o.output_sums(dh, a, saved.lows["o"])
        del a
        grads.add("o", dh, halves.merged(o), saved, sums=sums)
        if not into_attention:
            return None, None, None, *grads.in_order()
        do = layer.o.input_gradient(dh, saved.masks_of("o"))

        # o = attention(q, k, v);  q, k, v = P(n1);  n1 = norm(x), and x reaches h directly too
        dqkv = halves.attend_backward(layer, do, qkv, o, ctx.shape, context, saved)
        sums = layer.qkv.output_sums(dqkv, qkv, saved.lows["qkv"])
        del do, qkv, o
        rstd1 = saved.rstds[1]
        grads.add("qkv", dqkv, Normed(layer.qkv, norm1, x, rstd1), saved, sums=sums)
        dx = None
        if need_dx:
            dn1 = layer.qkv.input_gradient(dqkv, saved.masks_of("qkv"))
            del dqkv
            wide = layer.down.new_output_gradient(len(x))
            rms_norm_bwd(
                *(dn1, x, norm1.weight, rstd1, norm1.offset, False),
                dresidual=dh[:, : layer.o.N],
                out=wide[:, : layer.down.N],
            )
            dx = layer.handover.hand_on(wide, layer.down.N, ctx.shape)
        return dx, None, None, *grads.in_order()


def block(
    module: Any,
    hidden_BTD: Tensor,
    context: BlockContext,
    workspace: Workspace | None = None,
    wiring: Wiring = WIRING,
) -> Tensor:
    """One pre-norm layer: hidden [B, T, D] -> [B, T, D]; differentiable in it and LoRA's matrices.

    module: a block with Hugging Face's names (`sloth.models.llama.Block`). workspace: the network's
    scratch; without one the call makes its own. Raises KernelUnavailable where a parameter other
    than LoRA's wants a gradient, and for a context with a cache.
    """
    layer = prepare(module, hidden_BTD, context, workspace, wiring)
    return LlamaBlockFunction.apply(hidden_BTD, layer, context, *layer.matrices)
