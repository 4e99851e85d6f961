"""Output head and the log-probability of one token a row, without ever holding all logits.

Shapes: N rows, D model, V vocabulary. hidden [N, D]; weight [V, D]; labels [N], -100 = not wanted.

Forward:   z = h W^T;   z' = c tanh(z / c) with softcap c, else z
           p_n = z'_n[y_n] - logsumexp(z'_n), 0 where y_n is not wanted
Backward:  dz'_n = dp_n (onehot(y_n) - softmax(z'_n));   dz = dz' (1 - (z'/c)^2)
           dh = dz W;   dW = dz^T h

`linear_cross_entropy` sums these rows; here each has an incoming gradient of its own, so any
objective over log-probabilities stands on it. dp_n multiplies the whole row n and comes out of the
products: dh_n = dp_n (dz_n / dp_n) W. With a frozen head everything but that factor is formed in
forward, chunk by chunk over the logits it replaces, as there: 4 D V operations a row. dW sums over
rows and cannot wait for its factors; a trained head makes its logits again in backward, 4 D V more.

Unwanted rows are left out before the first product. Saved: dh of the wanted rows, one of h for a
trained head. The logits are in hidden's dtype, their softmax and the results in fp32 (fp64 for
fp64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sloth.constants import IGNORE_INDEX
from sloth.kernels.function import Function
from sloth.kernels.ops.linear_cross_entropy import (
    TrainedRows,
    cross_entropy_in_place,
    row_chunks,
    scaled_rows,
)
from sloth.kernels.rows import compute_dtype, sum_over_rows


def linear_log_probs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    wanted_rows: TrainedRows | None = None,
) -> Tensor:
    """Eager: all logits, softcap in their dtype, fp32 log-softmax."""
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(compute_dtype(logits.dtype))
    return -F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


class LinearLogProbsFunction(Function):
    """Forms dh for dp = 1 in forward; backward scales rows, not in place, so it may run twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        softcap: float | None,
        wanted_rows: TrainedRows | None,
    ) -> Tensor:
        needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
        rows = (wanted_rows or TrainedRows(labels)).index()
        wanted, targets = hidden[rows], labels[rows]
        weight_here = weight.to(hidden.dtype)
        wide = compute_dtype(hidden.dtype)
        log_probs = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        found = torch.empty(len(rows), dtype=wide, device=hidden.device)
        dwanted = torch.empty_like(wanted) if needs_dhidden else None
        for part in row_chunks(wanted, weight):
            logits = wanted[part] @ weight_here.T
            found[part] = -cross_entropy_in_place(logits, targets[part], softcap, needs_dhidden)
            if dwanted is not None:
                torch.mm(logits, weight_here, out=dwanted[part])
            del logits  # before the next chunk's are made
        log_probs[rows] = found
        kept = (wanted, targets, weight) if needs_dweight else (None, None, None)
        ctx.save_for_backward(rows, dwanted, *kept)
        ctx.shape, ctx.softcap = hidden.shape, softcap
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlog_probs: Tensor) -> tuple[Any, ...]:
        rows, dwanted, wanted, targets, weight = ctx.saved_tensors
        factors = -dlog_probs[rows]  # what was formed is of the loss -p
        dhidden = dweight = None
        if dwanted is not None:
            dhidden = scaled_rows(dwanted, factors, rows, ctx.shape)
        if wanted is not None:
            dweight = _weight_gradient(wanted, targets, weight, factors, ctx.softcap)
        return dhidden, dweight, None, None, None


def _weight_gradient(
    wanted: Tensor, targets: Tensor, weight: Tensor, factors: Tensor, softcap: float | None
) -> Tensor:
    """dW [V, D] of rows whose losses have these incoming gradients, summed in fp32."""
    weight_here = weight.to(wanted.dtype)
    total = torch.zeros_like(weight, dtype=factors.dtype)
    if not len(wanted):
        return total.to(weight.dtype)
    # Rows times factors of size 1: what a small loss scale leaves of them, fp16 would lose.
    size = factors.abs().amax().clamp(min=torch.finfo(factors.dtype).tiny)
    factors = (factors / size)[:, None]
    for part in row_chunks(wanted, weight):
        logits = wanted[part] @ weight_here.T
        cross_entropy_in_place(logits, targets[part], softcap, need_gradient=True)
        scaled = (wanted[part].to(factors.dtype) * factors[part]).to(wanted.dtype)
        total += sum_over_rows(logits, scaled, total.dtype)
        del logits
    return (total * size).to(weight.dtype)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    wanted_rows: TrainedRows | None = None,
) -> Tensor:
    """log softmax(softcap(hidden weight^T)) at each row's label.

    hidden [N, D], weight [V, D] of one dtype, labels [N] int64 -> fp32 [N] (fp64 for fp64), 0 where
    the label is -100. softcap: c in c tanh(z / c). wanted_rows: those of `labels`, if they were
    made earlier. Differentiable in hidden and weight.
    """
    return LinearLogProbsFunction.apply(hidden, weight, labels, softcap, wanted_rows)
