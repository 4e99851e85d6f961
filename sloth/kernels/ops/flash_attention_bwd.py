"""Backward of `flash_attention.py`: dQ by tiles of queries, dK and dV by tiles of keys.

    dV = P^T dO;   dC = P * (dO V^T - d),  d = rowsum(dO * O);   dS = dC * (1 - (C / c)^2)
    dQ = s dS K;   dK = s dS^T Q

One kernel owns a tile of queries, forms d and walks the keys that they see. Another owns a tile of
keys and walks the queries that see it, of all the heads that share the keys, so that dK and dV are
summed in one program; it works on S^T, whose rows are then where its products want them. P is
rebuilt from L in both, and nothing of size T x T exists. No atomics: two runs agree bitwise. As in
the forward, tiles that see nothing are not visited, and the mask is applied where it crosses.

Operations: 2.5 times the forward's; 3.5 times as both kernels rebuild P and dO V^T, 4 times where
dK and dV are summed apart.
"""

from __future__ import annotations

from torch import Tensor

from sloth.kernels.ops.flash_attention_dkv import key_gradients
from sloth.kernels.ops.flash_attention_dq import query_gradients


def flash_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v; out and lse as the forward gave them.

    first, last [B, T] int32: where each token's document begins and ends.
    """
    if not q.numel():
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    how = (scale, softcap, window)
    dq, delta = query_gradients(dout, q, k, v, out, lse, *how, first)
    return dq, *key_gradients(dout, q, k, v, lse, delta, *how, last)
