"""Norm on the heads of q and k with RoPE: derivation, reference, accuracy on a GPU."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from tests.kernels.common import (
    GPU_DTYPES,
    assert_gradcheck,
    assert_kernel_accuracy,
    assert_only_needed_gradients,
    assert_same_as_reference,
    randn,
)


def norms_of(head_dim: int, dtype: torch.dtype, device: str, offset: float) -> Any:
    """Weights around the offset's identity, one of them nearly zero."""
    weights = []
    for seed in (1, 2):
        weight = 1.0 - offset + 0.3 * randn(head_dim, seed=seed, dtype=dtype, device=device)
        weight[0] = 1e-6 - offset
        weights.append(SimpleNamespace(weight=weight, eps=1e-6, offset=offset))
    return tuple(weights)


def case(
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    offset: float = 0.0,
    tokens: int = 5,
    heads: tuple[int, int] = (3, 1),
) -> tuple[Any, Any, list[Tensor]]:
    """(op, reference, [q, k]), q and k views of one stacked buffer."""
    angles = randn(1, tokens, head_dim // 2, seed=7, dtype=dtype, device=device).repeat(1, 1, 2)
    rest = {"cos": angles.cos(), "sin": angles.sin()}
    rest["norms"] = norms_of(head_dim, dtype, device, offset)
    stacked = randn(2, tokens, sum(heads) * head_dim + 3, dtype=dtype, device=device)
    q = stacked[..., : heads[0] * head_dim].unflatten(-1, (heads[0], head_dim))
    k = stacked[..., heads[0] * head_dim : -3].unflatten(-1, (heads[1], head_dim))
    return partial(qk_norm_rope, **rest), partial(qk_norm_rope_reference, **rest), [q, k]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_qk_norm_rope_gradcheck(offset: float) -> None:
    op, _, inputs = case(6, torch.float64, offset=offset)
    assert_gradcheck(op, inputs)
    assert_only_needed_gradients(op, inputs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_qk_norm_rope_equals_its_reference(dtype: torch.dtype, offset: float) -> None:
    op, reference, inputs = case(10, dtype, offset=offset)
    assert_same_as_reference(op, reference, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 40])
def test_qk_norm_rope_gpu_accuracy(head_dim: int, dtype: torch.dtype, offset: float) -> None:
    op, reference, inputs = case(head_dim, dtype, "cuda", offset, tokens=129, heads=(7, 2))

    def wide_reference(q: Tensor, k: Tensor) -> Any:
        """The norms' weights in the dtype of the inputs, so that truth is computed wide."""
        norms = tuple(
            SimpleNamespace(weight=n.weight.to(q.dtype), eps=n.eps, offset=n.offset)
            for n in reference.keywords["norms"]
        )
        rest = {name: reference.keywords[name].to(q.dtype) for name in ("cos", "sin")}
        return qk_norm_rope_reference(q, k, norms, **rest)

    assert_kernel_accuracy(op, wide_reference, inputs)
