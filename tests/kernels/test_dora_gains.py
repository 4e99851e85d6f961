"""DoRA's gains straight from codes and dense matrices, and sums over rows in one pass, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.kernels.gains import GainsBatch
from sloth.kernels.ops.dora import Gains, adapted_norms, squared_row_norms
from sloth.kernels.ops.dora_gains import MAX_RANK, Adapted, GainsLaunches, is_fused
from sloth.kernels.ops.dora_sums import output_sums
from sloth.kernels.ops.nf4 import NF4Weight, nf4_dequantize_reference
from sloth.quant.nf4 import quantize_nf4
from tests import tolerance
from tests.kernels.common import nan_poisoned_empty, randn
from tests.kernels.test_thin_products import padded_ranks, wide
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised

# Rows, columns, rank: several spans, tails of rows and of spans.
SHAPES = ((70, 2176, 3), (5, 64, 17), (64, 112, 4), (130, 2112, 16))
DENSE = (64, 112, 4)  # the others are in NF4
SCALE = 0.5


def adapted(
    shapes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, double_quant: bool, device: str
) -> list[Adapted]:
    """Matrices with a magnitude of 0, gains of NaN."""
    matrices = []
    for seed, (rows, cols, rank) in enumerate(shapes):
        W = randn(rows, cols, seed=seed, dtype=dtype, device=device)
        base = W if (rows, cols, rank) == DENSE else quantize_nf4(W, double_quant)
        A = torch.zeros(rank, cols + 64, dtype=dtype, device=device)[:, :cols]
        A.copy_(randn(rank, cols, seed=9, dtype=dtype, device=device))
        B, m = randn(rows, rank, seed=20 + seed, device=device), randn(rows, device=device)
        m[0] = 0.0
        squared = squared_row_norms(base, torch.float32)
        gains = Gains(*torch.full((3, rows), float("nan"), device=device))
        matrices.append(Adapted(base, A, B, m, squared, SCALE, gains))
    return matrices


def truth(each: Adapted, wide: torch.dtype) -> Gains:
    """From the operands that the product takes, in `wide`."""
    base, A, B, m, _, scale, _ = each
    W = nf4_dequantize_reference(base, A.dtype) if isinstance(base, NF4Weight) else base
    sB = (B * scale).to(A.dtype)
    norms = adapted_norms(W.to(wide), A.to(wide), sB.to(wide), squared_row_norms(base, wide))
    gains = Gains(*torch.empty(3, len(B), dtype=wide, device=A.device))
    gains.put(m.to(wide), norms, scale)
    return gains


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
def test_gains_on_a_gpu_are_those_of_the_formula(dtype, double_quant):
    shapes = (*SHAPES, (300, 4096, MAX_RANK), (257, 14336, 16))
    for some in (shapes, SHAPES[:1], (DENSE,)):
        matrices = adapted(some, dtype, double_quant, "cuda")
        assert all(map(is_fused, matrices))
        launches = GainsLaunches(matrices)
        results = []
        for _ in range(2):
            with nan_poisoned_empty():
                launches.run()
            results.append([[x.clone() for x in each.gains] for each in matrices])
        for each, first, again in zip(matrices, *results, strict=True):
            for ours, same, theirs in zip(first, again, truth(each, torch.float64), strict=True):
                assert torch.equal(ours, same)
                torch.testing.assert_close(ours, theirs.float(), **tolerance.FP32_COLUMN_SUMS)


def test_matrices_that_no_kernel_takes_are_told_apart():
    rows, cols = 6, 128
    for rank, columns, dtype in ((MAX_RANK + 1, cols, torch.float32), (4, 72, torch.float32)):
        (each,) = adapted(((rows, columns, rank),), dtype, True, "cpu")
        assert not is_fused(each)
    assert GainsBatch([]).run() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 70, 3), (1030, 200, 17), (8192, 1024, 48), (1, 64, 64)])
def test_sums_of_outputs_on_a_gpu(dtype, shape):
    rows, cols, rank = shape
    dy, y = (wide(rows, cols, 8 * i, i, dtype, "cuda") for i in (1, 2))
    low, bias = padded_ranks(rows, rank, 3, dtype, "cuda"), randn(cols, dtype=dtype, device="cuda")
    with nan_poisoned_empty():
        dots, dB = output_sums(dy, y, bias, low, rank)
    again = output_sums(dy, y, bias, low, rank)
    assert dB is not None and torch.equal(dots, again[0]) and torch.equal(dB, again[1])
    left, others = dy.double(), (y.double() - bias.double(), low.double()[:, :rank])
    lengths = left.norm(dim=0)
    # Against the lengths of what was multiplied, which bound a sum of any signs.
    scale = lengths * others[0].norm(dim=0)
    expected = (left * others[0]).sum(0) / scale
    torch.testing.assert_close(dots / scale, expected, **tolerance.FP32_SAME_MATHS)
    scale = lengths[:, None] * others[1].norm(dim=0)
    expected = left.T @ others[1] / scale
    torch.testing.assert_close(dB[:, :rank] / scale, expected, **tolerance.FP32_SAME_MATHS)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_fused_network_on_a_gpu_follows_its_ops(tmp_path: Path, quant: str | None):
    folder = save_tiny_llama(tmp_path / "base", **WHOLE_BLOCKS)
    tokens = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(5))
    found = {}
    for level in ("ops", "fused"):
        model = sloth.load(folder, quant=quant, device="cuda", dtype="float32", level="auto")
        model = randomised(model.add_lora(sloth.LoraConfig(r=8, use_dora=True)))
        model._requested_level = level
        model._update_level()
        model.loss(tokens, tokens).backward()
        named = model.network.named_parameters()
        found[level] = {name: p.grad for name, p in named if p.grad is not None}
    assert found["ops"].keys() == found["fused"].keys() and len(found["ops"]) > 0
    for name, theirs in found["ops"].items():
        torch.testing.assert_close(found["fused"][name], theirs, **tolerance.FP32_CHAIN, msg=name)
