"""The two halves of a fused layer, attention and MLP, forward and backward, without their norms.

A family's twin (`llama.py`, `gemma2.py`, ...) says in which order norms, halves and residual sums
come; what happens between a norm and the next sum is the same for all and stands here once. Each
function reads its input from a buffer with room for the LoRA tail (`stacked.py`) and leaves what
the backward needs in `saved`. A backward that kept less calls the forward's pieces again.

Families differ by what `layer.wiring` says: the activation, norms on q and k, a softcap; and by
what the context holds: no rotary tables, a factor on the queries, a window.
Shapes: B batch, T tokens, N = B T rows, n of them at a time, D model, H query heads, K kv heads, E
head dim, F ffn, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sloth.kernels.context import BlockContext, Keep
from sloth.kernels.layer import FusedLayer
from sloth.kernels.normed import Normed
from sloth.kernels.ops.attention import attention_bwd, attention_fwd
from sloth.kernels.ops.glu import glu_bwd, glu_fwd
from sloth.kernels.ops.glu_lora import Ranks, glu_dots, glu_lora_bwd
from sloth.kernels.ops.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from sloth.kernels.ops.rope import rope_bwd, rope_fwd
from sloth.kernels.saved import Gradients, Saved
from sloth.kernels.stacked import Masks, Sums


def tiles(num_rows: int, size: int | None) -> Iterator[slice]:
    """The rows in parts of at most `size`."""
    size = size or max(num_rows, 1)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


# -- attention ------------------------------------------------------------------------------------


def project_qkv(
    layer: FusedLayer, n1: Tensor, shape: torch.Size, context: BlockContext, saved: Saved
) -> Tensor:
    """n1 [N, D + R] -> q, k, v [N, (H + 2 K) E]: rotated, or raw where a backward wants them so."""
    qkv, saved.lows["qkv"] = layer.qkv.forward(n1, saved.masks_of("qkv"))
    if not layer.keeps_raw_qkv:
        q_BTHE, k_BTKE, _ = _split(layer, qkv, shape)
        if context.cos is not None and context.sin is not None:
            rope_fwd(q_BTHE, k_BTKE, context.cos, context.sin, outs=(q_BTHE, k_BTKE))
        _scale_queries(q_BTHE, context)
    return qkv


def attend(layer: FusedLayer, qkv: Tensor, shape: torch.Size, context: BlockContext) -> Any:
    """(o [B, H, T, E], what its backward needs)."""
    q, k, v = _heads(layer, qkv, shape, context)
    return attention_fwd(q, k, v, layer.scale, context.layout, layer.softcap)


def attend_backward(
    layer: FusedLayer,
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    shape: torch.Size,
    context: BlockContext,
    saved: Saved,
) -> Tensor:
    """do [N, H E] -> gradient of the projections [N, (H + 2 K) E + R], spread."""
    q, k, v = _heads(layer, qkv, shape, context)
    do_BHTE = do.view(*shape[:-1], -1, layer.head_dim).transpose(1, 2)
    grads = attention_bwd(
        do_BHTE, q, k, v, o, saved.stats, layer.scale, context.layout, layer.softcap
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    del q, k, v, grads
    dqkv = layer.qkv.new_output_gradient(len(do))
    q_out, k_out, v_out = _split(layer, dqkv, shape)
    v_out.copy_(dv)
    if context.query_scale is not None:
        dq = dq * context.query_scale
    if layer.qk_norms is not None:
        q_raw, k_raw, _ = _split(layer, qkv, shape)
        qk_norm_rope_bwd(dq, dk, q_raw, k_raw, layer.qk_norms, *_tables(context), (q_out, k_out))
    elif context.cos is not None and context.sin is not None:
        rope_bwd(dq, dk, context.cos, context.sin, outs=(q_out, k_out))
    else:
        q_out.copy_(dq), k_out.copy_(dk)
    return layer.qkv.spread(dqkv)


def project_o(layer: FusedLayer, o_BHTE: Tensor, saved: Saved) -> Tensor:
    """P_o(o) [N, D]."""
    masks = saved.masks_of("o")
    x, low = layer.o.taken_in(merged(o_BHTE), masks)
    delta, saved.lows["o"] = layer.o.forward(x, masks, low=low)
    return delta


def merged(x_BHTE: Tensor) -> Tensor:
    """[B, H, T, E] -> [N, H E]."""
    return x_BHTE.transpose(1, 2).flatten(2).flatten(0, 1)


def _split(layer: FusedLayer, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, T, heads, E] of q, k and v in a stacked buffer [N, ..]."""
    heads = qkv[:, : layer.qkv.N].view(*shape[:-1], -1, layer.head_dim)
    q, k, v = heads.split([n // layer.head_dim for n in layer.qkv.shape.outputs], dim=2)
    return q, k, v


def _heads(
    layer: FusedLayer, qkv: Tensor, shape: torch.Size, context: BlockContext
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, T, E] as attention reads them."""
    q, k, v = _split(layer, qkv, shape)
    if layer.qk_norms is not None:
        q, k = qk_norm_rope_fwd(q, k, layer.qk_norms, *_tables(context))
        _scale_queries(q, context)
    elif layer.keeps_raw_qkv:
        if context.cos is not None and context.sin is not None:
            q, k = rope_fwd(q, k, context.cos, context.sin)
        q = q if context.query_scale is None else q * context.query_scale
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _tables(context: BlockContext) -> tuple[Tensor, Tensor]:
    assert context.cos is not None and context.sin is not None, "norms on q and k come with RoPE"
    return context.cos, context.sin


def _scale_queries(q_BTHE: Tensor, context: BlockContext) -> None:
    if context.query_scale is not None:
        q_BTHE.mul_(context.query_scale)


# -- MLP ------------------------------------------------------------------------------------------


def mlp(
    layer: FusedLayer,
    n2: Tensor,
    keep: Keep,
    saved: Saved,
    rows: slice,
    add: Tensor | None = None,
) -> Tensor:
    """P_down(act(g) * u) + add of some rows; n2 [n, D + R]."""
    gate_up, low = layer.gate_up.forward(n2, saved.masks_of("gate_up", rows))
    saved.put_low("gate_up", low, rows)
    ffn = layer.down.K
    gate, up = gate_up[:, :ffn], gate_up[:, ffn:]
    product = layer.down.new_input(len(n2))
    glu_fwd(gate, up, layer.wiring.activation, out=product[:, :ffn])
    y, low = layer.down.forward(product, saved.masks_of("down", rows), add=add)
    saved.put_low("down", low, rows)
    del product
    if keep.up:
        saved.gate, saved.up = gate, up
    elif keep.gate:
        saved.gate = gate.clone()  # a view would keep the other half
    return y


def mlp_backward(
    layer: FusedLayer,
    dy: Tensor,
    n2: Normed,
    saved: Saved,
    rows: slice,
    grads: Gradients,
    need_dn2: bool,
) -> Tensor | None:
    """Gradients of the MLP's LoRA and of n2, for some rows; dy [n, D + R] spread.

    saved.m: the MLP's output, where DoRA on down_proj wants it.
    """
    ffn, activation = layer.down.K, layer.wiring.activation
    d_gate_up = layer.gate_up.new_output_gradient(len(dy))
    dgate, dup = d_gate_up[:, :ffn], d_gate_up[:, ffn : 2 * ffn]
    masks, down_masks = saved.masks_of("gate_up", rows), saved.masks_of("down", rows)
    gate, up = _gate_and_up(layer, d_gate_up, n2, saved, masks)
    y = saved.m[rows] if layer.down.is_dora else None
    down = layer.down.output_sums(dy, y, saved.lows["down"][rows])
    if not (need_dn2 or grads.wants("gate_up")):
        product = glu_fwd(gate, up, activation)
        grads.add("down", dy, product, saved, rows, down)
        return None
    dproduct = layer.down.input_gradient(dy, down_masks)
    is_dora, bias = layer.gate_up.is_dora, layer.gate_up.bias
    if masks or down_masks:
        glu_bwd(dproduct, gate, up, activation, outs=(dgate, dup, dproduct))
        grads.add("down", dy, dproduct, saved, rows, down)  # by now the product itself
        sums = Sums(dots=glu_dots((dgate, dup), (gate, up), bias) if is_dora else None)
    else:
        v, low = dy[:, layer.down.N :], saved.lows["gate_up"][rows]
        ranks = Ranks(*layer.down.shape.ranks, *layer.gate_up.shape.ranks)
        dA, *dBs, dots = glu_lora_bwd(
            *(dproduct, gate, up, activation, v, low, ranks, (dgate, dup), is_dora, bias)
        )
        grads.add("down", dy, None, saved, rows, down._replace(dA=dA))
        sums = Sums(dB=dBs, dots=dots)
    del dproduct, gate, up
    layer.gate_up.spread(d_gate_up)
    grads.add("gate_up", d_gate_up, n2, saved, rows, sums)
    return layer.gate_up.input_gradient(d_gate_up, masks) if need_dn2 else None


def _gate_and_up(
    layer: FusedLayer, d_gate_up: Tensor, n2: Normed, saved: Saved, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Both products of the MLP [n, F], made again where they were not kept: into the places of
    their gradients, which take over element by element. With dropout DoRA reads both afterwards."""
    if saved.up is not None:
        return saved.gate, saved.up
    ffn = layer.down.K
    room = d_gate_up[:, : 2 * ffn]
    if layer.gate_up.is_dora and (saved.masks.get("gate_up") or saved.masks.get("down")):
        room = d_gate_up.new_empty(len(d_gate_up), 2 * ffn)
    if saved.gate is not None:
        layer.gate_up.forward(n2.wide, masks, out=room[:, ffn:], member=1)
        return saved.gate, room[:, ffn:]
    layer.gate_up.forward(n2.wide, masks, out=room)
    return room[:, :ffn], room[:, ffn:]
