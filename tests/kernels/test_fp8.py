"""Stacks and layers whose frozen products run on 8-bit floats: how close, what stays exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sloth.errors import KernelUnavailable
from sloth.kernels import fp8
from sloth.kernels import llama as twin
from sloth.kernels.context import POLICIES, BlockContext, Keep
from sloth.kernels.fp8 import FP8Stack, FP8Weight, require_fp8
from sloth.kernels.layer import FusedLayer, Workspace
from sloth.kernels.ops.fp8_cast import fp8_cast
from sloth.kernels.ops.fp8_product import fp8_product
from sloth.kernels.ops.lora_linear import dense_weight
from sloth.linear import Linear, Projection
from sloth.models.llama import Block
from sloth.quant.linear4bit import Linear4bit
from tests import tolerance
from tests.kernels.common import nan_poisoned_empty, randn
from tests.kernels.test_llama_twin import ALL, SMALL, build, context_of, hidden_of, run_both_ways

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SIZES |= {"intermediate_size": 256}
REAL = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
REAL |= {"intermediate_size": 1536}
BASES = (Linear, Linear4bit)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


def cosine(actual: Tensor, expected: Tensor) -> float:
    pair = (x.double().flatten() for x in (actual, expected))
    return torch.cosine_similarity(*pair, dim=0).item()


def layers(base: type[Projection], **settings: Any) -> tuple[FusedLayer, FusedLayer]:
    """One block prepared in 8 bits, and as ever, in fp64."""
    block, dtype = build(SIZES, base=base, rank=8, **settings), torch.float64
    found = []
    for compute in ("fp8", None):
        layer = Workspace(compute).layer(block, twin.WIRING, dtype, False)
        layer.fill()
        found.append(layer)
    return found[0], found[1]


def inputs_of(stacks: tuple[Any, Any], num_rows: int, name: str) -> Iterator[Tensor]:
    """The same X, or dY, in the room that each stack gives."""
    for stack in stacks:
        room = getattr(stack, f"new_{name}")(num_rows)
        width = stack.K if name == "input" else stack.N
        room[:, :width] = randn(num_rows, width, seed=3, dtype=torch.float64)
        yield room


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_products_are_within_e4m3_of_the_exact_ones(base: type[Projection], name: str) -> None:
    stacks = tuple(layer.stacks[name] for layer in layers(base, bias=True))
    assert isinstance(stacks[0], FP8Stack)
    forward = [s.forward(x) for s, x in zip(stacks, inputs_of(stacks, 40, "input"), strict=True)]
    assert 0 < relative_rms(forward[0][0], forward[1][0]) < tolerance.E4M3_PRODUCT
    torch.testing.assert_close(forward[0][1], forward[1][1], **tolerance.FP64_SAME_MATHS)
    rooms = zip(stacks, inputs_of(stacks, 40, "output_gradient"), strict=True)
    spread = [s.spread(dy) for s, dy in rooms]
    torch.testing.assert_close(*spread, **tolerance.FP64_SAME_MATHS)
    dx = [s.input_gradient(dy) for s, dy in zip(stacks, spread, strict=True)]
    assert 0 < relative_rms(*dx) < tolerance.E4M3_PRODUCT


@pytest.mark.parametrize("dropped", [False, True])
def test_what_lora_adds_is_not_cast(dropped: bool) -> None:
    layer, _ = layers(Linear4bit)
    stack = layer.gate_up
    (x,) = inputs_of((stack,), 9, "input")
    masks: Any = None
    if dropped:
        masks = [1.25 * (randn(9, stack.K, seed=s, dtype=torch.float64) > 0) for s in (5, 6)]
    with_lora, low = stack.forward(x, masks)
    (dy,) = inputs_of((stack,), 9, "output_gradient")
    v = stack.spread(dy)[:, stack.N :].clone()
    dx = stack.input_gradient(dy, masks)
    sB, A = stack.sB.clone(), stack.A.clone()
    stack.sB.zero_(), stack.A.zero_(), dy[:, stack.N :].zero_()
    torch.testing.assert_close(
        with_lora - stack.forward(x, masks)[0], low @ sB.T, **tolerance.FP64_SAME_MATHS
    )
    expected = v @ A
    if dropped:
        parts = zip(stack.slots, masks, strict=True)
        expected = sum(v[:, slot.ranks] @ A[slot.ranks] * mask for slot, mask in parts)
    torch.testing.assert_close(dx - stack.input_gradient(dy), expected, **tolerance.FP64_SAME_MATHS)


def test_parts_of_a_product_are_those_of_the_whole() -> None:
    layer, _ = layers(Linear4bit, bias=True)
    stack = layer.gate_up
    (x,) = inputs_of((stack,), 9, "input")
    whole, _ = stack.forward(x)
    room = torch.full((9, stack.N + 5), 7.0, dtype=torch.float64)
    y, _ = stack.forward(x, out=room[:, : stack.N])
    assert torch.equal(y, whole) and y.data_ptr() == room.data_ptr()
    assert (room[:, stack.N :] == 7).all()
    for member, slot in enumerate(stack.slots):
        part, _ = stack.forward(x, out=room[:, slot.rows], member=member)
        torch.testing.assert_close(part, whole[:, slot.rows], **tolerance.FP64_SAME_MATHS)
    add = randn(9, stack.N, dtype=torch.float64)
    torch.testing.assert_close(
        stack.forward(x, add=add)[0], whole + add, **tolerance.FP64_SAME_MATHS
    )


def test_a_product_is_that_of_the_numbers_it_is_given() -> None:
    x, w, bias = randn(7, 48), randn(32, 48, seed=1), randn(32, seed=2)
    (x8, xs), (w8, ws) = fp8_cast(x), fp8_cast(w)
    expected = (xs[:, None] * x8.float()) @ (ws[:, None] * w8.float()).T
    actual = fp8_product(x8, xs, w8, ws, torch.float32)
    torch.testing.assert_close(actual, expected, **tolerance.FP32_CHAIN)
    biased = fp8_product(x8, xs, w8, ws, torch.float32, bias)
    torch.testing.assert_close(biased, expected + bias, **tolerance.FP32_CHAIN)


@pytest.mark.parametrize("base", BASES)
def test_a_weight_is_cast_by_output_and_by_input(base: type[Projection]) -> None:
    block = build(SIZES, base=base, dtype=torch.float32)
    members = [block.self_attn.q_proj, block.self_attn.k_proj]
    with mock.patch.object(fp8, "TURNED_COLUMNS", 48), nan_poisoned_empty():
        weight = FP8Weight.of(members, torch.float32)
    dense = torch.cat([dense_weight(m.base, torch.float32).detach() for m in members])
    for numbers, scales, of in (
        (weight.rows, weight.row_scales, dense),
        (weight.turned, weight.turned_scales, dense.T),
    ):
        expected = fp8_cast(of)
        assert torch.equal(numbers.float(), expected[0].float()) and numbers.is_contiguous()
        assert torch.equal(scales, expected[1])


def run_in_fp8(
    block: Block, hidden: Tensor, context: BlockContext, workspace: Workspace | None = None
) -> dict[str, Tensor]:
    workspace = workspace or Workspace("fp8")
    return run_both_ways(lambda *a: twin.block(*a, workspace), block, hidden, context)


def assert_close_to_truth(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert relative_rms(actual.pop("out"), truth["out"]) < tolerance.E4M3_LAYER
    assert relative_rms(actual.pop("hidden"), truth["hidden"]) < tolerance.E4M3_LAYER_GRADIENT
    for name, ours in actual.items():
        assert cosine(ours, truth[name]) > tolerance.E4M3_GRADIENT_COSINE, name
        assert relative_rms(ours, truth[name]) < tolerance.E4M3_LAYER_GRADIENT, name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("layout", ["plain", "documents", "window"])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_is_close_to_the_exact_one(
    base: type[Projection], layout: str, dropout: float
) -> None:
    block = build(SIZES, ALL, base, torch.float32, bias=True, dropout=dropout, rank=8)
    hidden, context = hidden_of(SIZES, 40), context_of(SIZES, 40, torch.float32, layout)
    truth = run_both_ways(twin.block, block, hidden, context)
    with nan_poisoned_empty():
        actual = run_in_fp8(block, hidden, context)
    assert len(actual) == 2 * len(ALL) + 2
    assert_close_to_truth(actual, truth)


def test_a_layer_gives_the_same_bits_again() -> None:
    block = build(SIZES, base=Linear4bit, dtype=torch.float32)
    hidden, context = hidden_of(SIZES, 20), context_of(SIZES, 20, torch.float32)
    first, again = (run_in_fp8(block, hidden, context) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


TILED = replace(POLICIES["P3"], tile_tokens=5)


@pytest.mark.parametrize("keep", [*POLICIES.values(), TILED], ids=[*POLICIES, "tiled"])
def test_keeping_less_casts_the_same_numbers_again(keep: Keep) -> None:
    block = build(SIZES, base=Linear4bit, bias=True, dropout=0.4)
    hidden = hidden_of(SIZES, 9, dtype=torch.float64)
    context = context_of(SIZES, 9, torch.float64, "documents")
    expected = run_in_fp8(block, hidden, context)
    context.keep = keep
    with nan_poisoned_empty():
        actual = run_in_fp8(block, hidden, context)
    for name, theirs in expected.items():
        torch.testing.assert_close(actual[name], theirs, **tolerance.FP64_SAME_MATHS)


def test_the_base_is_cast_again_only_if_it_changed() -> None:
    block, workspace = build(SIZES, dtype=torch.float32), Workspace("fp8")
    hidden, context = hidden_of(SIZES, 9), context_of(SIZES, 9, torch.float32)
    with mock.patch.object(FP8Weight, "of", side_effect=FP8Weight.of) as spy:

        def casts() -> int:
            before = spy.call_count
            run_in_fp8(block, hidden, context, workspace)
            return spy.call_count - before

        assert (casts(), casts()) == (4, 0)
        for module in block.modules():
            if isinstance(module, Projection):
                module.lora_enabled = False
        with torch.no_grad():
            twin.block(block, hidden, context, workspace)
        assert spy.call_count == 4
        for module in block.modules():
            if isinstance(module, Projection):
                module.lora_enabled = True
        assert casts() == 0
        with torch.no_grad():
            block.mlp.up_proj.weight.mul_(2)
        assert casts() == 1
        down = block.mlp.down_proj
        down.weight.data = 2 * down.weight.data
        assert casts() == 1
        workspace.clear()
        assert casts() == 4


def test_a_stored_matrix_stays_where_and_what_it_is() -> None:
    block = build(SIZES, dtype=torch.bfloat16)
    before = {name: (p.data_ptr(), p.clone()) for name, p in block.named_parameters()}
    context = context_of(SIZES, 9, torch.bfloat16)
    run_in_fp8(block, hidden_of(SIZES, 9, dtype=torch.bfloat16), context)
    for name, parameter in block.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, value)


def test_what_cannot_be_cast_is_refused() -> None:
    def run(block: Block, sizes: dict[str, int], keep: Keep) -> None:
        context = context_of(sizes, 9, torch.float32)
        context.keep = keep
        twin.block(block, hidden_of(sizes, 9), context, Workspace("fp8"))

    with pytest.raises(
        KernelUnavailable, match="multiples of 16; gate_up has 32 inputs and 33, 33 outputs"
    ):
        odd = SMALL | {"hidden_size": 32}
        run(build(odd, dtype=torch.float32), odd, Keep())
    with pytest.raises(KernelUnavailable, match="nothing unpacked"):
        run(build(SIZES, base=Linear4bit, dtype=torch.float32), SIZES, Keep(resident=True))
    block = build(SIZES, dtype=torch.float32)
    v_proj = block.self_attn.v_proj
    v_proj.attach_lora(4, 1.0, 0.0, torch.device("cpu"), use_dora=True)
    with pytest.raises(KernelUnavailable, match="DoRA"):
        run(block, SIZES, Keep())


def test_gpus_without_the_instructions_are_refused() -> None:
    device = torch.device("cuda")
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 6)) as capability,
        mock.patch("torch.cuda.get_device_name", return_value="A card"),
    ):
        with pytest.raises(KernelUnavailable, match="8.9 or above .* A card has 8.6"):
            require_fp8(device, torch.bfloat16)
        for enough in ((8, 9), (9, 0), (12, 0)):
            capability.return_value = enough
            require_fp8(device, torch.bfloat16)
            with pytest.raises(KernelUnavailable, match="float16"):
                require_fp8(device, torch.float16)
    with pytest.raises(KernelUnavailable, match="mps"):
        require_fp8(torch.device("mps"), torch.bfloat16)
    require_fp8(torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("fast_sum", [False, True])
@pytest.mark.parametrize("shape", [(129, 512, 1024), (1, 64, 48), (2048, 4096, 1536)])
def test_product_on_a_gpu_is_the_emulated_one(shape: tuple[int, int, int], fast_sum: bool) -> None:
    num_rows, num_inputs, num_outputs = shape
    x = randn(num_rows, num_inputs, dtype=torch.bfloat16, device="cuda")
    w = randn(num_outputs, num_inputs, seed=1, dtype=torch.bfloat16, device="cuda")
    bias = randn(num_outputs, seed=2, dtype=torch.bfloat16, device="cuda")
    (x8, xs), (w8, ws) = fp8_cast(x), fp8_cast(w)
    part = slice(16, None)
    for arguments in ((w8, ws, None), (w8, ws, bias), (w8[part], ws[part], bias[part])):
        weight, scales, own_bias = arguments
        actual = fp8_product(x8, xs, weight, scales, torch.bfloat16, own_bias, fast_sum)
        on_cpu = [a if a is None else a.cpu() for a in (weight, scales, own_bias)]
        dtype = torch.float32
        expected = fp8_product(x8.cpu(), xs.cpu(), *on_cpu[:2], dtype, on_cpu[2], fast_sum)
        assert actual.dtype == torch.bfloat16
        assert relative_rms(actual.cpu(), expected) < tolerance.FP8_SUMS


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [POLICIES["P1"], POLICIES["P6"]], ids=["P1", "P6"])
@pytest.mark.parametrize("layout", ["plain", "documents"])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_on_a_gpu_is_close_to_the_truth(
    base: type[Projection], layout: str, keep: Keep
) -> None:
    def results(dtype: torch.dtype, compute: Any) -> dict[str, Tensor]:
        block = build(REAL, ALL, base, torch.bfloat16, "cuda", bias=True, rank=16)
        if dtype != torch.bfloat16:
            block.to(dtype)
        hidden = hidden_of(REAL, 200, dtype=torch.bfloat16, device="cuda").to(dtype)
        context = context_of(REAL, 200, torch.bfloat16, layout, "cuda")
        assert context.cos is not None and context.sin is not None
        context.cos, context.sin, context.keep = context.cos.to(dtype), context.sin.to(dtype), keep
        workspace = Workspace(compute)
        return run_both_ways(lambda *a: twin.block(*a, workspace), block, hidden, context)

    with nan_poisoned_empty():
        actual = results(torch.bfloat16, "fp8")
    assert_close_to_truth(actual, results(torch.float32, None))
