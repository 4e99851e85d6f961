"""Cases that run the Triton source itself on a CPU: the triton engine against the torch engine.

`TRITON_INTERPRET=1` must be set before a kernel is defined and cannot be unset afterwards, so the
cases run in a process of their own: test_triton_interpreter.py starts
`python -m tests.kernels.interpreter_cases` once and reports every case as one test.

ADD A CASE: here, or in a file that is imported for it, write `def my_op(dtype: torch.dtype) ->
None`, decorate it with `@case`, and build inputs small (the interpreter runs one program at a time
in numpy: thousands of elements, tens of programs). It runs in fp32 and in fp16; the interpreter's
bf16 is wrong, so that is a GPU test. `compare(op, inputs)` is enough for most; otherwise raise
AssertionError.
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from sloth.kernels.engine import INTERPRET, forced_engine
from sloth.kernels.ops import attention as attention_module
from sloth.kernels.ops.add_rms_norm import add_rms_norm
from sloth.kernels.ops.attention import attention, attention_reference
from sloth.kernels.ops.attention_layout import AttentionLayout, Spans, document_bounds
from sloth.kernels.ops.batch import CopyBatch, CopyPart, NF4Batch, NF4Part
from sloth.kernels.ops.decode_attention import decode_attention
from sloth.kernels.ops.dora import column_dots
from sloth.kernels.ops.fp8_cast import FP8, fp8_cast
from sloth.kernels.ops.glu import glu
from sloth.kernels.ops.linear_cross_entropy import cross_entropy_in_place
from sloth.kernels.ops.linear_log_probs import linear_log_probs
from sloth.kernels.ops.lora_linear import LoraOperands, lora_linear
from sloth.kernels.ops.nf4 import nf4_dequantize, nf4_dequantize_reference
from sloth.kernels.ops.nf4_matvec import nf4_matvec
from sloth.kernels.ops.qk_norm_rope import qk_norm_rope
from sloth.kernels.ops.rms_norm import rms_norm, rms_norm_reference
from sloth.kernels.ops.rope import rope
from sloth.quant.nf4 import quantize_nf4
from tests import tolerance
from tests.kernels import interpreter_lora as interpreter_lora  # registers its cases
from tests.kernels.common import (
    assert_kernel_accuracy,
    assert_no_worse_than_eager,
    assert_roundings_agree,
    inner_strided,
    nan_poisoned_empty,
    non_contiguous,
    randn,
)
from tests.kernels.interpreter import CASES, DTYPES, case, compare


@case
def rms_norm_cast_then_weight(dtype: torch.dtype) -> None:
    x, weight = randn(2, 5, 100, dtype=dtype), randn(100, seed=1, dtype=dtype)
    compare(partial(rms_norm, eps=1e-5), [x, weight])
    compare(partial(rms_norm, eps=1e-5), [non_contiguous(x), weight])
    compare(partial(rms_norm, eps=1e-5), [x, weight], needs=[True, False])


@case
def rms_norm_weight_then_cast(dtype: torch.dtype) -> None:
    x, weight = randn(7, 63, dtype=dtype), randn(63, seed=1, dtype=dtype)
    compare(partial(rms_norm, eps=1e-6, offset=1.0), [x, weight])
    compare(partial(rms_norm, eps=1e-6, offset=1.0), [inner_strided(x), weight])


@case
def rms_norms_round_where_the_reference_does(dtype: torch.dtype) -> None:
    delta, residual = randn(20, 63, dtype=dtype), randn(20, 63, seed=1, dtype=dtype)
    weight = randn(63, seed=2, dtype=dtype)
    for offset in (0.0, 1.0):
        with forced_engine("triton"):
            y = rms_norm(delta, weight, 1e-5, offset)
            added_y, _ = add_rms_norm(delta, residual, weight, 1e-5, offset)
        assert_roundings_agree(y, rms_norm_reference(delta, weight, 1e-5, offset))
        joined = rms_norm_reference(delta + residual, weight, 1e-5, offset)
        assert_roundings_agree(added_y, joined)


@case
def rms_norm_dweight_over_many_rows(dtype: torch.dtype) -> None:
    # more rows than programs, so a program sums several
    x, weight = randn(300, 17, dtype=dtype), randn(17, seed=1, dtype=dtype)
    compare(partial(rms_norm, eps=1e-5), [x, weight])


@case
def add_rms_norm_both_families(dtype: torch.dtype) -> None:
    delta, residual = randn(2, 3, 100, dtype=dtype), randn(2, 3, 100, seed=1, dtype=dtype)
    weight = randn(100, seed=2, dtype=dtype)
    for offset in (0.0, 1.0):
        op = partial(add_rms_norm, eps=1e-5, offset=offset)
        compare(op, [delta, residual, weight])
        compare(op, [non_contiguous(delta), residual, weight], needs=[True, True, False])


def rope_inputs(dtype: torch.dtype, batch: int, table_batch: int, head_dim: int) -> list[Tensor]:
    q, k = randn(batch, 5, 3, head_dim, dtype=dtype), randn(batch, 5, 2, head_dim, dtype=dtype)
    half = randn(table_batch, 5, head_dim // 2, seed=2)
    return [q, k, torch.cat((half, half), -1).cos(), torch.cat((half, half), -1).sin()]


@case
def rope_strides_and_tables(dtype: torch.dtype) -> None:
    needs = [True, True, False, False]
    for batch, table_batch, head_dim in ((2, 1, 6), (2, 2, 34), (1, 1, 64)):
        q, k, cos, sin = rope_inputs(dtype, batch, table_batch, head_dim)
        compare(rope, [q, k, cos, sin], needs)
        q_turned, k_turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        compare(rope, [q_turned, k_turned, cos, sin], needs)
        compare(rope, [inner_strided(q), non_contiguous(k), cos.to(dtype), sin.to(dtype)], needs)


@case
def rope_more_heads_than_a_tile(dtype: torch.dtype) -> None:
    q, k = randn(1, 2, 9, 512, dtype=dtype), randn(1, 2, 5, 512, dtype=dtype)
    angle = randn(1, 2, 512, seed=2)[..., :256].repeat(1, 1, 2)
    compare(rope, [q, k, 1.3 * angle.cos(), 1.3 * angle.sin()], [True, True, False, False])


@case
def glu_both_activations(dtype: torch.dtype) -> None:
    gate, up = randn(2, 3, 100, dtype=dtype), randn(2, 3, 100, seed=1, dtype=dtype)
    stacked = randn(5, 126, seed=2, dtype=dtype)
    wide = randn(2, 1030, seed=3, dtype=dtype)
    for activation in ("silu", "gelu_tanh"):
        op = partial(glu, activation=activation)
        compare(op, [gate, up])
        compare(op, [stacked[:, :63], stacked[:, 63:]])
        compare(op, [inner_strided(gate), up], needs=[False, True])
        compare(op, [10 * wide, wide])


@case
def cross_entropy_over_one_tile_and_several(dtype: torch.dtype) -> None:
    for vocabulary in (63, 4096, 9001):
        logits = 3 * randn(4, vocabulary, dtype=dtype)
        labels = torch.tensor([0, vocabulary - 1, 5, 7])
        for softcap in (None, 4.0):
            for need_gradient in (True, False):
                results = []
                for engine in ("triton", "torch"):
                    mine = logits.clone()
                    with forced_engine(engine), nan_poisoned_empty():
                        losses = cross_entropy_in_place(mine, labels, softcap, need_gradient)
                    results.append((losses, mine))
                for ours, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(ours, theirs, **tolerance.same_maths(ours.dtype))


@case
def linear_log_probs_frozen_and_trained_heads(dtype: torch.dtype) -> None:
    hidden, weight = randn(6, 16, dtype=dtype), 0.5 * randn(63, 16, seed=1, dtype=dtype)
    labels = torch.tensor([0, 62, -100, 7, 7, -100])
    for softcap in (None, 4.0):
        op = partial(linear_log_probs, labels=labels, softcap=softcap)
        compare(op, [hidden, weight])
        compare(op, [inner_strided(hidden), weight], needs=[True, False])


@case
def nf4_dequantize_both_scale_forms(dtype: torch.dtype) -> None:
    for shape in ((3, 64), (63, 100), (7, 9), (20, 512)):
        for double_quant in (False, True):
            weight = quantize_nf4(randn(*shape, dtype=dtype), double_quant)
            with forced_engine("triton"), nan_poisoned_empty():
                actual = nf4_dequantize(weight, dtype)
            expected = nf4_dequantize_reference(weight, dtype)
            torch.testing.assert_close(actual, expected, **tolerance.BIT_EXACT)


@case
def nf4_batch_fills_every_view(dtype: torch.dtype) -> None:
    for double_quant in (False, True):
        shapes = ((3, 64), (5, 128), (7, 9), (20, 512))
        weights = [quantize_nf4(randn(*shape, dtype=dtype), double_quant) for shape in shapes]
        buffers = [torch.full((n + 1, k + 8), -1.0, dtype=dtype) for n, k in shapes]
        views = [b[:n, :k] for b, (n, k) in zip(buffers, shapes, strict=True)]
        gains = [None, *(randn(n, seed=n) for n, _ in shapes[1:])]
        parts = [NF4Part(*part) for part in zip(weights, views, gains, strict=True)]
        with forced_engine("triton"):
            NF4Batch(parts).run()
        for (weight, view, gain), buffer in zip(parts, buffers, strict=True):
            expected = nf4_dequantize_reference(weight, dtype)
            if gain is None:
                torch.testing.assert_close(view, expected, **tolerance.BIT_EXACT)
            else:
                expected = (nf4_dequantize_reference(weight, gain.dtype) * gain[:, None]).to(dtype)
                torch.testing.assert_close(view, expected, **tolerance.same_maths(dtype))
            assert (buffer[-1] == -1).all() and (buffer[:, view.shape[1] :] == -1).all()


@case
def copy_batch_casts_and_scales(dtype: torch.dtype) -> None:
    shapes, scales = ((4, 130), (70, 3), (1, 1), (70, 65)), (1.0, 0.5, 0.0, 2.0)
    sources = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    sources[2].fill_(torch.inf)  # times 0: zeros
    gains = [None, None, None, randn(70, seed=9)]
    buffers = [torch.full((n + 2, k + 5), -1.0, dtype=dtype) for n, k in shapes]
    views = [b[1 : n + 1, 2 : k + 2] for b, (n, k) in zip(buffers, shapes, strict=True)]
    parts = [CopyPart(*part) for part in zip(sources, views, scales, gains, strict=True)]
    with forced_engine("triton"):
        CopyBatch(parts).run()
    for (source, view, scale, gain), buffer in zip(parts, buffers, strict=True):
        expected = source * scale if scale else torch.zeros_like(source)
        expected = expected if gain is None else expected * gain[:, None]
        torch.testing.assert_close(view, expected.to(dtype), **tolerance.BIT_EXACT)
        assert (buffer == -1).sum() >= buffer.numel() - view.numel()


@case
def column_dots_of_tails_and_several_spans(dtype: torch.dtype) -> None:
    for rows, cols in ((5, 70), (300, 3), (1, 64)):
        dy, y = (randn(rows, cols + 9, seed=i, dtype=dtype)[:, :cols] for i in (0, 1))
        for bias in (None, randn(cols, seed=2, dtype=dtype)):
            results = []
            for engine in ("triton", "torch"):
                with forced_engine(engine), nan_poisoned_empty():
                    results.append(column_dots(dy, y, bias))
            torch.testing.assert_close(*results, **tolerance.FP32_COLUMN_SUMS)


@case
def fp8_cast_of_any_row(dtype: torch.dtype) -> None:
    for rows, cols in ((5, 64), (3, 1000), (1, 1)):
        x = randn(rows, cols, dtype=dtype) * 10.0 ** torch.arange(-2, rows - 2)[:, None]
        x = x.to(dtype)
        x[-1] = 0 if rows > 1 else x[-1]
        for view in (x, non_contiguous(x), inner_strided(x)):
            out = torch.full((rows, cols + 16), 7.0).to(FP8)
            with forced_engine("triton"), nan_poisoned_empty():
                actual, into = fp8_cast(view), fp8_cast(view, out[:, :cols])
            with forced_engine("torch"):
                expected = fp8_cast(view)
            for x8, scales in (actual, into):
                torch.testing.assert_close(x8.float(), expected[0].float(), **tolerance.BIT_EXACT)
                torch.testing.assert_close(scales, expected[1], **tolerance.BIT_EXACT)
            assert (out[:, cols:].float() == 7).all()


@case
def qk_norm_rope_heads_of_a_stacked_buffer(dtype: torch.dtype) -> None:
    for head_dim, offset in ((8, 0.0), (24, 1.0)):
        stacked = randn(2, 3, 7 * head_dim, dtype=dtype)
        q = stacked[..., : 5 * head_dim].unflatten(-1, (5, head_dim))
        k = stacked[..., 5 * head_dim :].unflatten(-1, (2, head_dim))
        angles = randn(1, 3, head_dim // 2, seed=2, dtype=dtype).repeat(1, 1, 2)
        norms = tuple(
            SimpleNamespace(weight=randn(head_dim, seed=s, dtype=dtype), eps=1e-5, offset=offset)
            for s in (3, 4)
        )
        op = partial(qk_norm_rope, norms=norms, cos=angles.cos(), sin=angles.sin())
        compare(op, [q, k])


@case
def capped_attention_windows_and_documents(dtype: torch.dtype) -> None:
    num_tokens, device = 70, torch.device("cpu")
    positions = torch.stack((torch.arange(70) % 40, torch.arange(70) % 23))
    for head_dim, window, documents in ((16, None, False), (16, 9, True), (40, 33, False)):
        bounds = document_bounds(positions, device) if documents else None
        layout = AttentionLayout.of(bounds, window)
        q, k, v = (
            randn(2, num_tokens, heads, head_dim, seed=i, dtype=dtype).transpose(1, 2)
            for i, heads in enumerate((2, 1, 1))
        )
        how = {"scale": 0.4, "layout": layout, "softcap": 0.7}
        factor = tolerance.attention_error_factor(dtype)
        with forced_engine("triton"), nan_poisoned_empty():
            op, truth = partial(attention, **how), partial(attention_reference, **how)
            assert_kernel_accuracy(op, truth, [q, k, v], factor=factor)


@case
def attention_without_a_cap_in_windows_and_documents(dtype: torch.dtype) -> None:
    # What fp32 on a GPU takes; there `choose_backend` asks for a GPU.
    num_tokens, device = 70, torch.device("cpu")
    positions = torch.stack((torch.arange(70) % 40, torch.arange(70) % 23))
    for head_dim, window, documents in ((16, 9, False), (100, None, True), (130, 33, True)):
        bounds = document_bounds(positions, device) if documents else None
        q, k, v = (
            randn(2, num_tokens, heads, head_dim, seed=i, dtype=dtype).transpose(1, 2)
            for i, heads in enumerate((2, 1, 1))
        )
        how = {"scale": head_dim**-0.5, "layout": AttentionLayout.of(bounds, window)}
        op, truth = partial(attention, **how), partial(attention_reference, **how)
        factor = tolerance.attention_error_factor(dtype)
        ours = patch.object(attention_module, "choose_backend", lambda *given: "triton")
        with forced_engine("triton"), nan_poisoned_empty(), ours:
            assert_kernel_accuracy(op, truth, [q, k, v], factor=factor)


@case
def decoding_sees_the_written_slots(dtype: torch.dtype) -> None:
    for heads, kv_heads, head_dim, window, softcap in (
        *((4, 2, 16, None, None), (3, 3, 24, 70, 0.7), (8, 1, 40, 300, None)),
    ):
        q = randn(3, heads, 1, head_dim, dtype=dtype)
        slots = (3, kv_heads, 600, head_dim)
        k, v = randn(*slots, seed=1, dtype=dtype), randn(*slots, seed=2, dtype=dtype)
        for last in (599, 256, 255, 5):
            first = torch.tensor([0, 3, min(last, 290)], dtype=torch.int32)
            spans = Spans(first, torch.tensor([last]))
            k[:, :, last + 1 :] = v[:, :, last + 1 :] = float("nan")  # never written
            seen = [x.nan_to_num() for x in (k, v)]
            with forced_engine("triton"), nan_poisoned_empty():
                actual = decode_attention(q, k, v, 0.4, spans, window, softcap)
            layout = AttentionLayout(window=window, spans=spans)
            expected = attention_reference(q, *seen, 0.4, layout, softcap)
            truth = attention_reference(*(x.double() for x in (q, *seen)), 0.4, layout, softcap)
            factor = tolerance.attention_error_factor(dtype)
            assert_no_worse_than_eager("decode", actual, expected, truth, factor)


def main() -> None:
    """Run every case; print {"case-dtype": "" or the traceback} as one JSON line."""
    assert INTERPRET, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    results = {}
    for name, function in CASES.items():
        for dtype_name, dtype in DTYPES.items():
            try:
                function(dtype)
                results[f"{name}-{dtype_name}"] = ""
            except Exception:
                results[f"{name}-{dtype_name}"] = traceback.format_exc()
    json.dump(results, sys.stdout)


@case
def one_row_times_nf4_as_stored(dtype: torch.dtype) -> None:
    for outputs, width, double_quant, rank in ((70, 192, True, 5), (33, 1152, False, 0)):
        w = quantize_nf4(randn(outputs, width, seed=1), double_quant)
        x, bias, gains = randn(1, 1, width, dtype=dtype), randn(outputs, seed=2), randn(outputs)
        A = randn(rank, width, seed=3, dtype=dtype) if rank else None
        B = randn(outputs, rank, seed=4, dtype=dtype) if rank else None
        with forced_engine("triton"), nan_poisoned_empty():
            y = nf4_matvec(x, w, bias, A, B, 0.5, gains)
        whole = nf4_dequantize_reference(w, torch.float64)
        if A is not None and B is not None:
            whole = whole + 0.5 * B.double() @ A.double()
        truth = (x.double() @ whole.T) * gains.double() + bias.double()
        torch.testing.assert_close(y, truth.to(dtype), **tolerance.same_maths(dtype))
        if A is not None and B is not None and dtype == torch.float16:
            with forced_engine("triton"), torch.no_grad():
                same = lora_linear(x, w, bias, LoraOperands(A, B, 0.5))
                assert torch.equal(same, nf4_matvec(x, w, bias, A, B, 0.5))


if __name__ == "__main__":
    main()
