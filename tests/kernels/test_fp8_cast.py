"""Rows to e4m3 with scales of their own: rounding, range, what is not finite, the kernel."""

from __future__ import annotations

import pytest
import torch

from sloth.kernels.engine import forced_engine
from sloth.kernels.ops.fp8_cast import FP8, LARGEST, fp8_cast
from tests import tolerance
from tests.kernels.common import (
    ODD_SIZES,
    inner_strided,
    nan_poisoned_empty,
    non_contiguous,
    randn,
    skip_unless_free,
)


def assert_close_to_rows(x: torch.Tensor, x8: torch.Tensor, scales: torch.Tensor) -> None:
    """Each element within half a step of its binade, below e4m3's normal range of the last."""
    assert x8.dtype == FP8 and scales.dtype == torch.float32
    scales = scales.double()[:, None]
    error = (scales * x8.double() - x.double()).abs()
    # a rounding of the scale itself and of the quotient, in fp32
    budget = x.double().abs() * (tolerance.E4M3_RELATIVE + tolerance.FLOAT32_ROUNDING)
    assert (error <= budget.maximum(scales * tolerance.E4M3_ABSOLUTE)).all()


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cast_keeps_every_element_within_half_a_step(dtype: torch.dtype, size: int) -> None:
    x = randn(7, size, dtype=dtype) * 10.0 ** torch.arange(-3, 4)[:, None].to(dtype)
    x[:, size // 2 :] *= 1e-3
    for view in (x, non_contiguous(x), inner_strided(x)):
        with nan_poisoned_empty():
            x8, scales = fp8_cast(view)
        assert_close_to_rows(x, x8, scales)


def test_the_largest_element_of_a_row_becomes_the_largest_number() -> None:
    x8, scales = fp8_cast(torch.tensor([[1.0, -3.0, 0.5], [0.0, 1e-20, 0.0]]))
    assert x8.float().abs().amax(1).tolist() == [LARGEST, LARGEST]
    torch.testing.assert_close(
        scales * LARGEST, torch.tensor([3.0, 1e-20]), **tolerance.FP32_SAME_MATHS
    )


def test_ties_go_to_even() -> None:
    x = torch.tensor([[LARGEST, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]])
    assert fp8_cast(x)[0].float().tolist() == [[LARGEST, 16.0, 20.0, 0.0, 2.0**-8]]


def test_rows_of_zeros_and_of_almost_nothing_stay_finite() -> None:
    x8, scales = fp8_cast(torch.tensor([[0.0, -0.0], [1e-44, 0.0]]))
    assert scales.isfinite().all() and (scales > 0).all() and (x8.float() == 0).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(broken: float) -> None:
    x = randn(3, 8)
    x[1, 2] = broken
    x8, scales = fp8_cast(x)
    finite = (scales[:, None] * x8.float()).sum(1).isfinite()
    assert finite.tolist() == [True, False, True]


def test_out_takes_the_numbers_in_any_rows() -> None:
    x, buffer = randn(5, 48), torch.zeros(5, 64).to(FP8)
    x8, scales = fp8_cast(x, out=buffer[:, :48])
    expected = fp8_cast(x)
    assert x8.data_ptr() == buffer.data_ptr() and (buffer[:, 48:].float() == 0).all()
    assert torch.equal(buffer[:, :48].float(), expected[0].float())
    assert torch.equal(scales, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 63), (517, 100), (33, 14336), (9, 28672), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_rounds_as_the_torch_engine(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = randn(*shape, dtype=dtype, device="cuda")
    x[0] = 0
    for view in (x, non_contiguous(x), inner_strided(x)):
        with nan_poisoned_empty():
            actual = fp8_cast(view)
        with forced_engine("torch"):
            expected = fp8_cast(view)
        torch.testing.assert_close(actual[1], expected[1], **tolerance.BIT_EXACT)
        torch.testing.assert_close(actual[0].float(), expected[0].float(), **tolerance.BIT_EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_kernel_hides_nothing_that_is_not_finite(broken: float) -> None:
    x = randn(3, 4096, dtype=torch.bfloat16, device="cuda")
    x[1, 2] = broken
    x8, scales = fp8_cast(x)
    assert (scales[:, None] * x8.float()).sum(1).isfinite().tolist() == [True, False, True]


@pytest.mark.gpu
def test_kernel_offsets_pass_2_to_the_31() -> None:
    num_cols = 16384
    num_rows = 2**31 // num_cols + 3
    skip_unless_free(4 * num_rows * num_cols)
    x = torch.ones(num_rows, num_cols, dtype=torch.bfloat16, device="cuda")
    x[-2:] = last = randn(2, num_cols, dtype=torch.bfloat16, device="cuda")
    x8, scales = fp8_cast(x)
    expected = fp8_cast(last)
    torch.testing.assert_close(x8[-2:].float(), expected[0].float(), **tolerance.BIT_EXACT)
    torch.testing.assert_close(scales[-2:], expected[1], **tolerance.BIT_EXACT)
