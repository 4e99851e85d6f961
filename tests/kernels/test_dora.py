"""DoRA: norms without the adapted matrix, gains, the magnitudes' gradient; as an op, in a twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sloth.kernels import llama as twin
from sloth.kernels.context import POLICIES, Keep
from sloth.kernels.layer import Workspace
from sloth.kernels.ops.dora import (
    Magnitude,
    adapted_norms,
    column_dots,
    gains_of,
    magnitude_gradient,
    squared_row_norms,
)
from sloth.kernels.ops.lora_linear import LoraOperands, lora_linear, lora_linear_reference
from sloth.kernels.ops.nf4 import nf4_dequantize
from sloth.linear import Linear, Projection
from sloth.models.llama import Block
from sloth.quant.linear4bit import Linear4bit
from sloth.quant.nf4 import quantize_nf4
from tests import tolerance
from tests.kernels.common import (
    assert_gradcheck,
    assert_only_needed_gradients,
    assert_same_as_reference,
    nan_poisoned_empty,
    non_contiguous,
    randn,
)
from tests.kernels.test_llama_twin import (
    ALL,
    SMALL,
    SOME,
    TILED,
    TINY,
    build,
    context_of,
    hidden_of,
    plain,
    run_both_ways,
)

IN, OUT, RANK, SCALE = 11, 7, 3, 1.7
KEEPS = {**{name: POLICIES[name] for name in ("P1", "P5", "P6")}, "tiled": TILED}


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, b, A, B, m."""
    shapes = (2, 3, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK), (OUT,)
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def norms_of(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The definition: row norms of the whole matrix."""
    return (weight + SCALE * B @ A).norm(dim=1)


def adapter(W: Tensor, A: Tensor, B: Tensor, m: Tensor, held: bool = False) -> LoraOperands:
    if held:
        return LoraOperands(A, B, SCALE, magnitude=Magnitude(m, None, norms_of(W, A, B).detach()))
    return LoraOperands(A, B, SCALE, magnitude=Magnitude(m, squared_row_norms(W, W.dtype)))


def test_norms_equal_those_of_the_whole_matrix() -> None:
    _, W, _, A, B, _ = operands()
    norms = adapted_norms(W, A, SCALE * B, squared_row_norms(W, W.dtype))
    torch.testing.assert_close(norms, norms_of(W, A, B), **tolerance.FP64_SAME_MATHS)


def test_norms_in_fp32_are_exact_to_its_rounding() -> None:
    W, A, B = randn(40, 300), randn(8, 300, seed=1), randn(40, 8, seed=2)
    norms = adapted_norms(W, A, SCALE * B, squared_row_norms(W, torch.float32))
    truth = norms_of(W.double(), A.double(), B.double())
    torch.testing.assert_close(norms.double(), truth, **tolerance.FP32_SAME_MATHS)


def test_norms_of_codes_are_those_of_the_unpacked_matrix() -> None:
    codes = quantize_nf4(randn(20, 64))
    expected = nf4_dequantize(codes, torch.float64).square().sum(1)
    actual = squared_row_norms(codes, torch.float64)
    torch.testing.assert_close(actual, expected, **tolerance.FP64_SAME_MATHS)


def test_blocks_of_several_matrices_stand_in_one_call() -> None:
    _, W, _, A, B, _ = operands()
    W2, A2, B2 = randn(5, IN, seed=20), randn(2, IN, seed=21), randn(5, 2, seed=22)
    W2, A2, B2 = W2.double(), A2.double(), B2.double()
    both = torch.cat((W, W2))
    norms = adapted_norms(
        both,
        torch.cat((A, A2)),
        SCALE * torch.block_diag(B, B2),
        squared_row_norms(both, torch.float64),
    )
    expected = torch.cat((norms_of(W, A, B), norms_of(W2, A2, B2)))
    torch.testing.assert_close(norms, expected, **tolerance.FP64_SAME_MATHS)


def test_rows_of_zeros_have_gain_zero_and_no_nan() -> None:
    m, norms = torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 0.0, 0.0])
    assert gains_of(m, norms).tolist() == [0.5, 0.0, 0.0]
    dm = magnitude_gradient(torch.ones(4, 3), torch.zeros(4, 3), None, m)
    assert torch.equal(dm, torch.zeros(3))


def test_column_dots_take_the_bias_away() -> None:
    dy, y, bias = randn(63, 100), randn(63, 100, seed=1), randn(100, seed=2)
    expected = (dy.double() * (y.double() - bias.double())).sum(0)
    for given in (dy, non_contiguous(dy)):
        torch.testing.assert_close(
            column_dots(given, y, bias).double(), expected, **tolerance.FP32_SAME_MATHS
        )


Op = Callable[..., Tensor]


def with_reference(held: bool) -> tuple[Op, Op]:
    def op(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return lora_linear(x, W.detach(), b, adapter(W.detach(), A, B, m, held))

    def reference(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return lora_linear_reference(x, W.detach(), b, adapter(W.detach(), A, B, m, held))

    return op, reference


def test_op_gradcheck_with_the_norms_held() -> None:
    x, W, b, A, B, m = operands()
    norms = norms_of(W, A, B)

    def op(x: Tensor, b: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return lora_linear(x, W, b, LoraOperands(A, B, SCALE, magnitude=Magnitude(m, None, norms)))

    assert_gradcheck(op, [x, b, A, B, m])
    assert_only_needed_gradients(op, [x, b, A, B, m])


@pytest.mark.parametrize("held", [False, True])
def test_op_equals_autograd_of_the_formula(held: bool) -> None:
    op, reference = with_reference(held)
    x, W, b, A, B, m = operands()
    needs = [True, False, True, True, True, True]
    assert_same_as_reference(op, reference, [x, W, b, A, B, m], needs)
    assert_same_as_reference(op, reference, [non_contiguous(x), W, b, A, B, m], needs)


# -- twins -----------------------------------------------------------------------------------------


def with_magnitudes(block: Block, hold: bool = False) -> Block:
    """DoRA on every adapted projection, its magnitudes away from the norms."""
    for seed, module in enumerate(block.modules()):
        if isinstance(module, Projection) and module.lora_A is not None:
            A = module.lora_A.weight
            lengths = module.squared_norms(torch.float64).sqrt().to(A.dtype)
            lengths *= 1 + 0.3 * randn(len(lengths), seed=300 + seed, dtype=A.dtype)
            module.lora_magnitude_vector = torch.nn.Parameter(lengths)
            if hold:
                module.hold_adapter()
    return block


@pytest.mark.parametrize(
    ("base", "targets", "layout", "dropout"),
    [
        (Linear, ALL, "plain", 0.0),
        (Linear, ("q_proj", "down_proj"), "documents", 0.4),
        (Linear4bit, ("k_proj", "o_proj"), "window", 0.0),
    ],
)
def test_twin_gradcheck_with_the_norms_held(
    base: type[Projection], targets: tuple[str, ...], layout: str, dropout: float
) -> None:
    block = build(TINY, targets, base, bias=base is Linear, dropout=dropout)
    with_magnitudes(block, hold=True)
    context = context_of(TINY, 3, torch.float64, layout)
    hidden = hidden_of(TINY, 3, dtype=torch.float64).requires_grad_()
    factors = [p for p in block.parameters() if p.requires_grad]
    assert len(factors) == 3 * len(targets)

    def run(hidden: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(0)
        return twin.block(block, hidden, context)

    # along random directions: every entry by itself stands in the op's own test
    assert torch.autograd.gradcheck(run, (hidden, *factors), fast_mode=True)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("targets", [ALL, SOME, ("q_proj", "down_proj")])
@pytest.mark.parametrize("base", [Linear, Linear4bit])
def test_twin_equals_the_model_file(
    base: type[Projection], targets: tuple[str, ...], keep: Keep
) -> None:
    block = with_magnitudes(build(SMALL, targets, base, bias=True))
    context = context_of(SMALL, 9, torch.float64, "documents")
    context.keep = keep
    hidden = hidden_of(SMALL, 9, dtype=torch.float64)
    with nan_poisoned_empty():
        actual = run_both_ways(twin.block, block, hidden, context)
    expected = run_both_ways(plain, block, hidden, context)
    assert len(expected) == 2 + 3 * len(targets)
    for name, theirs in expected.items():
        torch.testing.assert_close(
            actual[name],
            theirs,
            **tolerance.FP64_SAME_MATHS,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_twin_follows_factors_that_move_and_magnitudes_switched_off() -> None:
    block = with_magnitudes(build(SMALL, base=Linear))
    context = context_of(SMALL, 9, torch.float64)
    hidden = hidden_of(SMALL, 9, dtype=torch.float64)
    with torch.no_grad():
        first = twin.block(block, hidden, context)
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
        moved = twin.block(block, hidden, context)
        torch.testing.assert_close(
            moved, plain(block, hidden, context), **tolerance.FP64_SAME_MATHS
        )
        for module in block.modules():
            if isinstance(module, Projection):
                module.lora_enabled = False
        base = twin.block(block, hidden, context)
        torch.testing.assert_close(base, plain(block, hidden, context), **tolerance.FP64_SAME_MATHS)
    assert not torch.allclose(first, moved) and not torch.allclose(first, base)


def test_squared_norms_follow_a_base_that_is_written_in_place() -> None:
    module = Linear(IN, OUT)
    for factor in (1.0, 2.0):
        with torch.no_grad():
            module.weight.copy_(factor * randn(OUT, IN))
        expected = module.weight.detach().square().sum(1)
        actual = module.squared_norms(torch.float32)
        torch.testing.assert_close(actual, expected, **tolerance.FP32_SAME_MATHS)
    first = module.squared_norms(torch.float32)
    assert module.squared_norms(torch.float32) is first


@pytest.mark.parametrize("targets", [ALL, SOME])
def test_a_layer_with_dora_stays_unpacked_from_its_forward_to_its_backward(
    targets: tuple[str, ...],
) -> None:
    """Bit-equal to one unpacked twice, with other forwards between: of other layers, of the same
    one without its adapter and with it."""
    found = []
    for resident in (False, True):
        workspace = Workspace()
        blocks = [with_magnitudes(build(SMALL, targets, Linear4bit)) for _ in range(2)]
        context = context_of(SMALL, 9, torch.float64)
        context.keep = Keep(resident=resident)
        hidden = hidden_of(SMALL, 9, dtype=torch.float64)
        results, held = [], set()
        for _ in range(2):
            out = hidden
            for block in blocks:
                out = twin.block(block, out, context, workspace)
            with torch.no_grad():
                modules = [m for block in blocks for m in block.modules()]
                projections = [m for m in modules if isinstance(m, Projection)]
                for enabled in (False, True):
                    for module in projections:
                        module.lora_enabled = enabled
                    results.append(twin.block(blocks[1], hidden, context, workspace))
            wanted = [p for block in blocks for p in block.parameters() if p.requires_grad]
            results += [out, *torch.autograd.grad(out.sum(), wanted)]
            held.add(workspace.num_bytes)
            with torch.no_grad():
                for parameter in wanted:
                    parameter.mul_(1.1)
        assert len(held) == 1
        found.append((results, held.pop()))
    (twice, shared), (once, kept) = found
    for ours, theirs in zip(once, twice, strict=True):
        assert torch.equal(ours, theirs)
    # Two layers, and what stacks with gains are unpacked into in another state of them.
    assert 2 * shared < kept <= 3 * shared
