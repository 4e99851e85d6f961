"""RoPE: derivation, equality with the reference, attention factors, strides, the kernel's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops.rope import rope, rope_bwd, rope_fwd, rope_reference
from tests import tolerance
from tests.kernels.common import (
    GPU_DTYPES,
    assert_gradcheck,
    assert_kernel_accuracy,
    assert_only_needed_gradients,
    assert_same_as_reference,
    inner_strided,
    non_contiguous,
    randn,
)

ONLY_Q_AND_K = [True, True, False, False]


def tables(
    batch: int, num_tokens: int, head_dim: int, factor: float = 1.0, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """cos and sin [B,T,E] with equal halves, times an attention factor."""
    half = 3 * randn(batch, num_tokens, head_dim // 2, seed=7, dtype=torch.float64)
    angle = torch.cat((half, half), dim=-1)
    return (factor * angle.cos()).to(**keywords), (factor * angle.sin()).to(**keywords)


def queries_and_keys(
    batch: int, num_tokens: int, heads: tuple[int, int], head_dim: int, **keywords: Any
) -> tuple[Tensor, Tensor]:
    q = randn(batch, num_tokens, heads[0], head_dim, **keywords)
    return q, randn(batch, num_tokens, heads[1], head_dim, seed=1, **keywords)


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("table_batch", [1, 2])
def test_rope_gradcheck(table_batch: int, factor: float) -> None:
    q, k = queries_and_keys(2, 3, (3, 1), 6, dtype=torch.float64)
    cos, sin = tables(table_batch, 3, 6, factor, dtype=torch.float64)
    assert_gradcheck(lambda q, k: rope(q, k, cos, sin), [q, k])


@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("head_dim", [2, 34, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rope_matches_reference(dtype: torch.dtype, head_dim: int, table_batch: int) -> None:
    q, k = queries_and_keys(2, 7, (3, 1), head_dim, dtype=dtype)
    cos, sin = tables(table_batch, 7, head_dim, 1.3, dtype=dtype)
    q_turned, k_turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    views = ((q, k), (q_turned, k_turned), (inner_strided(q), non_contiguous(k)))
    for q_view, k_view in views:
        assert_same_as_reference(rope, rope_reference, [q_view, k_view, cos, sin], ONLY_Q_AND_K)


def test_rope_backward_undoes_forward_up_to_the_squared_factor() -> None:
    q, k = queries_and_keys(2, 7, (3, 1), 34, dtype=torch.float64)
    cos, sin = tables(1, 7, 34, 1.3, dtype=torch.float64)
    dq, dk = rope_bwd(*rope_fwd(q, k, cos, sin), cos, sin)
    torch.testing.assert_close(dq, 1.3**2 * q, **tolerance.FP64_SAME_MATHS)
    torch.testing.assert_close(dk, 1.3**2 * k, **tolerance.FP64_SAME_MATHS)


def test_rope_computes_only_needed_gradients() -> None:
    cos, sin = tables(1, 7, 34)
    q, k = queries_and_keys(2, 7, (3, 1), 34)
    assert_only_needed_gradients(lambda q, k: rope(q, k, cos, sin), [q, k])


def test_rope_leaves_its_inputs_alone() -> None:
    q, k = queries_and_keys(2, 7, (3, 1), 34)
    before = q.clone(), k.clone()
    rope(q, k, *tables(1, 7, 34))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_rope_refuses_tables_of_another_length() -> None:
    q, k = queries_and_keys(2, 7, (3, 1), 34)
    with pytest.raises(ValueError, match="do not fit"):
        rope(q, k, *tables(1, 6, 34))


@pytest.mark.gpu
@pytest.mark.parametrize("table_dtype", ["fp32", "activation"])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((3, 1), 6), ((32, 8), 128), ((9, 3), 64), ((5, 5), 100), ((8, 4), 256)]
)
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_rope_kernel_accuracy(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, table_dtype: str
) -> None:
    q, k = queries_and_keys(2, 63, heads, head_dim, dtype=dtype, device="cuda")
    held = torch.float32 if table_dtype == "fp32" else dtype
    q_turned, k_turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    views = ((q, k), (q_turned, k_turned), (inner_strided(q), non_contiguous(k)))
    for table_batch in (1, 2):
        cos, sin = tables(table_batch, 63, head_dim, 1.3, dtype=held, device="cuda")
        for q_view, k_view in views:
            inputs = [q_view, k_view, cos, sin]
            assert_kernel_accuracy(rope, rope_reference, inputs, ONLY_Q_AND_K)


@pytest.mark.gpu
def test_rope_kernel_reads_a_stacked_qkv_in_place() -> None:
    qkv = randn(2, 63, (8 + 2 * 2) * 64, dtype=torch.bfloat16, device="cuda")
    q, k, _ = qkv.split([8 * 64, 2 * 64, 2 * 64], dim=-1)
    q, k = q.unflatten(-1, (8, 64)), k.unflatten(-1, (2, 64))
    cos, sin = tables(1, 63, 64, device="cuda")
    in_place = rope(q, k, cos, sin)
    copied = rope(q.contiguous(), k.contiguous(), cos, sin)
    assert torch.equal(in_place[0], copied[0]) and torch.equal(in_place[1], copied[1])
