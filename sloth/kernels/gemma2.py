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
from sloth.kernels.layer import FusedLayer, Wiring, Workspace, prepare
from sloth.kernels.ops.rms_norm import rms_norm_bwd, rms_norm_fwd
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
    softcap=True,
)


class Gemma2BlockFunction(torch.autograd.Function):
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
        n1, _ = halves.normed_input(layer.qkv, norm1, x_ND)
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
        h = _plus_normed(x_ND, norm2, a)
        del a
        m = torch.empty_like(h)
        for rows in halves.tiles(len(h), keep.tile_tokens):
            n3, _ = halves.normed_input(layer.gate_up, norm3, h[rows])
            m[rows] = halves.mlp(layer, n3, keep, saved, rows)
            del n3
        saved.m = m
        y = _plus_normed(h, norm4, m)
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
            n1, _ = halves.normed_input(layer.qkv, norm1, x)
            qkv = halves.project_qkv(layer, n1, ctx.shape, context, saved)
            del n1
        if o is None:
            o, saved.stats = halves.attend(layer, qkv, ctx.shape, context)
        if a is None:
            a = halves.project_o(layer, o, saved)
        h = _plus_normed(x, norm2, a)

        # y = h + norm4(m);  m = MLP(norm3(h)), and h reaches y directly too
        dh = torch.empty_like(h)
        for rows in halves.tiles(len(x), context.keep.tile_tokens):
            dm = layer.down.new_output_gradient(len(h[rows]))
            _norm_backward(norm4, dy_ND[rows], m[rows], out=dm[:, : layer.down.N])
            layer.down.spread(dm)
            n3, rstd3 = halves.normed_input(layer.gate_up, norm3, h[rows])
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
        _norm_backward(norm2, dh, a, out=da[:, : layer.o.N])
        layer.o.spread(da)
        grads.add("o", da, halves.merged(o), saved, outputs=layer.o.output_parts(a))
        if not into_attention:
            return None, None, None, *grads.in_order()
        do = layer.o.input_gradient(da, saved.masks_of("o"))
        del a, da

        # o = attention(q, k, v);  q, k, v = P(n1);  n1 = norm1(x), and x reaches h directly too
        dqkv = halves.attend_backward(layer, do, qkv, o, ctx.shape, context, saved)
        outputs = layer.qkv.output_parts(qkv)
        del do, qkv, o
        n1, rstd1 = rms_norm_fwd(x, norm1.weight, norm1.eps, norm1.offset)
        grads.add("qkv", dqkv, n1, saved, outputs=outputs)
        del outputs
        dx = None
        if need_dx:
            del n1
            dn1 = layer.qkv.input_gradient(dqkv, saved.masks_of("qkv"))
            dx, _ = rms_norm_bwd(dn1, x, norm1.weight, rstd1, norm1.offset, False, dresidual=dh)
            dx = dx.view(ctx.shape)
        return dx, None, None, *grads.in_order()


def _plus_normed(x: Tensor, norm: Any, branch: Tensor) -> Tensor:
    """x + norm(branch) [n, D]."""
    normed, _ = rms_norm_fwd(branch, norm.weight, norm.eps, norm.offset)
    return normed.add_(x)


def _norm_backward(norm: Any, dy: Tensor, x: Tensor, out: Tensor) -> None:
    """Gradient of x, of norm(x) [n, D], into `out`."""
    _, rstd = rms_norm_fwd(x, norm.weight, norm.eps, norm.offset)
    rms_norm_bwd(dy, x, norm.weight, rstd, norm.offset, False, out=out)


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
