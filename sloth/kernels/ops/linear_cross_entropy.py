"""Output head and cross-entropy in one op, without ever holding the logits of all rows.

Shapes: N rows, D model, V vocabulary. hidden [N, D]; weight [V, D]; labels [N], -100 = not trained.

Forward:   z = h W^T;   z' = c tanh(z / c) with softcap c, else z
           loss = sum_n (logsumexp(z'_n) - z'_n[y_n]) / M
Backward:  dz' = (softmax(z') - onehot(y)) / M;   dz = dz' (1 - (z'/c)^2)
           dh = dz W;   dW = dz^T h

M is the number of trained rows, or what the caller divides by. The gradient needs nothing the
forward does not have at hand, so it is formed there, chunk by chunk, over the logits it replaces,
and only scaled by the incoming gradient later: 4 D V operations a row with a frozen head, logits
written and read once.

Untrained rows are left out before the first product. Saved: dh of the trained rows, and dW (fp32)
if asked for. The logits are in hidden's dtype, their softmax and the losses in fp32 (fp64 for
fp64). One row is one program: it reads the logits twice and writes them once, 6 bytes a logit in 16
bits.
Source: the chunked form is in Liger Kernel (Hsu et al. 2024, https://arxiv.org/abs/2410.10989) and
Cut Cross-Entropy (Wijmans et al. 2024, https://arxiv.org/abs/2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sloth.constants import IGNORE_INDEX
from sloth.kernels.engine import engine_for, jit, tl
from sloth.kernels.function import Function
from sloth.kernels.rows import compute_dtype, sum_over_rows

# Bytes of logits held at a time. The first is the least that is quick: a plan starts from it, a
# network without a plan takes it, and log-probabilities always do. The second is for direct calls
# of `linear_cross_entropy` that name no size. Forward and backward of 8192 rows at V = 128256,
# D = 4096 in bf16 took 29.7 ms with 128 MiB, 28.8 with 256, 27.4 with 512, 27.1 with 1 GiB (H100);
# 26.3 with 512 since the softmax is quicker.
CHUNK_BYTES, ROOMY_CHUNK_BYTES = 128 * 2**20, 512 * 2**20
# Rows of a chunk are a multiple of this where they are as many: whole tiles of the products.
_WHOLE_ROWS = 256
# Rows of the gradient scaled at a time.
_SCALED_ROWS = 2048
# Columns that a program reads at a time, and its warps, without and with a softcap. A row is walked
# twice: of wide programs fewer run at once, whose rows the second walk still finds in the cache.
# 2048 rows at V = 128256 take 512 us on an H100, 4096 columns by 8 warps 560; the exponentials of a
# softcap want more programs.
_PLAIN, _CAPPED = (16384, 32), (4096, 16)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_trained: int | Tensor | None = None,
    softcap: float | None = None,
    trained_rows: TrainedRows | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Eager: all logits at once, whatever chunk_bytes; softcap in their dtype, fp32 cross-entropy,
    as Hugging Face does."""
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(compute_dtype(logits.dtype))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / _divisor(labels, num_trained)


def _divisor(labels: Tensor, num_trained: int | Tensor | None) -> int | Tensor:
    """What the sum is divided by; at least 1, so that a batch without trained rows gives 0."""
    if num_trained is None:
        return (labels != IGNORE_INDEX).sum().clamp(min=1)
    return num_trained


def _cross_entropy_torch(
    logits: Tensor, labels: Tensor, softcap: float | None, need_gradient: bool
) -> Tensor:
    """Losses [n] of a chunk; its logits are overwritten by their gradient if one is needed."""
    wide = logits.to(compute_dtype(logits.dtype))
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    lse = torch.logsumexp(capped, dim=-1, keepdim=True)
    losses = (lse - capped.gather(1, labels[:, None]))[:, 0]
    if need_gradient:
        gradient = torch.softmax(capped, dim=-1)
        gradient.scatter_add_(1, labels[:, None], -torch.ones_like(lse))
        if softcap is not None:
            gradient *= 1 - (capped / softcap).square()
        logits.copy_(gradient)
    return losses


@jit
def _softcapped(z, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(z / SOFTCAP), through the logistic function: tanh(a) = 2 sigmoid(2 a) - 1."""
    if SOFTCAP is not None:  # no early return: Triton 3.6 would trace what follows it as well
        z = SOFTCAP * (2.0 * tl.sigmoid(2.0 * z / SOFTCAP) - 1.0)
    return z


@jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    row_stride,
    num_cols,
    SOFTCAP: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    cols = tl.arange(0, BLOCK_V)
    # Each lane keeps its own running maximum and sum, joined once: no reduction inside the loop.
    largest = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, num_cols, BLOCK_V):
        mask = start + cols < num_cols
        z = tl.load(row_ptr + start + cols, mask=mask, other=-float("inf")).to(tl.float32)
        z = tl.where(mask, _softcapped(z, SOFTCAP), -float("inf"))
        bigger = tl.maximum(largest, z)
        # A lane that has seen no column yet keeps 0 * exp(-inf - finite) away from nan.
        rescale = tl.where(largest == -float("inf"), 0.0, tl.exp(largest - bigger))
        total = total * rescale + tl.where(mask, tl.exp(z - bigger), 0.0)
        largest = bigger
    top = tl.max(largest, axis=0)
    total_of_row = tl.sum(total * tl.exp(largest - top), axis=0)
    # A label outside the vocabulary gives a nan loss, not a read of someone else's memory.
    known = (label >= 0) & (label < num_cols)
    own = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    own = _softcapped(own, SOFTCAP)
    tl.store(losses_ptr + row, (top - own) + tl.log(total_of_row))
    if NEED_GRADIENT:
        for start in range(0, num_cols, BLOCK_V):
            mask = start + cols < num_cols
            z = tl.load(row_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
            capped = _softcapped(z, SOFTCAP)
            # Not exp(z - lse): the rounding of lse itself would scale the whole row.
            probability = tl.exp(capped - top) / total_of_row
            gradient = probability - tl.where(start + cols == label, 1.0, 0.0)
            if SOFTCAP is not None:
                gradient *= 1.0 - (capped / SOFTCAP) * (capped / SOFTCAP)
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + start + cols, gradient, mask=mask)


_SIGNATURE = {
    "logits_ptr": "*bf16",
    "labels_ptr": "*i64",
    "losses_ptr": "*fp32",
    "row_stride": "i32:16",
    "num_cols": "i32:16",
}
COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
    "_cross_entropy_kernel": [
        {
            "signature": _SIGNATURE,
            "constexprs": {"SOFTCAP": softcap, "NEED_GRADIENT": True, "BLOCK_V": block},
            "options": {"num_warps": warps},
        }
        for softcap, (block, warps) in ((None, _PLAIN), (30.0, _CAPPED))
    ]
}


def _cross_entropy_triton(
    logits: Tensor, labels: Tensor, softcap: float | None, need_gradient: bool
) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block, num_warps = _PLAIN if softcap is None else _CAPPED
    _cross_entropy_kernel[(len(logits),)](
        logits,
        labels,
        losses,
        logits.stride(0),
        logits.shape[1],
        SOFTCAP=softcap,
        NEED_GRADIENT=need_gradient,
        BLOCK_V=block,
        num_warps=num_warps,
    )
    return losses


def cross_entropy_in_place(
    logits: Tensor, labels: Tensor, softcap: float | None, need_gradient: bool
) -> Tensor:
    """logits [n, V], labels [n] (all trained) -> losses [n]; logits become d loss / d logits."""
    engine = _cross_entropy_triton if engine_for(logits) == "triton" else _cross_entropy_torch
    return engine(logits, labels, softcap, need_gradient)


class TrainedRows:
    """Which rows have a label, found without waiting for the device.

    Make it before the network runs: the count is copied to the host while the layers are computed,
    and `index` waits for that copy alone.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._order = self._count = self._copied = None
        if labels.is_cuda:
            ignored = labels == IGNORE_INDEX
            # Trained rows first, in their order: as nonzero, but of a size the host knows.
            self._order = torch.sort(ignored, stable=True).indices
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_((~ignored).sum(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def index(self) -> Tensor:
        """Row numbers [M], ascending."""
        if self._order is None or self._count is None or self._copied is None:
            return (self._labels != IGNORE_INDEX).nonzero()[:, 0]
        self._copied.synchronize()
        return self._order[: int(self._count)]


def row_chunks(hidden: Tensor, weight: Tensor, chunk_bytes: int | None = None) -> list[slice]:
    """Rows of hidden [M, D] whose logits exist at one time, 128 MiB of them unless said."""
    size = max(1, (chunk_bytes or CHUNK_BYTES) // (len(weight) * hidden.element_size()))
    size -= size % _WHOLE_ROWS if size > _WHOLE_ROWS else 0
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def scaled_rows(x: Tensor, factors: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Zeros of `shape` [N, D] with x [M, D] times factors [M] in its `rows` [M].

    A factor is about 1 / M: applied in fp32, since fp16 would lose small ones, and rounded once; by
    parts, so that what is scaled but not yet in its place stays small.
    """
    result = x.new_zeros(shape)
    for start in range(0, len(rows), _SCALED_ROWS):
        part = slice(start, start + _SCALED_ROWS)
        scaled = torch.empty_like(x[part])
        result[rows[part]] = torch.mul(x[part], factors[part, None], out=scaled)
    return result


class LinearCrossEntropyFunction(Function):
    """Forms the gradient in forward; backward scales it, not in place, so it may run twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_trained: int | Tensor | None,
        softcap: float | None,
        trained_rows: TrainedRows | None,
        chunk_bytes: int,
    ) -> Tensor:
        wide = compute_dtype(hidden.dtype)
        needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
        rows = (trained_rows or TrainedRows(labels)).index()
        trained, targets = hidden[rows], labels[rows]
        weight_here = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dtrained = torch.empty_like(trained) if needs_dhidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if needs_dweight else None
        for part in row_chunks(trained, weight, chunk_bytes):
            logits = trained[part] @ weight_here.T
            losses = cross_entropy_in_place(
                logits, targets[part], softcap, needs_dhidden or needs_dweight
            )
            total += losses.sum()
            if dtrained is not None:
                torch.mm(logits, weight_here, out=dtrained[part])
            if dweight is not None:
                dweight += sum_over_rows(logits, trained[part], wide)
            del logits  # before the next chunk's are made
        divisor = _divisor(labels, num_trained)
        # A number stays one: sent to the device, it would make the host wait for the layers.
        ctx.number = None if isinstance(divisor, Tensor) else divisor
        ctx.save_for_backward(dtrained, dweight, rows, divisor if ctx.number is None else None)
        ctx.shape, ctx.weight_dtype = hidden.shape, weight.dtype
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        dtrained, dweight, rows, divisor = ctx.saved_tensors
        factor = dloss / (divisor if ctx.number is None else ctx.number)
        dhidden = None
        if dtrained is not None:
            dhidden = scaled_rows(dtrained, factor.expand(len(rows)), rows, ctx.shape)
        if dweight is not None:
            dweight = (dweight * factor).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_trained: int | Tensor | None = None,
    softcap: float | None = None,
    trained_rows: TrainedRows | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Summed cross-entropy of softcap(hidden weight^T) over trained rows, over their number.

    hidden [N, D], weight [V, D] of one dtype, labels [N] int64 with -100 for untrained rows ->
    fp32 scalar (fp64 for fp64). num_trained: divisor in place of the count. softcap: c in
    c tanh(z / c). trained_rows: those of `labels`, if they were made earlier. chunk_bytes: of
    logits held at a time, 512 MiB unless said, which a network always does. Differentiable in
    hidden and weight.
    """
    if chunk_bytes is None:
        chunk_bytes = ROOMY_CHUNK_BYTES
    return LinearCrossEntropyFunction.apply(
        hidden, weight, labels, num_trained, softcap, trained_rows, chunk_bytes
    )
