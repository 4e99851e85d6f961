"""Attention: derivation, every back end against the formula, masks, documents, 16-bit error."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sloth.kernels.ops import attention as module
from sloth.kernels.ops.attention import (
    attention,
    attention_reference,
)
from sloth.kernels.ops.attention_backend import Backend, choose_backend
from sloth.kernels.ops.attention_layout import AttentionLayout, document_bounds, index_bounds
from tests import tolerance
from tests.kernels.common import (
    assert_gradcheck,
    assert_kernel_accuracy,
    assert_only_needed_gradients,
    assert_same_as_reference,
    inner_strided,
    outputs_and_gradients,
    randn,
)

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 6
SCALE = 0.3


def documents(num_tokens: int, device: str = "cpu") -> Tensor:
    """[2, T]: three documents in one row, two of other lengths in the other."""
    at = torch.arange(num_tokens, device=device)
    third, half = max(num_tokens // 3, 1), max(num_tokens // 2, 1)
    return torch.stack((at // third, at // half))


def layouts(num_queries: int, num_keys: int, device: str = "cpu") -> dict[str, AttentionLayout]:
    keys = documents(num_keys, device)
    queries = keys[:, num_keys - num_queries :]
    bounds = None
    if num_queries == num_keys:
        at = torch.arange(num_keys)
        third, half = max(num_keys // 3, 1), max(num_keys // 2, 1)
        bounds = document_bounds(torch.stack((at % third, at % half)), torch.device(device))
    return {
        "plain": AttentionLayout(),
        "window": AttentionLayout(window=max(num_keys // 4, 1)),
        "documents": AttentionLayout(queries, keys, bounds=bounds),
        "documents_and_window": AttentionLayout(queries, keys, window=3, bounds=bounds),
    }


LAYOUTS = tuple(layouts(1, 1))
# as in training, as with a cache, one token with a cache, one token
LENGTHS = ((7, 7), (3, 8), (1, 8), (1, 1))


def qkv(
    lengths: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    heads: tuple[int, int] = (HEADS, KV_HEADS),
    head_dim: int = HEAD_DIM,
) -> list[Tensor]:
    """q, k, v as a model hands them on: [B, T, H, E] seen as [B, H, T, E]."""
    sizes = (lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1])
    return [
        randn(BATCH, *size, head_dim, seed=i, dtype=dtype, device=device).transpose(1, 2)
        for i, size in enumerate(sizes)
    ]


def test_document_bounds_of_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    bounds = document_bounds(positions, torch.device("cpu"))
    assert bounds is not None and bounds.longest == 6
    assert bounds.cumulative.tolist() == [0, 3, 4, 6, 12]
    assert bounds.first.tolist() == [[0, 0, 0, 3, 4, 4], [0] * 6]
    assert bounds.last.tolist() == [[2, 2, 2, 3, 5, 5], [5] * 6]
    # a row cut out of a longer document begins anywhere; one document a row is no packing
    assert document_bounds(positions[1:] + 7, torch.device("cpu")) is None


def test_bounds_of_left_padding_are_those_of_its_index() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    bounds = index_bounds(documents, torch.device("cpu"))
    assert bounds is not None and bounds.longest == 6
    assert bounds.cumulative.tolist() == [0, 3, 6, 12, 13, 18]
    assert bounds.first.tolist() == [[0, 0, 0, 3, 3, 3], [0] * 6, [0, 1, 1, 1, 1, 1]]
    assert bounds.last.tolist() == [[2, 2, 2, 5, 5, 5], [5] * 6, [0, 5, 5, 5, 5, 5]]
    mask = AttentionLayout.of(bounds, 2).dense_mask(6, 6, documents.device)
    told = AttentionLayout(documents, documents, 2).dense_mask(6, 6, documents.device)
    assert mask is not None and told is not None and torch.equal(mask, told)
    assert index_bounds(documents[1:2], torch.device("cpu")) is None


def op_and_reference(layout: AttentionLayout) -> tuple[partial[Tensor], partial[Tensor]]:
    return (
        partial(attention, scale=SCALE, layout=layout),
        partial(attention_reference, scale=SCALE, layout=layout),
    )


def force(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr(module, "choose_backend", lambda q, k, layout, softcap: backend)


@pytest.mark.parametrize("lengths", [(4, 4), (2, 5)])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["math", "cpu_flash"])
def test_attention_gradcheck(
    backend: Backend, name: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, backend)
    op, _ = op_and_reference(layouts(*lengths)[name])
    assert_gradcheck(op, qkv(lengths, torch.float64, heads=(2, 1), head_dim=2))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_matches_reference(
    dtype: torch.dtype, name: str, lengths: tuple[int, int]
) -> None:
    op, reference = op_and_reference(layouts(*lengths)[name])
    inputs = qkv(lengths, dtype)
    assert choose_backend(*inputs[:2], AttentionLayout()) == {
        torch.float32: "cpu_flash", torch.float64: "math"
    }[dtype]  # fmt: skip
    assert_same_as_reference(op, reference, inputs)
    assert_same_as_reference(op, reference, [inner_strided(x) for x in inputs])


def test_attention_without_grouped_heads() -> None:
    op, reference = op_and_reference(layouts(7, 7)["documents"])
    assert_same_as_reference(op, reference, qkv((7, 7), heads=(3, 3)))


def test_attention_computes_only_needed_gradients() -> None:
    op, _ = op_and_reference(layouts(7, 7)["documents"])
    assert_only_needed_gradients(op, qkv((7, 7)))


def test_the_reference_is_causal_softmax_attention() -> None:
    # written out per query, with neither mask nor matrix: the reference's own check
    q, k, v = qkv((3, 8), torch.float64)
    out = attention_reference(q, k, v, SCALE, AttentionLayout(window=4))
    for query in range(3):
        last = query + 8 - 3
        keys, values = k[:, :, last - 3 : last + 1], v[:, :, last - 3 : last + 1]
        for head in range(HEADS):
            scores = torch.einsum("be,bse->bs", q[:, head, query], keys[:, head // 2]) * SCALE
            expected = torch.einsum("bs,bse->be", scores.softmax(-1), values[:, head // 2])
            torch.testing.assert_close(out[:, head, query], expected, **tolerance.FP64_SAME_MATHS)


def test_a_window_of_one_sees_itself_alone() -> None:
    q, k, v = qkv((7, 7))
    out = attention(q, k, v, SCALE, AttentionLayout(window=1))
    expected = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
    torch.testing.assert_close(out, expected, **tolerance.FP32_SAME_MATHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    layout = layouts(9, 9)["documents"]
    inputs, first = qkv((9, 9), dtype), 3
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, :, first : 2 * first] += 5.0
    op, _ = op_and_reference(layout)
    before, after = (outputs_and_gradients(op, given) for given in (inputs, changed))
    for old, new in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert old is not None and new is not None
        assert torch.equal(old[0, :, :first], new[0, :, :first])
        assert torch.equal(old[0, :, 2 * first :], new[0, :, 2 * first :])
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0, :, first : 2 * first], new[0, :, first : 2 * first])


def test_layers_share_one_mask() -> None:
    layout = layouts(7, 7)["documents"]
    q, k, _ = qkv((7, 7))
    assert layout.dense_mask(7, 7, q.device) is layout.dense_mask(7, 7, q.device)
    first, second = layout.bias(q, k), layout.bias(q, k)
    assert first is not None and second is not None and first.data_ptr() == second.data_ptr()
    assert AttentionLayout().dense_mask(7, 7, q.device) is None
    assert AttentionLayout(window=7).dense_mask(7, 7, q.device) is None
    assert AttentionLayout(window=7).dense_mask(1, 8, q.device) is not None


def test_what_would_hide_a_token_from_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="window 0"):
        AttentionLayout(window=0)
    with pytest.raises(ValueError, match="documents"):
        AttentionLayout(documents(5), None)


def test_attention_refuses_shapes_that_do_not_fit() -> None:
    q, k, v = qkv((7, 7))
    for bad in ((q[:, :3], k, v), (q, k[..., :4], v), (q, k[:, :, :5], v[:, :, :5])):
        with pytest.raises(ValueError, match="do not fit"):
            attention(*bad, SCALE, AttentionLayout())


@pytest.mark.parametrize("lengths", [(7, 7), (1, 8)])
def test_bf16_on_a_cpu_stays_within_eager_error(lengths: tuple[int, int]) -> None:
    op, reference = op_and_reference(layouts(*lengths)["documents"])
    assert_kernel_accuracy(op, reference, qkv(lengths, torch.bfloat16))


def on_a_gpu(dtype: torch.dtype, num_queries: int, num_keys: int, head_dim: int) -> list[Any]:
    """What `choose_backend` looks at of q and k there."""
    return [
        SimpleNamespace(
            shape=torch.Size((2, heads, length, head_dim)),
            **{"dtype": dtype, "is_cuda": True, "device": torch.device("cuda")},
        )
        for heads, length in ((4, num_queries), (2, num_keys))
    ]


@pytest.mark.parametrize(
    ("dtype", "layout", "softcap", "expected"),
    [
        (torch.float32, "plain", None, "efficient"),
        (torch.float32, "window", None, "triton"),
        (torch.float32, "documents", None, "triton"),
        (torch.float32, "documents_and_window", None, "triton"),
        (torch.float32, "documents", 30.0, "triton"),
        (torch.bfloat16, "documents_and_window", None, "flash"),
        (torch.bfloat16, "documents_and_window", 30.0, "triton"),
        (torch.bfloat16, "window", 30.0, "triton"),
    ],
)
def test_a_whole_prompt_on_a_gpu_makes_no_dense_mask(
    dtype: torch.dtype,
    layout: str,
    softcap: float | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    known = layouts(9, 9)[layout]
    q, k = on_a_gpu(dtype, 9, 9, 128)
    assert choose_backend(q, k, known, softcap) == expected
    if known.query_documents is not None:  # without bounds a mask is what is left
        told = AttentionLayout(known.query_documents, known.key_documents, known.window)
        left = "efficient" if softcap is None else "math"
        assert choose_backend(q, k, told, softcap) == left


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "head_dim"), [(1, 9, 128), (3, 9, 128), (9, 9, 264)]
)
def test_fp32_on_a_gpu_keeps_the_kernel_that_takes_any_shape(num_queries, num_keys, head_dim):
    q, k = on_a_gpu(torch.float32, num_queries, num_keys, head_dim)
    assert choose_backend(q, k, AttentionLayout(window=3)) == "efficient"


@pytest.mark.parametrize(
    ("capability", "head_dim", "plain", "windowed"),
    [
        ((8, 0), 128, "flash", "flash"),
        ((9, 0), 128, "cudnn", "triton"),
        ((9, 0), 256, "cudnn", "triton"),
        ((9, 0), 192, "triton", "triton"),
        ((10, 0), 128, "cudnn", "flash"),
        ((10, 0), 256, "flash", "flash"),
    ],
)
def test_the_kernel_in_16_bits_follows_the_gpu(
    capability: tuple[int, int],
    head_dim: int,
    plain: str,
    windowed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q, k = on_a_gpu(torch.bfloat16, 9, 9, head_dim)
    assert choose_backend(q, k, AttentionLayout()) == plain
    assert choose_backend(q, k, AttentionLayout(window=3)) == windowed
    one, keys = on_a_gpu(torch.bfloat16, 1, 9, head_dim)
    assert choose_backend(one, keys, AttentionLayout()) == "flash"


# q heads and kv heads, head dim
GPU_HEADS = (((8, 2), 64), ((4, 4), 128), ((4, 1), 72), ((2, 1), 256), ((2, 1), 20))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), GPU_HEADS)
@pytest.mark.parametrize("lengths", [(129, 129), (63, 63), (17, 100), (1, 100)])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_gpu_accuracy(
    dtype: torch.dtype,
    name: str,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    op, reference = op_and_reference(layouts(*lengths, "cuda")[name])
    inputs = qkv(lengths, dtype, "cuda", heads, head_dim)
    assert_kernel_accuracy(op, reference, inputs, factor=tolerance.attention_error_factor(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(129, 129), (17, 100), (1, 100)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_gpu_accuracy_in_fp32(name: str, lengths: tuple[int, int]) -> None:
    op, reference = op_and_reference(layouts(*lengths, "cuda")[name])
    factor = tolerance.attention_error_factor(torch.float32)
    inputs = qkv(lengths, torch.float32, "cuda", (8, 2), 64)
    assert_kernel_accuracy(op, reference, inputs, factor=factor)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_every_gpu_backend_by_name(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cudnn" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN's kernels are chosen on Hopper and later")
    force(monkeypatch, backend)
    op, reference = op_and_reference(AttentionLayout())
    inputs = qkv((515, 515), torch.bfloat16, "cuda", (8, 2), 128)
    factor = tolerance.attention_error_factor(torch.bfloat16)
    assert_kernel_accuracy(op, reference, inputs, factor=factor)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_the_layout_of_the_incoming_gradient_does_not_matter(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN's plan of one layout was reused for the other: dq off by 14 where it should be 1
    if backend == "cudnn" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN's kernels are chosen on Hopper and later")
    force(monkeypatch, backend)
    op, _ = op_and_reference(AttentionLayout())
    leaves = [x.requires_grad_() for x in qkv((257, 257), torch.bfloat16, "cuda", (8, 2), 64)]
    values = randn(BATCH, 1, 1, 64, seed=9, dtype=torch.bfloat16, device="cuda")
    broadcast = values.expand(BATCH, 8, 257, 64)
    heads_inside = broadcast.transpose(1, 2).contiguous().transpose(1, 2)
    results = [
        torch.autograd.grad(op(*leaves), leaves, dout)
        for dout in (heads_inside, broadcast.contiguous(), broadcast, inner_strided(broadcast))
    ]
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance.BF16_ATOMIC_SUMS)


@pytest.mark.gpu
def test_gpu_backends_are_chosen_as_documented() -> None:
    major = torch.cuda.get_device_capability()[0]
    ours = "triton" if major == 9 else "flash"

    def chosen(dtype: torch.dtype, head_dim: int, name: str = "plain", num_queries: int = 9) -> str:
        q, k, _ = qkv((num_queries, 9), dtype, "cuda", head_dim=head_dim)
        return choose_backend(q, k, layouts(num_queries, 9, "cuda")[name])

    assert chosen(torch.bfloat16, 128) == ("cudnn" if major >= 9 else "flash")
    assert chosen(torch.float16, 256) == ("cudnn" if major == 9 else "flash")
    for name in ("documents", "window", "documents_and_window"):
        assert chosen(torch.bfloat16, 128, name) == ours
        assert chosen(torch.float16, 256, name) == ours
    assert chosen(torch.bfloat16, 128, num_queries=1) == "flash"
    assert chosen(torch.bfloat16, 128, "documents", num_queries=1) == "efficient"
    assert chosen(torch.float32, 64) == "efficient"
    assert chosen(torch.float32, 64, "documents_and_window") == "triton"
    assert chosen(torch.float64, 64) == "math"
    assert chosen(torch.bfloat16, 20) == "math"
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(torch.bfloat16, 128) == ours
    finally:
        torch.use_deterministic_algorithms(False)
