"""Residual add + RMSNorm: derivation, equality with the reference, the kernel's error on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops.add_rms_norm import (
    add_rms_norm,
    add_rms_norm_bwd,
    add_rms_norm_fwd,
    add_rms_norm_reference,
)
from tests import tolerance
from tests.kernels.common import (
    GPU_DTYPES,
    ODD_SIZES,
    assert_gradcheck,
    assert_kernel_accuracy,
    assert_only_needed_gradients,
    assert_same_as_reference,
    inner_strided,
    non_contiguous,
    randn,
)

EPS = 1e-5


def inputs_of(*shape: int, **keywords: Any) -> list[Tensor]:
    shapes = (shape, shape, shape[-1:])
    return [randn(*s, seed=i, **keywords) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm_gradcheck(offset: float) -> None:
    inputs = inputs_of(2, 3, 5, dtype=torch.float64)
    assert_gradcheck(partial(add_rms_norm, eps=EPS, offset=offset), inputs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_rms_norm_matches_reference(dtype: torch.dtype, size: int, offset: float) -> None:
    delta, residual, weight = inputs_of(3, 7, size, dtype=dtype)
    op = partial(add_rms_norm, eps=EPS, offset=offset)
    reference = partial(add_rms_norm_reference, eps=EPS, offset=offset)
    assert_same_as_reference(op, reference, [delta, residual, weight])
    views = [non_contiguous(delta), inner_strided(residual), weight]
    assert_same_as_reference(op, reference, views)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm_forward_rounds_where_the_reference_does(offset: float) -> None:
    delta, residual, weight = inputs_of(9, 63, dtype=torch.bfloat16)
    actual = add_rms_norm(delta, residual, weight, EPS, offset)
    expected = add_rms_norm_reference(delta, residual, weight, EPS, offset)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_add_rms_norm_computes_only_needed_gradients() -> None:
    assert_only_needed_gradients(partial(add_rms_norm, eps=EPS), inputs_of(4, 63))


def test_add_rms_norm_gradient_when_only_one_output_is_used() -> None:
    # a term of zero, so that hidden alone still gives the weight a gradient
    def reference(delta: Tensor, residual: Tensor, weight: Tensor, used: int) -> Tensor:
        outputs = add_rms_norm_reference(delta, residual, weight, EPS)
        return outputs[used] + 0 * outputs[0]

    def op(delta: Tensor, residual: Tensor, weight: Tensor, used: int) -> Tensor:
        return add_rms_norm(delta, residual, weight, EPS)[used]

    for used in (0, 1):
        assert_same_as_reference(
            partial(op, used=used), partial(reference, used=used), inputs_of(4, 63)
        )


def test_add_rms_norm_backward_without_a_residual_gradient() -> None:
    delta, residual, weight = inputs_of(4, 63)
    _, hidden, rstd = add_rms_norm_fwd(delta, residual, weight, EPS, 0.0)
    alone, _ = add_rms_norm_bwd(delta, None, hidden, weight, rstd, 0.0, need_dweight=False)
    zeros = torch.zeros_like(hidden)
    joined, _ = add_rms_norm_bwd(delta, zeros, hidden, weight, rstd, 0.0, need_dweight=False)
    torch.testing.assert_close(alone, joined, **tolerance.BIT_EXACT)


def test_add_rms_norm_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="differ"):
        add_rms_norm(randn(4, 63), randn(1, 63), randn(63), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 63), (517, 100), (33, 4096), (3, 16384)])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_add_rms_norm_kernel_accuracy(
    dtype: torch.dtype, shape: tuple[int, ...], offset: float
) -> None:
    delta, residual, weight = inputs_of(*shape, dtype=dtype, device="cuda")
    op = partial(add_rms_norm, eps=EPS, offset=offset)
    reference = partial(add_rms_norm_reference, eps=EPS, offset=offset)
    assert_kernel_accuracy(op, reference, [delta, residual, weight])
    views = [non_contiguous(delta), inner_strided(residual), weight]
    assert_kernel_accuracy(op, reference, views, needs=[True, True, False])
