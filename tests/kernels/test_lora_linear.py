"""LoRA linear: derivation, equality with PEFT's formula, what is saved, 16-bit error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops import lora_linear as module
from sloth.kernels.ops.lora_linear import (
    Base,
    LoraOperands,
    dense_weight,
    draw_dropout_mask,
    lora_linear,
    lora_linear_reference,
)
from sloth.kernels.ops.nf4 import NF4Weight
from sloth.quant.nf4 import quantize_nf4
from tests import tolerance
from tests.kernels.common import (
    assert_gradcheck,
    assert_no_worse_than_eager,
    assert_only_needed_gradients,
    assert_same_as_reference,
    inner_strided,
    non_contiguous,
    outputs_and_gradients,
    randn,
)

SCALE, DROPOUT = 1.7, 0.4
IN, OUT, RANK = 11, 7, 3


def operands(dtype: torch.dtype, leading: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    """x, W, b, A, B."""
    shapes = (*leading, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK)
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def apply(
    x: Tensor, base: Base, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float = 0.0
) -> Tensor:
    """The op, with the same dropout mask in every call."""
    torch.manual_seed(0)
    return lora_linear(x, base, bias, LoraOperands(A, B, SCALE, dropout), training=True)


def apply_reference(
    x: Tensor, base: Base, bias: Tensor | None, A: Tensor, B: Tensor, dropout: float = 0.0
) -> Tensor:
    torch.manual_seed(0)
    lora = LoraOperands(A, B, SCALE, dropout)
    return lora_linear_reference(x, base, bias, lora, draw_dropout_mask(x, lora, True))


def nf4_base(out_features: int = OUT, in_features: int = IN) -> NF4Weight:
    return quantize_nf4(randn(out_features, in_features, seed=9))


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_lora_linear_gradcheck(dropout: float) -> None:
    assert_gradcheck(partial(apply, dropout=dropout), operands(torch.float64))


def test_lora_linear_gradcheck_without_lora_and_bias() -> None:
    x, W, b, _, _ = operands(torch.float64)
    assert_gradcheck(lora_linear, [x, W, b])
    assert_gradcheck(lora_linear, [x, W])


def test_lora_linear_gradcheck_on_nf4() -> None:
    x, _, b, A, B = operands(torch.float64)
    base = nf4_base()
    assert_gradcheck(lambda x, b, A, B: apply(x, base, b, A, B, DROPOUT), [x, b, A, B])
    assert_gradcheck(lambda x: lora_linear(x, base), [x])


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_linear_matches_reference(dtype: torch.dtype, dropout: float) -> None:
    op, reference = (partial(f, dropout=dropout) for f in (apply, apply_reference))
    x, *rest = operands(dtype)
    for view in (x, non_contiguous(x), inner_strided(x), x.transpose(0, 1), x[0, 0], x[:0]):
        assert_same_as_reference(op, reference, [view, *rest])


def test_lora_linear_computes_only_needed_gradients() -> None:
    assert_only_needed_gradients(partial(apply, dropout=DROPOUT), operands(torch.float32))


def test_lora_linear_drops_only_in_training_and_keeps_the_mean() -> None:
    x, W, _, A, B = operands(torch.float64, (20_000,))
    lora = LoraOperands(A, B, SCALE, DROPOUT)
    mask = draw_dropout_mask(x, lora, training=True)
    assert mask is not None
    torch.testing.assert_close(mask.unique().tolist(), [0.0, 1 / (1 - DROPOUT)])
    torch.testing.assert_close(mask.mean().item(), 1.0, **tolerance.DROPOUT_MEAN)
    assert draw_dropout_mask(x, lora, training=False) is None
    expected = x @ W.T + SCALE * (x @ A.T) @ B.T
    torch.testing.assert_close(
        lora_linear(x, W, None, lora, training=False), expected, **tolerance.FP64_SAME_MATHS
    )


def saved_shapes(call: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the floating-point tensors that autograd keeps for the backward."""
    shapes: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point():
            shapes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return shapes


def test_nf4_base_is_dequantised_in_each_direction_and_never_saved() -> None:
    x, _, _, A, B = (t.requires_grad_() for t in operands(torch.float32))
    base = nf4_base()
    with mock.patch.object(module, "nf4_dequantize", wraps=module.nf4_dequantize) as unpack:
        shapes = saved_shapes(lambda: apply(x, base, None, A, B))
        assert unpack.call_count == 1
        apply(x, base, None, A, B).sum().backward()
        assert unpack.call_count == 3
    assert (OUT, IN) not in shapes
    assert x.grad is not None and A.grad is not None and B.grad is not None


def test_input_is_saved_only_for_gradients_that_read_it() -> None:
    x, W, b, A, B = operands(torch.float32)
    x.requires_grad_()
    assert saved_shapes(lambda: lora_linear(x, W, b)) == [(OUT, IN)]
    B.requires_grad_()
    assert tuple(x.shape) not in saved_shapes(lambda: apply(x, W, b, A, B))
    A.requires_grad_()
    assert tuple(x.shape) in saved_shapes(lambda: apply(x, W, b, A, B))


def lora_in_the_dtype_of_x(x: Tensor, base: Base, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What 16-bit training computes eagerly: PEFT's formula with both factors cast to x's dtype."""
    return apply_reference(x, base, bias, A.to(x.dtype), B.to(x.dtype))


def assert_16_bit_accuracy(base: Base, inputs: list[Tensor], factor: float) -> None:
    """Error of output and gradients against fp64 within eager 16-bit's; A and B stay fp32."""

    def on(base_now: Base, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, b, A, B: function(x, base_now, b, A, B)

    wide_base = base if isinstance(base, NF4Weight) else base.double()
    actual = outputs_and_gradients(on(base, apply), inputs)
    eager = outputs_and_gradients(on(base, lora_in_the_dtype_of_x), inputs)
    upstream = randn(*actual[0][0].shape, seed=99, dtype=inputs[0].dtype).double()
    leaves = [x.double().requires_grad_() for x in inputs]
    out = apply_reference(leaves[0], wide_base, *leaves[1:])
    truth = [out, *torch.autograd.grad(out, leaves, upstream.to(out.device))]
    for name, ours, theirs, true in zip(
        ("y", "dx", "db", "dA", "dB"), actual[0] + actual[1], eager[0] + eager[1], truth,
        strict=True,
    ):  # fmt: skip
        assert ours is not None and theirs is not None
        assert_no_worse_than_eager(name, ours, theirs, true.detach(), factor)


def half_operands(
    rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, list[Tensor]]:
    """W, and x, b in `dtype`, A, B in fp32, of the sizes (in, out, rank)."""
    num_in, num_out, rank = sizes
    W = randn(num_out, num_in, seed=1, device=device) * num_in**-0.5
    x, b = randn(rows, num_in, device=device), randn(num_out, seed=2, device=device)
    A = randn(rank, num_in, seed=3, device=device) * num_in**-0.5
    B = randn(num_out, rank, seed=4, device=device)
    return W, [x.to(dtype), b.to(dtype), A, B]


def test_fp32_factors_under_16_bit_activations_get_fp32_gradients() -> None:
    W, inputs = half_operands(300, (IN, OUT, RANK), torch.bfloat16, "cpu")
    assert_16_bit_accuracy(W.bfloat16(), inputs, tolerance.KERNEL_ERROR_FACTOR)
    gradients = outputs_and_gradients(lambda x, b, A, B: apply(x, nf4_base(), b, A, B), inputs)[1]
    assert [g.dtype for g in gradients if g is not None] == [x.dtype for x in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("sizes", [(100, 63, 5), (576, 1536, 16), (1030, 257, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_linear_gpu_accuracy(
    dtype: torch.dtype, sizes: tuple[int, int, int], nf4: bool
) -> None:
    W, inputs = half_operands(517, sizes, dtype, "cuda")
    base = quantize_nf4(W) if nf4 else W.to(dtype)
    assert_16_bit_accuracy(base, inputs, tolerance.KERNEL_ERROR_FACTOR)


@pytest.mark.gpu
def test_lora_linear_gpu_sums_over_rows_in_fp32() -> None:
    # dA of all-ones operands counts the rows; a 16-bit sum would stop at 256
    num_rows = 2**16 + 1
    x = torch.ones(num_rows, 8, dtype=torch.bfloat16, device="cuda")
    A = torch.ones(1, 8, device="cuda", requires_grad=True)
    B = torch.ones(8, 1, device="cuda", requires_grad=True)
    W = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")
    lora_linear(x, W, None, LoraOperands(A, B, 1.0)).backward(torch.ones_like(x))
    assert A.grad is not None and B.grad is not None
    assert A.grad.dtype == torch.float32
    assert torch.equal(A.grad, torch.full_like(A, 8.0 * num_rows))
    assert torch.equal(B.grad, torch.full_like(B, 8.0 * num_rows))


def test_dense_weight_of_a_dense_base_is_itself() -> None:
    W = randn(3, 5)
    assert dense_weight(W, torch.float32) is W
