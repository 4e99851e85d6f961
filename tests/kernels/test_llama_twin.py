"""The fused Llama block against the model file: derivation, equality, what it saves and skips."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sloth.errors import KernelUnavailable
from sloth.kernels import halves
from sloth.kernels import llama as twin
from sloth.kernels.context import POLICIES, BlockContext, Keep
from sloth.kernels.dispatch import REFERENCE
from sloth.kernels.ops.attention import AttentionLayout
from sloth.kernels.stacked import Stack
from sloth.linear import Linear, OpModule, Projection
from sloth.models.cache import LayerCache
from sloth.models.llama import Block, LlamaConfig
from sloth.quant.linear4bit import Linear4bit
from tests import tolerance
from tests.kernels.common import assert_no_worse_than_eager, nan_poisoned_empty, randn

# head_dim is no hidden_size / num_attention_heads, and two query heads share a kv head
TINY = {"hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}
TINY |= {"intermediate_size": 7}
SMALL = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"intermediate_size": 33}
REAL = {"hidden_size": 576, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
REAL |= {"intermediate_size": 1536}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("v_proj", "gate_proj")
RANK, SCALE = 2, 1.5
BATCH = 2


def build(
    sizes: dict[str, int],
    targets: tuple[str, ...] = ALL,
    base: type[Projection] = Linear,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    bias: bool = False,
    dropout: float = 0.0,
    rank: int = RANK,
) -> Block:
    """A block with random weights, the same in every dtype, base frozen, LoRA on `targets`."""
    config = LlamaConfig.from_hf(
        {"vocab_size": 5, "num_hidden_layers": 1, "attention_bias": bias, "mlp_bias": bias, **sizes}
    )
    block = Block(config, "layer", lambda path, n_in, n_out, b: base(n_in, n_out, b))
    # NF4's own scales stay fp32 in every dtype
    for module in block.modules():
        if not isinstance(module, Linear4bit):
            module.to(dtype)
    block.to(device).requires_grad_(False)
    for seed, (name, module) in enumerate(block.named_modules()):
        if isinstance(module, Projection):
            shape = module.out_features, module.in_features
            dense = (randn(*shape, seed=seed) * shape[1] ** -0.5).to(device)
            if isinstance(module, Linear4bit):
                module.quantize_(dense)
            else:
                module.weight.copy_(dense)
            if module.bias is not None:
                module.bias.data = randn(shape[0], seed=50 + seed, dtype=dtype, device=device)
            if name.rpartition(".")[2] in targets:
                module.attach_lora(rank, SCALE, dropout, torch.device(device))
                assert module.lora_A is not None and module.lora_B is not None
                A, B = module.lora_A.weight, module.lora_B.weight
                A.data = (randn(*A.shape, seed=100 + seed) * shape[1] ** -0.5).to(device)
                B.data = (randn(*B.shape, seed=200 + seed) * 0.3).to(device)
                if dtype == torch.float64:
                    module.lora_A.double(), module.lora_B.double()
        elif name.endswith("layernorm"):
            module.weight.copy_(1 + 0.2 * randn(*module.weight.shape, seed=seed))
    return block


def context_of(
    sizes: dict[str, int],
    num_tokens: int,
    dtype: torch.dtype,
    layout: str = "plain",
    device: str = "cpu",
) -> BlockContext:
    angles = randn(1, num_tokens, sizes["head_dim"] // 2, seed=7, device=device).repeat(1, 1, 2)
    at = torch.arange(num_tokens, device=device)
    first = torch.stack((at // 3, at // max(num_tokens // 2, 1)))
    layouts = {
        "plain": AttentionLayout(),
        "documents": AttentionLayout(first, first),
        "window": AttentionLayout(window=2),
    }
    return BlockContext(angles.cos().to(dtype), angles.sin().to(dtype), layouts[layout])


def hidden_of(sizes: dict[str, int], num_tokens: int, **keywords: Any) -> Tensor:
    return randn(BATCH, num_tokens, sizes["hidden_size"], **keywords)


def plain(block: Block, hidden: Tensor, context: BlockContext) -> Tensor:
    """The model file at the reference level: eager formulas and autograd."""
    for module in block.modules():
        if isinstance(module, OpModule):
            module.ops = REFERENCE
    return block(hidden, context)


Run = Callable[[Block, Tensor, BlockContext], Tensor]


def run_both_ways(
    run: Run, block: Block, hidden: Tensor, context: BlockContext, needs_dhidden: bool = True
) -> dict[str, Tensor]:
    """Output and every gradient, by name."""
    hidden = hidden.detach().requires_grad_(needs_dhidden)
    leaves = {n: p for n, p in block.named_parameters() if p.requires_grad}
    leaves |= {"hidden": hidden} if needs_dhidden else {}
    torch.manual_seed(0)
    out = run(block, hidden, context)
    upstream = randn(*out.shape, seed=99, dtype=out.dtype, device=out.device)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_equal_to_plain(block: Block, hidden: Tensor, context: BlockContext) -> None:
    with nan_poisoned_empty():
        actual = run_both_ways(twin.block, block, hidden, context)
    expected = run_both_ways(plain, block, hidden, context)
    for name, theirs in expected.items():
        torch.testing.assert_close(
            actual[name],
            theirs,
            **tolerance.FP64_SAME_MATHS,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize(
    ("base", "targets", "layout", "dropout"),
    [
        (Linear, ALL, "plain", 0.0),
        (Linear, ("q_proj", "down_proj"), "documents", 0.4),
        (Linear4bit, ("k_proj", "o_proj"), "window", 0.0),
        (Linear4bit, SOME, "documents", 0.0),
        (Linear4bit, (), "plain", 0.0),
    ],
)
def test_twin_gradcheck(
    base: type[Projection], targets: tuple[str, ...], layout: str, dropout: float
) -> None:
    num_tokens = 3
    block = build(TINY, targets, base, bias=base is Linear, dropout=dropout)
    context = context_of(TINY, num_tokens, torch.float64, layout)
    hidden = hidden_of(TINY, num_tokens, dtype=torch.float64).requires_grad_()
    factors = [p for p in block.parameters() if p.requires_grad]
    assert len(factors) == 2 * len(targets)

    def run(hidden: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(0)
        return twin.block(block, hidden, context)

    # gradcheck moves the factors in place, where the block reads them
    assert torch.autograd.gradcheck(run, (hidden, *factors))


@pytest.mark.parametrize("layout", ["plain", "documents", "window"])
@pytest.mark.parametrize("targets", [ALL, SOME, ()])
@pytest.mark.parametrize("base", [Linear, Linear4bit])
def test_twin_equals_the_model_file(
    base: type[Projection], targets: tuple[str, ...], layout: str
) -> None:
    block = build(SMALL, targets, base, bias=True)
    context = context_of(SMALL, 9, torch.float64, layout)
    assert_equal_to_plain(block, hidden_of(SMALL, 9, dtype=torch.float64), context)


def test_twin_drops_what_the_model_file_drops() -> None:
    hidden, context = hidden_of(SMALL, 9, dtype=torch.float64), context_of(SMALL, 9, torch.float64)
    block = build(SMALL, dropout=0.4)
    assert_equal_to_plain(block, hidden, context)
    in_training = run_both_ways(twin.block, block, hidden, context)["out"]
    block.eval()
    assert_equal_to_plain(block, hidden, context)
    assert not torch.equal(run_both_ways(twin.block, block, hidden, context)["out"], in_training)


def test_twin_reads_any_strides() -> None:
    wide = hidden_of(SMALL, 18, dtype=torch.float64)
    context = context_of(SMALL, 9, torch.float64)
    assert_equal_to_plain(build(SMALL), wide[:, ::2], context)
    assert_equal_to_plain(
        build(SMALL), wide[:, :9].transpose(0, 1).contiguous().transpose(0, 1), context
    )


def test_twin_keeps_documents_apart() -> None:
    block, context = (
        build(SMALL, dtype=torch.float32),
        context_of(SMALL, 9, torch.float32, "documents"),
    )
    hidden = hidden_of(SMALL, 9)
    changed = hidden.clone()
    changed[0, 3:6] += 5.0
    before, after = (run_both_ways(twin.block, block, x, context) for x in (hidden, changed))
    for name in ("out", "hidden"):
        old, new = before[name], after[name]
        assert torch.equal(old[0, :3], new[0, :3]) and torch.equal(old[0, 6:], new[0, 6:])
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0, 3:6], new[0, 3:6])


BACKWARD = (
    (halves, "glu_lora_bwd"),
    (twin, "rms_norm_bwd"),
    (halves, "attention_bwd"),
    (halves, "rope_bwd"),
)


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        ("down_proj", (0, 0, 0, 0)),
        ("gate_proj", (1, 0, 0, 0)),
        ("o_proj", (1, 1, 0, 0)),
        ("k_proj", (1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("policy", ["P1", "P6"])
def test_backward_stops_where_nothing_earlier_wants_a_gradient(
    target: str, calls: tuple[int, ...], policy: str
) -> None:
    block, context = build(SMALL, (target,)), context_of(SMALL, 9, torch.float64)
    context.keep = POLICIES[policy]
    hidden = hidden_of(SMALL, 9, dtype=torch.float64)
    full = run_both_ways(twin.block, block, hidden, context)
    with ExitStack() as stack:
        spies = [
            stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
            for module, name in BACKWARD
        ]
        partial = run_both_ways(twin.block, block, hidden, context, needs_dhidden=False)
    assert tuple(spy.call_count for spy in spies) == calls
    assert len(partial) == 3  # out, dA, dB
    for name, ours in partial.items():
        torch.testing.assert_close(ours, full[name], **tolerance.FP64_SAME_MATHS)


TILED = replace(POLICIES["P3"], tile_tokens=5)


@pytest.mark.parametrize("keep", [*POLICIES.values(), TILED], ids=[*POLICIES, "tiled"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_policy_gives_the_same_gradients(keep: Keep, dropout: float) -> None:
    block = build(SMALL, base=Linear4bit, bias=True, dropout=dropout)
    context = context_of(SMALL, 9, torch.float64, "documents")
    hidden = hidden_of(SMALL, 9, dtype=torch.float64)
    expected = run_both_ways(twin.block, block, hidden, context)
    context.keep = keep
    with nan_poisoned_empty():
        actual = run_both_ways(twin.block, block, hidden, context)
    for name, theirs in expected.items():
        torch.testing.assert_close(actual[name], theirs, **tolerance.FP64_SAME_MATHS)


def test_down_proj_is_never_computed_twice() -> None:
    block, context = build(SMALL), context_of(SMALL, 9, torch.float64)
    context.keep = POLICIES["P1"]
    with mock.patch.object(Stack, "forward", autospec=True, side_effect=Stack.forward) as spy:
        run_both_ways(twin.block, block, hidden_of(SMALL, 9, dtype=torch.float64), context)
    runs = [call.args[0].K for call in spy.call_args_list]
    assert runs.count(SMALL["intermediate_size"]) == 1 and len(runs) == 7


def test_single_factors_may_be_frozen() -> None:
    block, context = build(SMALL), context_of(SMALL, 9, torch.float64)
    block.self_attn.q_proj.lora_A.requires_grad_(False)
    block.mlp.up_proj.lora_B.requires_grad_(False)
    assert_equal_to_plain(block, hidden_of(SMALL, 9, dtype=torch.float64), context)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("base", [Linear, Linear4bit])
def test_twin_saves_what_its_policy_says(base: type[Projection], policy: str) -> None:
    num_tokens = 40
    block, context = build(SMALL, SOME, base), context_of(SMALL, num_tokens, torch.float64)
    context.keep = keep = POLICIES[policy]
    factors = {p.data_ptr() for p in block.parameters() if p.requires_grad}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in factors:  # by storage: a view keeps all of it
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    hidden = hidden_of(SMALL, num_tokens, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        twin.block(block, hidden, context)
    width = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["head_dim"]
    model, ffn = width[0], width[1]
    queries, keys = (SMALL[f"num_{kind}_heads"] * width[2] for kind in ("attention", "key_value"))
    a_token = model + 2 * 64 + 2  # x, X A^T of two stacks, rstd of two norms
    a_token += queries * keep.attention + model * keep.hidden
    a_token += (queries + 2 * keys) * keep.qkv + ffn * (keep.gate + keep.up)
    assert sum(sizes.values()) == BATCH * num_tokens * a_token


def test_backward_may_run_twice() -> None:
    block, context = build(SMALL), context_of(SMALL, 9, torch.float64, "documents")
    leaves = [p for p in block.parameters() if p.requires_grad]
    out = twin.block(block, hidden_of(SMALL, 9, dtype=torch.float64), context)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_twin_runs_without_grad() -> None:
    block, context = build(SMALL), context_of(SMALL, 9, torch.float64)
    hidden = hidden_of(SMALL, 9, dtype=torch.float64)
    expected = run_both_ways(twin.block, block, hidden, context)["out"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(twin.block(block, hidden, context), expected)


@pytest.mark.parametrize(
    "name", ["mlp.up_proj.weight", "self_attn.k_proj.bias", "post_attention_layernorm.weight"]
)
def test_trainable_base_is_refused(name: str) -> None:
    block = build(SMALL, bias=True)
    block.get_parameter(name).requires_grad_()
    last = ".".join(name.split(".")[-2:])
    with pytest.raises(KernelUnavailable, match=last):
        twin.block(block, hidden_of(SMALL, 9), context_of(SMALL, 9, torch.float32))


def test_a_cache_is_refused() -> None:
    context = context_of(SMALL, 9, torch.float64)
    context.cache = LayerCache(9)
    with pytest.raises(KernelUnavailable, match="cache"):
        twin.block(build(SMALL), hidden_of(SMALL, 9, dtype=torch.float64), context)


def assert_as_accurate_as_the_model_file(
    sizes: dict[str, int],
    num_tokens: int,
    dtype: torch.dtype,
    base: type[Projection],
    layout: str,
    device: str,
    rank: int,
) -> None:
    """Output and gradients against the model file in fp64, within its own error in `dtype`."""
    hidden = hidden_of(sizes, num_tokens, dtype=dtype, device=device)
    context = context_of(sizes, num_tokens, dtype, layout, device)
    assert context.cos is not None and context.sin is not None
    wide_context = BlockContext(context.cos.double(), context.sin.double(), context.layout)

    def block_of(wanted: torch.dtype, lora: torch.dtype) -> Block:
        block = build(sizes, ALL, base, dtype, device, rank=rank)
        for name, module in block.named_modules():
            # the values that `dtype` holds, in the wanted one; NF4 codes are the same in both
            if "lora" in name:
                module.to(lora)
            elif not isinstance(module, Linear4bit) and "norm" in name or type(module) is Linear:
                for tensor in module.parameters(recurse=False):
                    tensor.data = tensor.data.to(wanted)
        return block

    actual = run_both_ways(twin.block, block_of(dtype, torch.float32), hidden, context)
    # eager 16-bit training runs LoRA in 16 bits too
    eager = run_both_ways(plain, block_of(dtype, dtype), hidden, context)
    wide = torch.float64
    truth = run_both_ways(plain, block_of(wide, wide), hidden.double(), wide_context)
    for name, true in truth.items():
        theirs = eager[name].to(actual[name].dtype)
        factor = tolerance.kernel_error_factor(dtype)
        assert_no_worse_than_eager(name, actual[name], theirs, true, factor)


@pytest.mark.parametrize("layout", ["plain", "documents"])
@pytest.mark.parametrize("base", [Linear, Linear4bit])
def test_twin_fp32_accuracy_on_a_cpu(base: type[Projection], layout: str) -> None:
    assert_as_accurate_as_the_model_file(SMALL, 20, torch.float32, base, layout, "cpu", RANK)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["plain", "documents"])
@pytest.mark.parametrize("base", [Linear, Linear4bit])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_twin_gpu_accuracy(dtype: torch.dtype, base: type[Projection], layout: str) -> None:
    assert_as_accurate_as_the_model_file(REAL, 129, dtype, base, layout, "cuda", 16)
