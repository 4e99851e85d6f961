"""Cases of the interpreter: LoRA's thin products inside other kernels, norms behind a branch."""

from __future__ import annotations

import torch

from sloth.kernels import llama as twin
from sloth.kernels.engine import forced_engine
from sloth.kernels.ops.dora_gains import GainsLaunches, is_fused
from sloth.kernels.ops.dora_sums import output_sums
from sloth.kernels.ops.glu_lora import Ranks
from sloth.kernels.ops.post_norm import post_norm_fwd
from sloth.kernels.ops.rms_norm import rms_norm_fwd
from sloth.kernels.ops.thin_products import norm_sum, sums_norms
from sloth.lora import is_lora_name
from sloth.quant.linear4bit import Linear4bit
from tests import tolerance
from tests.kernels.common import nan_poisoned_empty, randn
from tests.kernels.interpreter import case
from tests.kernels.test_dora import with_magnitudes
from tests.kernels.test_dora_gains import SHAPES, adapted, truth
from tests.kernels.test_llama_twin import SMALL, build, context_of, hidden_of, run_both_ways
from tests.kernels.test_thin_products import (
    glu_inputs,
    glu_sums,
    low_of,
    norms,
    padded_ranks,
    wide,
)


@case
def glu_sums_of_several_parts_and_odd_ranks(dtype: torch.dtype) -> None:
    for rows, ffn, ranks in ((5, 70, Ranks(3, 2, 16)), (1030, 33, Ranks(17, 16, 0))):
        for activation in ("silu", "gelu_tanh"):
            inputs = glu_inputs(rows, ffn, ranks, dtype)
            bias = randn(2 * ffn, seed=8, dtype=dtype) if activation == "silu" else None
            with forced_engine("triton"):
                actual = glu_sums(inputs, activation, ranks, True, bias)
            if dtype == torch.float16:  # else it is the vendor's
                assert actual[2].untyped_storage().nbytes() == actual[2].nbytes
            with forced_engine("torch"):
                expected = glu_sums(inputs, activation, ranks, True, bias)
            for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
                allowed = tolerance.FP16_COLUMN_SUMS if index > 1 else tolerance.same_maths(dtype)
                torch.testing.assert_close(ours, theirs, **allowed)


@case
def gains_of_codes_and_dense_matrices(dtype: torch.dtype) -> None:
    for double_quant in (False, True):
        matrices = adapted(SHAPES, dtype, double_quant, "cpu")
        with forced_engine("triton"), nan_poisoned_empty():
            assert all(map(is_fused, matrices))
            GainsLaunches(matrices).run()
        for each in matrices:
            for ours, theirs in zip(each.gains, truth(each, torch.float32), strict=True):
                torch.testing.assert_close(ours, theirs, **tolerance.FP32_SAME_MATHS)


@case
def a_layer_with_dora(dtype: torch.dtype) -> None:
    """Codes of whole blocks, biases everywhere: every launch of a layer's forward and backward."""
    sizes = SMALL | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    results = []
    for engine in ("triton", "torch"):
        block = with_magnitudes(build(sizes, base=Linear4bit, bias=True, dtype=torch.float32))
        for name, parameter in block.named_parameters():
            if parameter.is_floating_point() and not is_lora_name(name):
                parameter.data = parameter.data.to(dtype)
        hidden, context = hidden_of(sizes, 5, dtype=dtype), context_of(sizes, 5, dtype)
        with forced_engine(engine), nan_poisoned_empty():
            results.append(run_both_ways(twin.block, block, hidden, context))
    allowed = tolerance.FP32_CHAIN if dtype == torch.float32 else tolerance.FP16_DORA_LAYER
    for name, theirs in results[1].items():
        ours, length = results[0][name].float(), theirs.float().abs().max()
        torch.testing.assert_close(ours / length, theirs.float() / length, **allowed, msg=name)


@case
def dots_bring_the_gradient_of_B(dtype: torch.dtype) -> None:
    half = torch.float16  # of fp32 they stay apart
    for rows, cols, rank in ((5, 70, 3), (530, 33, 17), (1, 64, 64)):
        dy, y = (wide(rows, cols, 6 * i, i, half, "cpu") for i in (1, 2))
        low = padded_ranks(rows, rank, 3, half, "cpu")
        for bias in (None, randn(cols, seed=4, dtype=half)):
            with forced_engine("triton"), nan_poisoned_empty():
                dots, dB = output_sums(dy, y, bias, low, rank)
            with forced_engine("torch"):
                expected, apart = output_sums(dy, y, bias, low, rank)
            assert dB is not None and apart is None and len(dB) == cols
            torch.testing.assert_close(dots, expected, **tolerance.FP32_COLUMN_SUMS)
            product = dy.float().T @ low.float()
            columns = dB.shape[1]
            assert columns >= rank
            torch.testing.assert_close(dB, product[:, :columns], **tolerance.FP32_COLUMN_SUMS)


@case
def copies_and_norms_bring_their_thin_products(dtype: torch.dtype) -> None:
    half = torch.float16  # of fp32 the products stay apart
    for rows, cols, ranks in ((5, 70, 3), (37, 300, 17), (520, 20, 16)):
        x, weight = wide(rows, cols, 6, 0, half, "cpu"), randn(cols, seed=1, dtype=half)
        for offset in (0.0, 1.0):
            v = padded_ranks(rows, ranks, 2, half, "cpu")
            n, rstd = rms_norm_fwd(x, weight, 1e-5, offset)
            with forced_engine("triton"), nan_poisoned_empty():
                assert sums_norms(x, ranks)
                dA = norm_sum(x, weight, rstd, offset, v, ranks)
            assert dA.untyped_storage().nbytes() == dA.nbytes == 4 * ranks * cols
            expected = v[:, :ranks].float().T @ n.float()
            torch.testing.assert_close(dA, expected, **tolerance.FP32_COLUMN_SUMS)
        with forced_engine("triton"):
            low, copy, A = low_of(x, ranks)
        assert torch.equal(copy, x) and (low[:, ranks:] == 0).all()
        torch.testing.assert_close(low, x @ A.T, **tolerance.same_maths(half))


@case
def norms_behind_a_branch(dtype: torch.dtype) -> None:
    for rows, cols in ((5, 63), (1, 1), (3, 130)):
        branch, residual = (wide(rows, cols, 4 * i, i, dtype, "cpu") for i in (1, 2))
        for offset in (0.0, 1.0):
            results = []
            for engine in ("triton", "torch"):
                first, second = norms(cols, dtype, "cpu", offset)
                room = wide(rows, cols, 5, 3, dtype, "cpu")
                with forced_engine(engine), nan_poisoned_empty():
                    both = post_norm_fwd(branch, residual, first, second, room)
                    alone = post_norm_fwd(branch, residual, first)
                results.append((*both, room, *alone[:2]))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, **tolerance.same_maths(ours.dtype))
