"""RMSNorm: derivation, equality with the reference, and the Triton engine's error on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sloth.kernels.ops.rms_norm import rms_norm, rms_norm_bwd, rms_norm_fwd, rms_norm_reference
from tests import tolerance
from tests.kernels.common import (
    GPU_DTYPES,
    ODD_SIZES,
    assert_gradcheck,
    assert_kernel_accuracy,
    assert_only_needed_gradients,
    assert_roundings_agree,
    assert_same_as_reference,
    inner_strided,
    non_contiguous,
    randn,
    skip_unless_free,
)

EPS = 1e-5


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_gradcheck(offset: float) -> None:
    x, weight = randn(2, 3, 5, dtype=torch.float64), randn(5, seed=1, dtype=torch.float64)
    assert_gradcheck(partial(rms_norm, eps=EPS, offset=offset), [x, weight])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_matches_reference(dtype: torch.dtype, size: int, offset: float) -> None:
    x, weight = randn(3, 7, size, dtype=dtype), randn(size, seed=1, dtype=dtype)
    op = partial(rms_norm, eps=EPS, offset=offset)
    reference = partial(rms_norm_reference, eps=EPS, offset=offset)
    for view in (x, non_contiguous(x), inner_strided(x), x.transpose(0, 1)):
        assert_same_as_reference(op, reference, [view, weight])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_forward_rounds_where_the_reference_does(
    weight_dtype: torch.dtype, offset: float
) -> None:
    x = randn(9, 63, dtype=torch.bfloat16)
    weight = randn(63, seed=1, dtype=weight_dtype)
    actual = rms_norm(x, weight, EPS, offset)
    expected = rms_norm_reference(x, weight, EPS, offset)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_rms_norm_families_round_differently() -> None:
    # w and (w - 1) + 1 (exact for eighths) are the same map: only the order of casts differs
    x, weight = randn(9, 63, dtype=torch.bfloat16), (randn(63, seed=1) * 8).round().bfloat16() / 8
    assert not torch.equal(rms_norm(x, weight, EPS, 0.0), rms_norm(x, weight - 1, EPS, 1.0))


def test_rms_norm_computes_only_needed_gradients() -> None:
    assert_only_needed_gradients(partial(rms_norm, eps=EPS), [randn(4, 63), randn(63, seed=1)])


def test_rms_norm_backward_skips_dweight() -> None:
    x, weight = randn(4, 63), randn(63, seed=1)
    _, rstd = rms_norm_fwd(x, weight, EPS, 0.0)
    assert rms_norm_bwd(x, x, weight, rstd, 0.0, need_dweight=False)[1] is None


def test_rms_norm_of_no_rows() -> None:
    x, weight = randn(0, 63).requires_grad_(), randn(63).requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(63))


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 63), (517, 100), (33, 4096), (300, 1), (3, 16384)])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_rms_norm_kernel_accuracy(
    dtype: torch.dtype, shape: tuple[int, ...], offset: float
) -> None:
    x = randn(*shape, dtype=dtype, device="cuda")
    weight = randn(shape[-1], seed=1, dtype=dtype, device="cuda")
    op = partial(rms_norm, eps=EPS, offset=offset)
    reference = partial(rms_norm_reference, eps=EPS, offset=offset)
    for view in (x, non_contiguous(x), inner_strided(x)):
        assert_kernel_accuracy(op, reference, [view, weight])
    assert_kernel_accuracy(op, reference, [x, weight], needs=[True, False])


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_kernel_rounds_where_the_reference_does(dtype: torch.dtype, offset: float) -> None:
    x = randn(200, 1000, dtype=dtype, device="cuda")
    weight = randn(1000, seed=1, dtype=dtype, device="cuda")
    actual = rms_norm(x, weight, EPS, offset)
    assert_roundings_agree(actual, rms_norm_reference(x, weight, EPS, offset))


@pytest.mark.gpu
def test_rms_norm_kernel_is_deterministic() -> None:
    x = randn(3001, 1000, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = randn(1000, seed=1, dtype=torch.bfloat16, device="cuda").requires_grad_()
    gradients = [torch.autograd.grad(rms_norm(x, weight, EPS).sum(), [x, weight]) for _ in range(3)]
    for dx, dweight in gradients[1:]:
        assert torch.equal(dx, gradients[0][0]) and torch.equal(dweight, gradients[0][1])


@pytest.mark.gpu
def test_rms_norm_kernel_offsets_pass_2_to_the_31() -> None:
    num_cols = 16384
    num_rows = 2**31 // num_cols + 3
    skip_unless_free(6 * 2 * num_rows * num_cols)
    x = torch.ones(num_rows, num_cols, dtype=torch.bfloat16, device="cuda")
    last = randn(2, num_cols, dtype=torch.bfloat16, device="cuda")
    x[-2:] = last
    weight = randn(num_cols, seed=1, dtype=torch.bfloat16, device="cuda")
    y, rstd = rms_norm_fwd(x, weight, EPS, 0.0)
    dx, dweight = rms_norm_bwd(x, x, weight, rstd, 0.0, need_dweight=False)
    assert dweight is None
    few_y, few_rstd = rms_norm_fwd(last, weight, EPS, 0.0)
    few_dx, _ = rms_norm_bwd(last, last, weight, few_rstd, 0.0, need_dweight=False)
    torch.testing.assert_close(y[-2:], few_y, **tolerance.BIT_EXACT)
    torch.testing.assert_close(dx[-2:], few_dx, **tolerance.BIT_EXACT)
