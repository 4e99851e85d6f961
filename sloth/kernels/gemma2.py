"""The fused twin of the Gemma 2 block: each half between two norms, base frozen.

    n1 = norm1(x);  q, k, v = rope(P_q(n1)), rope(P_k(n1)), P_v(n1);  o = attention(q, k, v)
    a = P_o(o);     h = x + norm2(a)
    n3 = norm3(h);  m = P_down(gelu(P_gate(n3)) * P_up(n3));  y = h + norm4(m)

Beside what the pre-norm twin (`llama.py`) keeps, the norms behind the halves need their inputs: m
is always kept, since P_down is never computed twice, and a stands for h, which is one norm and one
sum away from it. The rest, and the pieces of the halves, is as there; Gemma 3 runs through it too.

The model file is the specification (`sloth/models/gemma2.py`); a test pins this file to it.
Shapes: as in `llama.py`.
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
from sloth.kernels.ops.post_norm import post_norm_fwd
from sloth.kernels.ops.rms_norm import rms_norm_bwd
from sloth.kernels.rows import as_rows
from sloth.kernels.saved import Gradients, Saved

WIRING = Wiring(
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    activation="gelu_tanh",
    post_norms=True,
    softcap=True,
)


class Gemma2BlockFunction(Function):
    """One layer. Inputs after the context: A, B and magnitudes of every projection in stack order,
    each or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FusedLayer, context: BlockContext, *matrices: Tensor | None
    ) -> Tensor:
        layer.fill()
        keep, x_ND = context.keep, as_rows(x)
        saved = Saved(layer, x_ND)
        norm1, norm2, norm3, norm4 = layer.norms

        # q, k, v = P(norm1(x));  o = attention(q, k, v);  a = P_o(o)
        n1, rstd1 = normed_input(layer.qkv, norm1, x_ND)
        saved.put_rstd(1, rstd1)
        qkv = halves.project_qkv(layer, n1, x.shape, context, saved)
        del n1
        o, stats = halves.attend(layer, qkv, x.shape, context)
        a = halves.project_o(layer, o, saved)
        if keep.qkv:
            saved.qkv = qkv
        if keep.attention:
            saved.o, saved.stats = o, stats
        if keep.hidden:
            saved.a = a
        del qkv, o, stats

        # h = x + norm2(a);  m = MLP(norm3(h));  y = h + norm4(m)
        if keep.tile_tokens is None:
            n3 = layer.gate_up.new_input(len(x_ND))
            out = n3[:, : layer.gate_up.K]
            h, rstd2, rstd3 = post_norm_fwd(a, x_ND, norm2, norm3, out)
            assert rstd3 is not None
            saved.put_rstd(3, rstd3)
            del a, out
            m = halves.mlp(layer, n3, keep, saved, slice(0, len(h)))
            del n3
        else:
            h, rstd2, _ = post_norm_fwd(a, x_ND, norm2)
            del a
            m = torch.empty_like(h)
            for rows in halves.tiles(len(h), keep.tile_tokens):
                n3, rstd3 = normed_input(layer.gate_up, norm3, h[rows])
                saved.put_rstd(3, rstd3, rows)
                m[rows] = halves.mlp(layer, n3, keep, saved, rows)
                del n3
        saved.m = m
        y, rstd4, _ = post_norm_fwd(m, h, norm4)
        saved.put_rstd(2, rstd2)
        saved.put_rstd(4, rstd4)
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
        norm1, norm2, norm3, norm4 = layer.norms
        # Is a gradient wanted before this point? Front to back: into q, k, v; of h.
        into_attention = need_dx or grads.wants("qkv")
        into_h = into_attention or grads.wants("o")

        # What was not kept is made again, in the forward's order.
        x, qkv, o, a, m = saved.x, saved.qkv, saved.o, saved.a, saved.m
        if qkv is None:
            n1, _ = normed_input(layer.qkv, norm1, x)
            qkv = halves.project_qkv(layer, n1, ctx.shape, context, saved)
            del n1
        if o is None:
            o, saved.stats = halves.attend(layer, qkv, ctx.shape, context)
        if a is None:
            a = halves.project_o(layer, o, saved)
        h, _, _ = post_norm_fwd(a, x, norm2)

        # y = h + norm4(m);  m = MLP(norm3(h)), and h reaches y directly too
        dh = torch.empty_like(h)
        for rows in halves.tiles(len(x), context.keep.tile_tokens):
            dm = layer.down.new_output_gradient(len(h[rows]))
            rms_norm_bwd(
                *(dy_ND[rows], m[rows], norm4.weight, saved.rstds[4][rows], norm4.offset, False),
                out=dm[:, : layer.down.N],
            )
            layer.down.spread(dm)
            rstd3 = saved.rstds[3][rows]
            n3 = Normed(layer.gate_up, norm3, h[rows], rstd3)
            dn3 = halves.mlp_backward(layer, dm, n3, saved, rows, grads, into_h)
            del dm, n3
            if dn3 is not None:
                rms_norm_bwd(
                    *(dn3, h[rows], norm3.weight, rstd3, norm3.offset, False),
                    dresidual=dy_ND[rows],
                    out=dh[rows],
                )
                del dn3
        saved.gate = saved.up = None
        del h
        if not into_h:
            return None, None, None, *grads.in_order()

        # h = x + norm2(a);  a = P_o(o)
        da = layer.o.new_output_gradient(len(x))
        rms_norm_bwd(
            *(dh, a, norm2.weight, saved.rstds[2], norm2.offset, False), out=da[:, : layer.o.N]
        )
        layer.o.spread(da)
        sums = layer.o.output_sums(da, a, saved.lows["o"])
        grads.add("o", da, halves.merged(o), saved, sums=sums)
        if not into_attention:
            return None, None, None, *grads.in_order()
        do = layer.o.input_gradient(da, saved.masks_of("o"))
        del a, da

        # o = attention(q, k, v);  q, k, v = P(n1);  n1 = norm1(x), and x reaches h directly too
        dqkv = halves.attend_backward(layer, do, qkv, o, ctx.shape, context, saved)
        sums = layer.qkv.output_sums(dqkv, qkv, saved.lows["qkv"])
        del do, qkv, o
        rstd1 = saved.rstds[1]
        grads.add("qkv", dqkv, Normed(layer.qkv, norm1, x, rstd1), saved, sums=sums)
        dx = None
        if need_dx:
            dn1 = layer.qkv.input_gradient(dqkv, saved.masks_of("qkv"))
            dx, _ = rms_norm_bwd(dn1, x, norm1.weight, rstd1, norm1.offset, False, dresidual=dh)
            dx = dx.view(ctx.shape)
        return dx, None, None, *grads.in_order()


def block(
    module: Any,
    hidden_BTD: Tensor,
    context: BlockContext,
    workspace: Workspace | None = None,
    wiring: Wiring = WIRING,
) -> Tensor:
    """One layer: hidden [B, T, D] -> [B, T, D]; differentiable in hidden and LoRA's matrices.

    Arguments and errors as `sloth.kernels.llama.block`.
    """
    layer = prepare(module, hidden_BTD, context, workspace, wiring)
    return Gemma2BlockFunction.apply(hidden_BTD, layer, context, *layer.matrices)
