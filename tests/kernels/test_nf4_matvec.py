"""One row times an NF4 matrix as stored: who takes it, and how near it is to the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops import nf4_matvec as module
from sloth.kernels.ops.lora_linear import LoraOperands, lora_linear, lora_linear_reference
from sloth.quant.nf4 import quantize_nf4
from tests.kernels.common import assert_no_worse_than_eager, randn


def test_a_cpu_and_dense_or_broken_rows_are_not_served() -> None:
    assert not module.serves(quantize_nf4(randn(8, 64)), torch.bfloat16)
    assert not module.serves(randn(8, 64), torch.bfloat16)


@pytest.mark.gpu
def test_whole_blocks_in_16_bits_on_a_gpu_are_served() -> None:
    whole, broken = (quantize_nf4(randn(8, width).cuda()) for width in (128, 96))
    assert module.serves(whole, torch.bfloat16) and module.serves(whole, torch.float16)
    assert not module.serves(whole, torch.float32) and not module.serves(broken, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 5, 16])
@pytest.mark.parametrize(("outputs", "width"), [(70, 64), (1024, 4096), (4099, 1152)])
def test_one_row_is_as_near_to_the_truth_as_eager(
    outputs: int, width: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = quantize_nf4(randn(outputs, width, seed=1).cuda().to(dtype))
    x, bias = randn(1, 1, width).cuda().to(dtype), randn(outputs, seed=2).cuda().to(dtype)
    A, B = randn(rank, width, seed=3).cuda(), randn(outputs, rank, seed=4).cuda()
    lora = LoraOperands(A, B, 0.5) if rank else None
    calls, ours = [], module.nf4_matvec

    def counted(*operands: Any) -> Tensor:
        calls.append(operands)
        return ours(*operands)

    monkeypatch.setattr(module, "nf4_matvec", counted)
    wide = LoraOperands(A.double(), B.double(), 0.5) if rank else None
    with torch.no_grad():
        y = lora_linear(x, w, bias, lora)
        eager = lora_linear_reference(x, w, bias, lora)
        truth = lora_linear_reference(x.double(), w, bias.double(), wide)
    assert len(calls) == 1
    assert_no_worse_than_eager("y", y, eager, truth)
