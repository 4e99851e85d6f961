"""Head + log-probabilities: derivation, a gradient for each row, chunks, never all logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sloth.constants import IGNORE_INDEX
from sloth.kernels.ops import linear_cross_entropy as shared
from sloth.kernels.ops.linear_cross_entropy import linear_cross_entropy
from sloth.kernels.ops.linear_log_probs import linear_log_probs, linear_log_probs_reference
from tests import tolerance
from tests.kernels.common import (
    GPU_DTYPES,
    assert_gradcheck,
    assert_no_worse_than_eager,
    assert_only_needed_gradients,
    assert_same_as_reference,
    inner_strided,
    non_contiguous,
    outputs_and_gradients,
    randn,
)
from tests.kernels.test_linear_cross_entropy import SOFTCAPS, LargestTensor, labels_of


def with_labels(labels: Tensor, function: Any = linear_log_probs, **keywords: Any) -> Any:
    return lambda hidden, weight: function(hidden, weight, labels, **keywords)


@pytest.fixture(params=[None, 2], ids=["one_chunk", "chunks_of_2_rows"])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        # 9 words of fp64; the same bytes are 4 rows of fp32
        monkeypatch.setattr(shared, "CHUNK_BYTES", request.param * 9 * 8)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.usefixtures("chunk_rows")
def test_linear_log_probs_gradcheck(softcap: float | None) -> None:
    hidden, weight = (2 * randn(n, 4, seed=n, dtype=torch.float64) for n in (7, 9))
    assert_gradcheck(with_labels(labels_of(7, 9), softcap=softcap), [hidden, weight])


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("chunk_rows")
def test_linear_log_probs_matches_reference(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, weight = (2 * randn(n, 5, seed=n, dtype=dtype) for n in (11, 9))
    op = with_labels(labels_of(11, 9), softcap=softcap)
    reference = with_labels(labels_of(11, 9), linear_log_probs_reference, softcap=softcap)
    for view in (hidden, non_contiguous(hidden), inner_strided(hidden)):
        assert_same_as_reference(op, reference, [view, weight])


def test_linear_log_probs_computes_only_needed_gradients() -> None:
    op = with_labels(labels_of(11, 9), softcap=3.0)
    assert_only_needed_gradients(op, [randn(11, 5), randn(9, 5, seed=1)])


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_logits_of_all_rows_never_exist(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, vocabulary, chunk = 90, 200, 7
    monkeypatch.setattr(shared, "CHUNK_BYTES", chunk * vocabulary * 4)
    hidden, weight = randn(num_rows, 8), randn(vocabulary, 8, seed=1)
    labels = labels_of(num_rows, vocabulary)

    def largest(function: Any) -> int:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with LargestTensor() as mode:
            function(*leaves, labels, softcap=softcap).square().sum().backward()
        return mode.largest

    assert largest(linear_log_probs_reference) == num_rows * vocabulary
    assert largest(linear_log_probs) == max(weight.numel(), chunk * vocabulary)


def test_unwanted_rows_are_zero_and_never_computed() -> None:
    hidden, weight, labels = randn(12, 5), randn(9, 5, seed=1), labels_of(12, 9)
    poisoned = hidden.clone()
    poisoned[labels == IGNORE_INDEX] = float("nan")
    op = with_labels(labels)
    expected = outputs_and_gradients(op, [hidden, weight])
    actual = outputs_and_gradients(op, [poisoned, weight])
    for ours, theirs in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    assert not actual[0][0][labels == IGNORE_INDEX].any()


def test_no_wanted_row_gives_zeros_and_zero_gradients() -> None:
    op = with_labels(torch.full((6,), IGNORE_INDEX))
    (found,), gradients = outputs_and_gradients(op, [randn(6, 5), randn(9, 5, seed=1)])
    assert found.dtype == torch.float32 and not found.any()
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_backward_may_run_twice_and_leaves_what_it_saved() -> None:
    leaves = [randn(11, 5).requires_grad_(), randn(9, 5, seed=1).requires_grad_()]
    total = linear_log_probs(*leaves, labels_of(11, 9)).sum()
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    twice = torch.autograd.grad(3 * total, leaves)
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 3 * first, **tolerance.FP32_SAME_MATHS)


def test_their_sum_is_the_cross_entropy() -> None:
    """The two ops share their chunks; equal bits say that they share the derivation, too."""
    hidden, weight, labels = randn(11, 5), randn(9, 5, seed=1), labels_of(11, 9)
    (rows,), _ = outputs_and_gradients(with_labels(labels), [hidden, weight])
    loss = linear_cross_entropy(hidden, weight, labels, num_trained=1)
    torch.testing.assert_close(-rows.sum(), loss, **tolerance.FP32_SAME_MATHS)


def test_small_fp16_gradients_of_a_trained_head_survive() -> None:
    """A factor of 1e-6 is below what fp16 keeps beside values of size 1 / 64."""
    hidden, weight, labels = randn(8, 16) / 64, randn(9, 16, seed=1), labels_of(8, 9)
    grads = []
    for dtype in (torch.float16, torch.float32):
        leaf = weight.to(dtype).float().requires_grad_()
        found = linear_log_probs(hidden.to(dtype), leaf, labels)
        grads.append(torch.autograd.grad(1e-6 * found.sum(), leaf)[0])
    torch.testing.assert_close(*(1e6 * grad for grad in grads), **tolerance.FP16_PRODUCT)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_linear_log_probs_accuracy_at_a_real_vocabulary(
    dtype: torch.dtype, softcap: float | None
) -> None:
    num_rows, vocabulary, dim = 300, 128256, 512
    hidden = randn(num_rows, dim, dtype=dtype, device="cuda")
    weight = (randn(vocabulary, dim, seed=1) * dim**-0.5).to(dtype=dtype, device="cuda")
    labels = labels_of(num_rows, vocabulary, device="cuda")
    run = partial(outputs_and_gradients, needs=[True, True])
    actual = run(with_labels(labels, softcap=softcap), [hidden, weight])
    reference = with_labels(labels, linear_log_probs_reference, softcap=softcap)
    eager = run(reference, [hidden, weight])
    truth = run(reference, [hidden.double(), weight.double()])
    for name, ours, theirs, true in zip(
        ("log_probs", "dhidden", "dweight"),
        actual[0] + actual[1],
        eager[0] + eager[1],
        truth[0] + truth[1],
        strict=True,
    ):
        assert ours is not None and theirs is not None and true is not None
        factor = tolerance.SOFTCAP_ERROR_FACTOR if name == "log_probs" and softcap else None
        assert_no_worse_than_eager(name, ours, theirs, true, factor)
