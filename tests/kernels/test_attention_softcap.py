"""Attention with a softcap: derivation, masks, documents, and what the cap does to the scores."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops.attention import (
    AttentionLayout,
    attention,
    attention_reference,
)
from sloth.kernels.ops.attention_backend import choose_backend
from tests import tolerance
from tests.kernels.common import assert_gradcheck, assert_kernel_accuracy, assert_same_as_reference
from tests.kernels.test_attention import HEADS, LAYOUTS, LENGTHS, layouts, qkv

# Scores of these inputs are about 1 in size, so that the cap bends most of them.
SCALE, SOFTCAP = 0.4, 0.7


def op_and_reference(layout: AttentionLayout) -> tuple[partial[Tensor], partial[Tensor]]:
    how = {"scale": SCALE, "layout": layout, "softcap": SOFTCAP}
    return partial(attention, **how), partial(attention_reference, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(4, 4), (2, 5)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_softcap_gradcheck(name: str, lengths: tuple[int, int]) -> None:
    op, _ = op_and_reference(layouts(*lengths)[name])
    assert_gradcheck(op, qkv(lengths, torch.float64, heads=(2, 1), head_dim=2))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_softcap_matches_reference(
    dtype: torch.dtype, name: str, lengths: tuple[int, int]
) -> None:
    op, reference = op_and_reference(layouts(*lengths)[name])
    assert_same_as_reference(op, reference, qkv(lengths, dtype))


def test_bf16_softcap_on_a_cpu_stays_within_eager_error() -> None:
    op, reference = op_and_reference(layouts(7, 7)["documents_and_window"])
    assert_kernel_accuracy(op, reference, qkv((7, 7), torch.bfloat16))


def test_the_reference_caps_the_scores_before_the_softmax() -> None:
    # written out for the last query, which sees every key
    q, k, v = qkv((1, 8), torch.float64)
    out = attention_reference(q, k, v, SCALE, AttentionLayout(), SOFTCAP)
    for head in range(HEADS):
        scores = torch.einsum("be,bse->bs", q[:, head, 0], k[:, head // 2]) * SCALE
        weights = (SOFTCAP * torch.tanh(scores / SOFTCAP)).softmax(-1)
        expected = torch.einsum("bs,bse->be", weights, v[:, head // 2])
        torch.testing.assert_close(out[:, head, 0], expected, **tolerance.FP64_SAME_MATHS)


def test_a_softcap_goes_to_the_formula() -> None:
    q, k, _ = qkv((7, 7))
    assert choose_backend(q, k, AttentionLayout()) == "cpu_flash"
    assert choose_backend(q, k, AttentionLayout(), SOFTCAP) == "math"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256, 80])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_softcap_gpu_accuracy(dtype: torch.dtype, name: str, head_dim: int) -> None:
    lengths = (300, 300)
    op, reference = op_and_reference(layouts(*lengths, "cuda")[name])
    inputs = qkv(lengths, dtype, "cuda", (4, 2), head_dim)
    assert choose_backend(*inputs[:2], layouts(*lengths, "cuda")[name], SOFTCAP) == "triton"
    factor = tolerance.attention_error_factor(dtype)
    assert_kernel_accuracy(op, reference, inputs, factor=factor)


@pytest.mark.gpu
def test_capped_attention_on_a_gpu_is_deterministic() -> None:
    op, _ = op_and_reference(layouts(300, 300, "cuda")["documents_and_window"])
    leaves = [x.requires_grad_() for x in qkv((300, 300), torch.bfloat16, "cuda", (4, 2), 128)]
    runs = [torch.autograd.grad(op(*leaves).sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
