"""SwiGLU and GeGLU: derivation, equality with the reference, extremes, the kernel's error."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sloth.kernels.ops.glu import Activation, glu, glu_bwd, glu_fwd, glu_reference
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
    skip_unless_free,
)

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
pytestmark = pytest.mark.parametrize("activation", ACTIVATIONS)


def test_glu_gradcheck(activation: Activation) -> None:
    gate, up = (2 * randn(2, 3, 5, seed=i, dtype=torch.float64) for i in (0, 1))
    assert_gradcheck(partial(glu, activation=activation), [gate, up])


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_glu_matches_reference(dtype: torch.dtype, size: int, activation: Activation) -> None:
    gate, up = (randn(3, 7, size, seed=i, dtype=dtype) for i in (0, 1))
    op = partial(glu, activation=activation)
    reference = partial(glu_reference, activation=activation)
    for gate_view, up_view in ((gate, up), (non_contiguous(gate), inner_strided(up))):
        assert_same_as_reference(op, reference, [gate_view, up_view])


def test_glu_of_a_stacked_projection(activation: Activation) -> None:
    stacked = randn(5, 126)
    op = partial(glu, activation=activation)
    reference = partial(glu_reference, activation=activation)
    assert_same_as_reference(op, reference, list(stacked.split(63, dim=-1)))


def test_glu_is_finite_far_from_zero(activation: Activation) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    op = partial(glu, activation=activation)
    reference = partial(glu_reference, activation=activation)
    assert_same_as_reference(op, reference, [gate[None], torch.ones(1, 7)])


def test_glu_computes_only_needed_gradients(activation: Activation) -> None:
    inputs = [randn(4, 63), randn(4, 63, seed=1)]
    assert_only_needed_gradients(partial(glu, activation=activation), inputs)


def test_glu_refuses_inputs_that_differ(activation: Activation) -> None:
    with pytest.raises(ValueError, match="differ"):
        glu(randn(4, 63), randn(4, 62), activation)
    with pytest.raises(ValueError, match="differ"):
        glu(randn(4, 63), randn(4, 63).double(), activation)
    with pytest.raises(ValueError, match="neither"):
        glu(randn(4, 63), randn(4, 63), activation + "_new")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 63), (517, 100), (33, 14336), (300, 1), (5, 1025)])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_glu_kernel_accuracy(
    dtype: torch.dtype, shape: tuple[int, ...], activation: Activation
) -> None:
    gate, up = (2 * randn(*shape, seed=i, dtype=dtype, device="cuda") for i in (0, 1))
    op = partial(glu, activation=activation)
    reference = partial(glu_reference, activation=activation)
    assert_kernel_accuracy(op, reference, [gate, up])
    assert_kernel_accuracy(op, reference, [non_contiguous(gate), inner_strided(up)])


@pytest.mark.gpu
def test_glu_kernel_offsets_pass_2_to_the_31(activation: Activation) -> None:
    num_cols = 16384
    num_rows = 2**31 // num_cols + 3
    skip_unless_free(7 * 2 * num_rows * num_cols)
    gate = torch.ones(num_rows, num_cols, dtype=torch.bfloat16, device="cuda")
    last = randn(2, num_cols, dtype=torch.bfloat16, device="cuda")
    gate[-2:] = last
    torch.testing.assert_close(
        glu_fwd(gate, gate, activation)[-2:], glu_fwd(last, last, activation), **tolerance.BIT_EXACT
    )
    actual = glu_bwd(gate, gate, gate, activation)
    expected = glu_bwd(last, last, last, activation)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours[-2:], theirs, **tolerance.BIT_EXACT)
