"""Head + cross-entropy: derivation, chunks, never all logits, untrained rows, 16-bit error."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sloth.constants import IGNORE_INDEX
from sloth.kernels.ops import linear_cross_entropy as module
from sloth.kernels.ops.linear_cross_entropy import (
    cross_entropy_in_place,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
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
    skip_unless_free,
)

SOFTCAPS = (None, 3.0)


def labels_of(num_rows: int, vocabulary: int, every: int = 3, **keywords: Any) -> Tensor:
    """Random labels; each `every`-th row is untrained."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(vocabulary, (num_rows,), generator=generator)
    labels[::every] = IGNORE_INDEX
    return labels.to(**keywords)


def with_labels(labels: Tensor, function: Any = linear_cross_entropy, **keywords: Any) -> Any:
    """The loss as a vector of one, which the shared helpers can draw a gradient for."""
    return lambda hidden, weight: function(hidden, weight, labels, **keywords).view(1)


@pytest.fixture(params=[None, 2], ids=["one_chunk", "chunks_of_2_rows"])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        # 9 words of fp64; the same bytes are 4 rows of fp32
        monkeypatch.setattr(module, "ROOMY_CHUNK_BYTES", request.param * 9 * 8)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("num_trained", [None, 17, torch.tensor(17)])
@pytest.mark.usefixtures("chunk_rows")
def test_linear_cross_entropy_gradcheck(num_trained: Any, softcap: float | None) -> None:
    hidden, weight = (2 * randn(n, 4, seed=n, dtype=torch.float64) for n in (7, 9))
    op = with_labels(labels_of(7, 9), num_trained=num_trained, softcap=softcap)
    assert_gradcheck(op, [hidden, weight])


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("num_trained", [None, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("chunk_rows")
def test_linear_cross_entropy_matches_reference(
    dtype: torch.dtype, num_trained: int | None, softcap: float | None
) -> None:
    hidden, weight = (2 * randn(n, 5, seed=n, dtype=dtype) for n in (11, 9))
    options = {"num_trained": num_trained, "softcap": softcap}
    op = with_labels(labels_of(11, 9), **options)
    reference = with_labels(labels_of(11, 9), linear_cross_entropy_reference, **options)
    for view in (hidden, non_contiguous(hidden), inner_strided(hidden)):
        assert_same_as_reference(op, reference, [view, weight])


def test_linear_cross_entropy_computes_only_needed_gradients() -> None:
    op = with_labels(labels_of(11, 9), softcap=3.0)
    assert_only_needed_gradients(op, [randn(11, 5), randn(9, 5, seed=1)])


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_logits_of_all_rows_never_exist(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, vocabulary, chunk = 90, 200, 7
    monkeypatch.setattr(module, "ROOMY_CHUNK_BYTES", chunk * vocabulary * 4)
    hidden, weight = randn(num_rows, 8), randn(vocabulary, 8, seed=1)
    labels = labels_of(num_rows, vocabulary)

    def largest(function: Any) -> int:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with LargestTensor() as mode:
            function(*leaves, labels, softcap=softcap).backward()
        return mode.largest

    assert largest(linear_cross_entropy_reference) == num_rows * vocabulary
    assert largest(linear_cross_entropy) == max(weight.numel(), chunk * vocabulary)


def test_untrained_rows_are_never_computed() -> None:
    hidden, weight, labels = randn(12, 5), randn(9, 5, seed=1), labels_of(12, 9)
    poisoned = hidden.clone()
    poisoned[labels == IGNORE_INDEX] = float("nan")
    op = with_labels(labels)
    expected = outputs_and_gradients(op, [hidden, weight])
    actual = outputs_and_gradients(op, [poisoned, weight])
    for ours, theirs in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    dhidden = actual[1][0]
    assert dhidden is not None and not dhidden[labels == IGNORE_INDEX].any()


def test_no_trained_row_gives_zero_loss_and_zero_gradients() -> None:
    op = with_labels(torch.full((6,), IGNORE_INDEX))
    (loss,), gradients = outputs_and_gradients(op, [randn(6, 5), randn(9, 5, seed=1)])
    assert loss.dtype == torch.float32 and loss.item() == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_backward_may_run_twice() -> None:
    leaves = [randn(11, 5).requires_grad_(), randn(9, 5, seed=1).requires_grad_()]
    loss = linear_cross_entropy(*leaves, labels_of(11, 9))
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(3 * loss, leaves)
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 3 * first, **tolerance.FP32_SAME_MATHS)


def test_nothing_is_formed_for_the_backward_without_grad() -> None:
    hidden, weight, labels = randn(11, 5), randn(9, 5, seed=1), labels_of(11, 9)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(loss, expected.detach(), **tolerance.FP32_SAME_MATHS)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [63, 4096, 49152, 128256])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_cross_entropy_kernel_accuracy(
    dtype: torch.dtype, softcap: float | None, vocabulary: int
) -> None:
    logits = 4 * randn(37, vocabulary, dtype=dtype, device="cuda")
    labels = torch.randint(vocabulary, (37,), device="cuda")

    def eager(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        wide = z if z.dtype == torch.float64 else z.float()
        capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
        losses = F.cross_entropy(capped, labels, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]

    gradient = logits.clone()
    losses = cross_entropy_in_place(gradient, labels, softcap, need_gradient=True)
    names = ("losses", "gradient")
    for name, ours, theirs, true in zip(
        names, (losses, gradient), eager(logits), eager(logits.double()), strict=True
    ):
        capped = name == "losses" and softcap is not None
        factor = tolerance.SOFTCAP_ERROR_FACTOR if capped else None
        assert_no_worse_than_eager(name, ours, theirs, true, factor)
    unchanged = logits.clone()
    cross_entropy_in_place(unchanged, labels, softcap, need_gradient=False)
    assert torch.equal(unchanged, logits)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_accuracy_at_a_real_vocabulary(
    dtype: torch.dtype, softcap: float | None
) -> None:
    num_rows, vocabulary, dim = 700, 128256, 512
    hidden = randn(num_rows, dim, dtype=dtype, device="cuda")
    weight = (randn(vocabulary, dim, seed=1) * dim**-0.5).to(dtype=dtype, device="cuda")
    labels = labels_of(num_rows, vocabulary, device="cuda")
    run = partial(outputs_and_gradients, needs=[True, True])
    actual = run(with_labels(labels, softcap=softcap), [hidden, weight])
    reference = with_labels(labels, linear_cross_entropy_reference, softcap=softcap)
    eager = run(reference, [hidden, weight])
    truth = run(reference, [hidden.double(), weight.double()])
    torch.testing.assert_close(
        actual[0][0].double(), truth[0][0], **tolerance.MEAN_LOSS_OF_16_BIT_LOGITS
    )
    for name, ours, theirs, true in zip(
        ("dhidden", "dweight"), actual[1], eager[1], truth[1], strict=True
    ):
        assert ours is not None and theirs is not None and true is not None
        assert_no_worse_than_eager(name, ours, theirs, true)


@pytest.mark.gpu
def test_label_outside_the_vocabulary_gives_nan_not_stray_memory() -> None:
    logits = randn(3, 100, device="cuda")
    losses = cross_entropy_in_place(logits, torch.tensor([0, 100, -7], device="cuda"), None, False)
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
def test_cross_entropy_kernel_offsets_pass_2_to_the_31() -> None:
    vocabulary = 128256
    num_rows = 2**31 // vocabulary + 3
    skip_unless_free(3 * 2 * num_rows * vocabulary)
    logits = torch.zeros(num_rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    last = randn(2, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = last
    labels = torch.arange(num_rows, device="cuda")
    losses = cross_entropy_in_place(logits, labels, None, need_gradient=True)
    expected = cross_entropy_in_place(last, labels[-2:], None, need_gradient=True)
    torch.testing.assert_close(losses[-2:], expected, **tolerance.BIT_EXACT)
    torch.testing.assert_close(logits[-2:], last, **tolerance.BIT_EXACT)
