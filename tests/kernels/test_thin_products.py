"""LoRA's thin products inside the kernels that read their operand anyway: what apart gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops.glu import Activation, glu_reference
from sloth.kernels.ops.glu_lora import MAX_RANK, GLUSums, Ranks, glu_lora_bwd
from sloth.kernels.ops.post_norm import post_norm_fwd
from sloth.kernels.ops.rms_norm import rms_norm_fwd, rms_norm_reference
from sloth.kernels.ops.thin_products import copy_low, norm_sum, sums_norms
from sloth.kernels.rows import sum_over_rows
from tests import tolerance
from tests.kernels.common import assert_no_worse_than_eager, nan_poisoned_empty, randn

HALF = (torch.bfloat16, torch.float16)
RANKS = (Ranks(16, 16, 16), Ranks(8, 4, 0), Ranks(0, 20, 33), Ranks(64, 64, 64))


def wide(rows: int, cols: int, room: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """[rows, cols] with a row stride of cols + room, NaN in the room."""
    buffer = torch.full((rows, cols + room), float("nan"), dtype=dtype, device=device)
    buffer[:, :cols] = randn(rows, cols, seed=seed, dtype=dtype, device=device)
    return buffer[:, :cols]


def padded_ranks(rows: int, ranks: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """[rows, R], zeros from the adapters' ranks on."""
    low = torch.zeros(rows, max(-(-ranks // 64) * 64, 64), dtype=dtype, device=device)
    low[:, :ranks] = randn(rows, ranks, seed=seed, dtype=dtype, device=device)
    return low


def glu_inputs(
    rows: int, ffn: int, ranks: Ranks, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    gate, up, dy = (wide(rows, ffn, 8 * i, i, dtype, device) for i in (1, 2, 3))
    v = padded_ranks(rows, ranks.down, 4, dtype, device)
    low = padded_ranks(rows, ranks.gate + ranks.up, 5, dtype, device)
    return dy, gate, up, v, low


def glu_sums(
    inputs: tuple[Tensor, ...],
    activation: Activation,
    ranks: Ranks,
    dots: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dgate, dup, the sums and the dots, dgate and dup beside each other in one buffer."""
    dy, gate, up, v, low = inputs
    ffn = gate.shape[1]
    room = torch.full((len(gate), 2 * ffn + 64), float("nan"), dtype=gate.dtype, device=gate.device)
    outs = room[:, :ffn], room[:, ffn : 2 * ffn]
    with nan_poisoned_empty():
        sums = glu_lora_bwd(
            *(dy.clone(), gate, up, activation, v, low, ranks, outs), dots=dots, bias=bias
        )
    assert room[:, 2 * ffn :].isnan().all()
    assert isinstance(sums, GLUSums)
    return *outs, *(x for x in sums if x is not None)


def glu_truth(
    inputs: tuple[Tensor, ...], activation: Activation, ranks: Ranks
) -> tuple[Tensor, ...]:
    """By autograd, in the inputs' dtype; sums of rounded factors by the vendor's products."""
    dy, gate, up, v, low = inputs
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    y = glu_reference(*leaves, activation)
    dgate, dup = torch.autograd.grad(y, leaves, dy)
    rounded = torch.promote_types(torch.float32, gate.dtype)
    low_gate, low_up = low[:, : ranks.gate], low[:, ranks.gate : ranks.gate + ranks.up]
    pairs = ((v[:, : ranks.down], y.detach()), (dgate, low_gate), (dup, low_up))
    return dgate, dup, *(sum_over_rows(a, b, rounded) for a, b in pairs)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", [(7, 63), (70, 100), (1, 1)])
def test_glu_sums_match_autograd(shape, ranks, activation):
    inputs = glu_inputs(*shape, ranks, torch.float64)
    actual, expected = (f(inputs, activation, ranks) for f in (glu_sums, glu_truth))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance.FP64_SAME_MATHS)


def dots_truth(inputs: tuple[Tensor, ...], actual: tuple[Tensor, ...], bias: Tensor) -> Tensor:
    """DoRA's dots of the dgate and dup that were formed."""
    _, gate, up, _, _ = inputs
    less = torch.cat((gate, up), 1).double() - bias.double()
    return (torch.cat(actual[:2], 1).double() * less).sum(0)


@pytest.mark.parametrize("in_place", [False, True])
def test_dots_of_gate_and_up_come_along(in_place):
    ranks = Ranks(3, 2, 4)
    inputs = glu_inputs(7, 33, ranks, torch.float64)
    bias = randn(66, seed=9, dtype=torch.float64)
    actual = glu_sums(inputs, "silu", ranks, dots=True, bias=bias)
    for ours, theirs in zip(actual, glu_sums(inputs, "silu", ranks), strict=False):
        torch.testing.assert_close(ours, theirs, **tolerance.BIT_EXACT)
    expected = dots_truth(inputs, actual, bias)
    dots = actual[-1]
    if in_place:
        dy, gate, up, v, low = (x.clone() for x in inputs)
        sums = glu_lora_bwd(dy, gate, up, "silu", v, low, ranks, (gate, up), True, bias)
        assert sums.dots is not None and torch.equal(gate, actual[0])
        dots = sums.dots
    torch.testing.assert_close(dots, expected, **tolerance.FP64_SAME_MATHS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_dots_of_gate_and_up_on_a_gpu(dtype):
    for rows, ffn in ((7, 63), (2100, 1024)):
        inputs = glu_inputs(rows, ffn, RANKS[0], dtype, "cuda")
        bias = randn(2 * ffn, seed=9, dtype=dtype, device="cuda")
        actual = glu_sums(inputs, "silu", RANKS[0], dots=True, bias=bias)
        for ours, theirs in zip(actual, glu_sums(inputs, "silu", RANKS[0]), strict=False):
            assert torch.equal(ours, theirs)
        # against the lengths of what was multiplied, which bound a sum of any signs
        less = torch.cat(inputs[1:3], 1).double() - bias.double()
        scale = torch.cat(actual[:2], 1).double().norm(dim=0) * less.norm(dim=0)
        expected = dots_truth(inputs, actual, bias) / scale
        torch.testing.assert_close(actual[-1] / scale, expected, **tolerance.FP32_SAME_MATHS)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("ranks", [*RANKS, Ranks(16, MAX_RANK + 1, 16)])
@pytest.mark.parametrize("shape", [(7, 63), (1, 1), (1025, 200), (2100, 1024)])
@pytest.mark.parametrize("dtype", HALF)
def test_glu_sums_on_a_gpu_err_no_more_than_eager(dtype, shape, ranks, activation):
    inputs = glu_inputs(*shape, ranks, dtype, "cuda")
    actual = glu_sums(inputs, activation, ranks)
    eager = glu_truth(inputs, activation, ranks)
    truth = glu_truth(tuple(x.double() for x in inputs), activation, ranks)
    for index, (ours, theirs, true) in enumerate(zip(actual, eager, truth, strict=True)):
        assert ours.shape == true.shape
        factor = tolerance.THIN_PRODUCT_ERROR_FACTOR if index > 1 else None
        if true.numel():
            assert_no_worse_than_eager(f"result {index}", ours, theirs, true, factor)
    again = glu_sums(inputs, activation, ranks)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.gpu
def test_glu_sums_may_replace_gate_and_up_in_place():
    ranks = Ranks(16, 16, 16)
    inputs = glu_inputs(517, 1000, ranks, torch.bfloat16, "cuda")
    expected = glu_sums(inputs, "silu", ranks)
    dy, gate, up, v, low = (x.clone() for x in inputs)
    sums = glu_lora_bwd(dy, gate, up, "silu", v, low, ranks, (gate, up))
    assert sums.dots is None
    for ours, theirs in zip((gate, up, *sums[:-1]), expected, strict=True):
        assert torch.equal(ours, theirs)


def low_of(x: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """copy_low's two results and A."""
    rows, cols = x.shape
    A = padded_ranks(cols, ranks, 7, x.dtype, str(x.device)).T
    A = A.clone(memory_format=torch.contiguous_format)
    room = torch.full((rows, cols + 64), float("nan"), dtype=x.dtype, device=x.device)
    with nan_poisoned_empty():
        low = copy_low(x, A, ranks, room[:, :cols])
    assert room[:, cols:].isnan().all()
    return low, room[:, :cols], A


@pytest.mark.parametrize("ranks", [1, 16, 48])
def test_a_copy_brings_its_low_product(ranks):
    x = wide(9, 70, 5, 0, torch.float64, "cpu")
    low, copy, A = low_of(x, ranks)
    assert torch.equal(copy, x)
    torch.testing.assert_close(low, x @ A.T, **tolerance.FP64_SAME_MATHS)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 16, 48, 64, 65])
@pytest.mark.parametrize("shape", [(9, 70), (33, 1), (517, 1000), (64, 4096)])
@pytest.mark.parametrize("dtype", HALF)
def test_a_copy_on_a_gpu_brings_its_low_product(dtype, shape, ranks):
    x = wide(*shape, 8, 0, dtype, "cuda")
    low, copy, A = low_of(x, ranks)
    assert torch.equal(copy, x)
    assert_no_worse_than_eager("low", low, x @ A.T, x.double() @ A.double().T)
    assert (low[:, ranks:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("ranks", [3, 16, 48, 64])
@pytest.mark.parametrize("shape", [(9, 70), (1, 1), (517, 1000), (1030, 4096)])
@pytest.mark.parametrize("dtype", HALF)
def test_sums_with_a_norm_equal_those_with_it_written(dtype, shape, ranks, offset):
    rows, cols = shape
    x, weight = (
        wide(rows, cols, 8, 0, dtype, "cuda"),
        randn(cols, seed=1, dtype=dtype, device="cuda"),
    )
    v = padded_ranks(rows, ranks, 2, dtype, "cuda")
    n, rstd = rms_norm_fwd(x, weight, 1e-5, offset)
    assert sums_norms(x, ranks)
    with nan_poisoned_empty():
        dA = norm_sum(x, weight, rstd, offset, v, ranks)
    truth = v[:, :ranks].double().T @ n.double()
    eager = sum_over_rows(v[:, :ranks], n, torch.float32)
    factor = tolerance.THIN_PRODUCT_ERROR_FACTOR
    assert_no_worse_than_eager("dA", dA, eager, truth, factor)
    assert torch.equal(dA, norm_sum(x, weight, rstd, offset, v, ranks))


def norms(cols: int, dtype: torch.dtype, device: str, offset: float) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            weight=randn(cols, seed=s, dtype=dtype, device=device), eps=1e-5 * s, offset=offset
        )
        for s in (1, 2)
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(7, 63), (33, 3584), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_behind_a_branch_rounds_as_the_steps_do(dtype, shape, offset, device):
    branch, residual = (wide(*shape, 8 * i, i, dtype, device) for i in (1, 2))
    first, second = norms(shape[1], dtype, device, offset)
    room = wide(*shape, 64, 3, dtype, device)
    with nan_poisoned_empty():
        hidden, rstd, next_rstd = post_norm_fwd(branch, residual, first, second, room)
        alone = post_norm_fwd(branch, residual, first)
    expected = residual + rms_norm_reference(branch, first.weight, first.eps, offset)
    _, expected_rstd = rms_norm_fwd(branch, first.weight, first.eps, offset)
    y, expected_next = rms_norm_fwd(expected, second.weight, second.eps, offset)
    same = tolerance.same_maths(dtype)
    for ours, theirs in (
        *((hidden, expected), (room, y), (rstd, expected_rstd), (next_rstd, expected_next)),
        *((alone.hidden, hidden), (alone.rstd, rstd)),
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **same)
    assert alone.next_rstd is None
