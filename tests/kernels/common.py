"""What the op tests share: awkward inputs, poisoned memory, gradients, the error rule.

Imports: the repository root is on `sys.path`, so `from tests.kernels.common import ...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests import tolerance

# no power of two, no multiple of 16; one element; one more than a power of two
ODD_SIZES = (63, 100, 1, 129)
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, **keywords: Any
) -> Tensor:
    """Normal values that are the same on every device: drawn on the CPU in fp64, then moved."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(dtype=dtype, **keywords)


def non_contiguous(x: Tensor) -> Tensor:
    """The same values as every second row of a wider buffer whose other elements are NaN."""
    buffer = torch.full(
        (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), float("nan"), dtype=x.dtype
    ).to(x.device)
    view = buffer[..., ::2, 1 : 1 + x.shape[-1]]
    view.copy_(x)
    return view


def inner_strided(x: Tensor) -> Tensor:
    """The same values with an inner stride of 2."""
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]


@contextmanager
def nan_poisoned_empty() -> Iterator[None]:
    """Inside, `torch.empty` of a float dtype is full of NaN, so an element never written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **keywords: Any) -> Tensor:
        tensor = empty(*args, **keywords)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with mock.patch("torch.empty", poisoned):
        yield


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def outputs_and_gradients(
    op: Op, inputs: Sequence[Tensor], needs: Sequence[bool] | None = None, seed: int = 99
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run `op`, then its backward with fixed random output gradients.

    Leaves are views of `inputs` with their strides kept. A gradient is None where not needed.
    """
    needs = [x.is_floating_point() for x in inputs] if needs is None else needs
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    outputs = as_tuple(op(*leaves))
    upstream = [
        randn(*y.shape, seed=seed + i, dtype=y.dtype, device=y.device)
        for i, y in enumerate(outputs)
    ]
    torch.autograd.backward(list(outputs), upstream)
    return [y.detach() for y in outputs], [leaf.grad for leaf in leaves]


def assert_same_as_reference(
    op: Op, reference: Op, inputs: Sequence[Tensor], needs: Sequence[bool] | None = None
) -> None:
    """Outputs and every needed gradient equal autograd through the reference; others are None."""
    with nan_poisoned_empty():
        actual = outputs_and_gradients(op, inputs, needs)
    expected = outputs_and_gradients(reference, inputs, needs)
    for ours, theirs in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance.same_maths(theirs.dtype))


def assert_gradcheck(op: Op, inputs: Sequence[Tensor]) -> None:
    """fp64 gradcheck of the public op, on the torch engine; every input must be fp64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    assert all(x.dtype == torch.float64 for x in leaves)
    assert torch.autograd.gradcheck(op, leaves)


def assert_only_needed_gradients(op: Op, inputs: Sequence[Tensor]) -> None:
    """With one input at a time requiring grad, that gradient is unchanged and the rest are None."""
    full = outputs_and_gradients(op, inputs)[1]
    for wanted in range(len(inputs)):
        needs = [i == wanted for i in range(len(inputs))]
        gradients = outputs_and_gradients(op, inputs, needs)[1]
        for i, gradient in enumerate(gradients):
            if i != wanted:
                assert gradient is None
                continue
            torch.testing.assert_close(gradient, full[i], **tolerance.BIT_EXACT)


def assert_no_worse_than_eager(
    name: str, actual: Tensor, eager: Tensor, truth: Tensor, factor: float | None = None
) -> None:
    """THE ERROR RULE: a fast kernel's error against truth stays within eager's, times a factor.

    `truth` is the reference on the same (already rounded) inputs in a wider dtype. Held for the
    largest error and for the root mean square, which no single lucky element can hide. Where eager
    has (almost) no error, one rounding of the stored dtype is allowed.
    """
    factor = tolerance.kernel_error_factor(actual.dtype) if factor is None else factor
    assert actual.dtype == eager.dtype and actual.shape == truth.shape
    truth = truth.double()
    assert actual.isfinite().all(), f"{name}: not finite"
    measures: dict[str, Callable[[Tensor], float]] = {
        "largest": lambda x: x.abs().max().item(),
        "root mean square": lambda x: x.square().mean().sqrt().item(),
    }
    for measure, of in measures.items():
        error, eager_error = of(actual.double() - truth), of(eager.double() - truth)
        budget = max(factor * eager_error, tolerance.one_rounding(actual.dtype, of(truth)))
        assert error <= budget, f"{name}: {measure} error {error:.3e}, eager's {eager_error:.3e}"


def assert_kernel_accuracy(
    op: Op,
    reference: Op,
    inputs: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
    factor: float | None = None,
) -> None:
    """Forward and every gradient of `op` by the error rule, with fp64 autograd as the truth.

    `inputs` hold the low-precision values; eager is `reference` on them, truth is `reference` on
    their fp64 copies.
    """
    with nan_poisoned_empty():
        actual = outputs_and_gradients(op, inputs, needs)
    eager = outputs_and_gradients(reference, inputs, needs)
    # the upstream gradient must be the rounded one that the op saw
    dtypes = [y.dtype for y in eager[0]]

    def rounded_upstream(*wide: Tensor) -> tuple[Tensor, ...]:
        outputs = as_tuple(reference(*wide))
        return tuple(
            _RoundGradient.apply(y, dtype) for y, dtype in zip(outputs, dtypes, strict=True)
        )

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = outputs_and_gradients(rounded_upstream, wide, needs)
    kinds = [f"output {i}" for i in range(len(dtypes))]
    kinds += [f"gradient {i}" for i in range(len(inputs))]
    for kind, ours, theirs, true in zip(
        kinds, actual[0] + actual[1], eager[0] + eager[1], truth[0] + truth[1], strict=True
    ):
        if true is None or theirs is None:
            assert ours is None
            continue
        assert ours is not None, f"{kind} is missing"
        assert_no_worse_than_eager(kind, ours, theirs, true, factor)


def assert_roundings_agree(actual: Tensor, expected: Tensor) -> None:
    """Half-precision results that round in the same places: all but a few elements are equal."""
    if actual.dtype in (torch.float16, torch.bfloat16):
        flipped = (actual != expected).double().mean().item()
        assert flipped <= tolerance.FLIPPED_ROUNDINGS, f"{flipped:.1%} of the elements differ"


class _RoundGradient(torch.autograd.Function):
    """Identity whose backward rounds the gradient to `dtype` and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.to(ctx.dtype).to(dy.dtype), None


def skip_unless_free(num_bytes: int) -> None:
    """Skip a case that would not fit next to what the GPU already holds."""
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB of free GPU memory")
