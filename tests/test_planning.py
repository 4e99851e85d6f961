"""Plans: what they choose, that they change no gradient, and that their predictions hold."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sloth
from sloth.errors import BudgetTooSmall, KernelUnavailable
from sloth.kernels.context import POLICIES, Keep
from sloth.kernels.fp8 import BaseCompute
from sloth.kernels.layer import FusedLayer
from sloth.kernels.ops.linear_cross_entropy import CHUNK_BYTES
from sloth.models.llama import LlamaConfig, LlamaDecoder
from sloth.planning import Planner
from sloth.quant.linear4bit import Linear4bit
from sloth.train.memory import (
    FRAGMENTATION,
    HOST_EMBEDDING_SECONDS,
    Plan,
    extra_seconds,
    free_budget_gib,
    make_plan,
)
from sloth.train.network_sizes import NetworkSizes
from sloth.train.step_memory import StepMemory
from tests import tolerance
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised

TOKENS = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(5))
# Llama-3.1-8B with LoRA r=16 on all projections, NF4, bf16.
SIZES_8B = NetworkSizes(
    num_layers=32,
    hidden=4096,
    qkv=6144,
    queries=4096,
    heads=32,
    ffn=14336,
    vocab=128256,
    ranks=(64, 64, 64, 64),
    element=2,
    weights=int(4.49 * 2**30),
    embedding=128256 * 4096 * 2,
    embedding_stays=False,
    quantized=True,
    trainable=41_943_040,
    mlp_rank=16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("planning") / "base", **WHOLE_BLOCKS)


SHAPES = [(1, 2048), (4, 2048), (1, 8192), (1, 32768), (1, 100000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_more_memory_never_costs_time(shape: tuple[int, int]) -> None:
    def extra(plan: Plan) -> float:
        layers = sum(extra_seconds(SIZES_8B, shape[1], keep) for keep in plan.keeps)
        return round(layers + HOST_EMBEDDING_SECONDS * plan.embedding_on_host, 12)

    plans = [make_plan(SIZES_8B, *shape, 7 * 1.03**step) for step in range(82)]
    times = [extra(plan) for plan in plans if plan.fits]
    # But for what is too little to take another plan for.
    assert all(late <= early / 0.97 for early, late in itertools.pairwise(times))
    assert times[0] > 0 and (times[-1] == 0 or shape[1] >= 32768)


@pytest.mark.parametrize("budget", [8.05, 9.0, 12.0, 16.0, 24.0, 36.0])
def test_a_plan_that_fits_is_predicted_to_fit(budget: float) -> None:
    plan = make_plan(SIZES_8B, 4, 2048, budget)
    room = budget * (1 - FRAGMENTATION)
    assert plan.fits and plan.predicted_gib <= room
    assert plan.predicted_gib == pytest.approx(sum(plan.parts.values()))
    # What is left over could not have bought another step up.
    assert plan.predicted_gib > room - 0.75 or all(keep.up for keep in plan.keeps)


def test_later_layers_keep_more() -> None:
    keeps = make_plan(SIZES_8B, 4, 2048, 16.0).keeps
    order = list(POLICIES.values())
    ranks = [order.index(replace(keep, resident=False, offload=False)) for keep in keeps]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


def test_attention_is_kept_first_at_long_contexts() -> None:
    keeps = make_plan(SIZES_8B, 1, 32768, 20.0).keeps
    assert sum(keep.attention for keep in keeps) > sum(keep.gate for keep in keeps)


def test_measures_come_in_the_order_of_their_cost() -> None:
    def measures(budget: float) -> tuple[bool, bool]:
        plan = make_plan(SIZES_8B, 4, 2048, budget)
        return plan.keeps[0].offload, plan.embedding_on_host

    assert measures(60.0) == (False, False)
    assert measures(8.5)[0] and measures(7.1) == (True, True)
    tied = replace(SIZES_8B, embedding_stays=True)
    assert not make_plan(tied, 4, 2048, 7.1).embedding_on_host


def test_large_tiles_leave_room_for_holes_between_tensors() -> None:
    plan = make_plan(SIZES_8B, 1, 32768, 14.2)
    largest = 16384 * (2 * 14336 + 64) * 2 / 2**30
    assert plan.keeps[0].tile_tokens == 16384
    assert plan.predicted_gib <= 14.2 - 1.75 * largest


def test_the_head_takes_what_a_layer_has_room_for() -> None:
    for shape, budget in (((4, 2048), 77.0), ((4, 2048), 8.05), ((1, 32768), 14.2)):
        plan = make_plan(SIZES_8B, *shape, budget)
        memory = StepMemory(SIZES_8B, *shape)
        peak = memory.peak(plan.keeps, plan.embedding_on_host)
        assert plan.head_chunk_bytes is not None
        assert plan.head_chunk_bytes >= (2**29 if budget > 70 else CHUNK_BYTES)
        if plan.keeps[0].recorded:  # the head works beside what the layers hold
            held = memory._worst_of_layers(plan.keeps)[1] + memory.head_bytes(plan.head_chunk_bytes)
            assert memory._worst_moment(plan.keeps)[1] > held
            continue
        kept, working = memory._head_moment(plan.keeps, plan.head_chunk_bytes)
        static = sum(memory.static_parts(plan.keeps, plan.embedding_on_host).values())
        assert static + kept + working <= peak


def plan_everything(model: sloth.Model, keep: Keep) -> None:
    model.network.planner = lambda batch, seq: [keep] * len(model.network.specs)


def gradients(model: sloth.Model, tokens: Tensor) -> dict[str, Tensor]:
    model.network.zero_grad(set_to_none=True)
    model.loss(tokens, tokens).backward()
    found = model.network.named_parameters()
    return {name: p.grad.clone() for name, p in found if p.grad is not None}


VARIANTS = {
    **POLICIES,
    "tiled": replace(POLICIES["P2"], tile_tokens=16),
    "offload": replace(POLICIES["P1"], offload=True),
    "offload_all_else_kept": Keep(offload=True),
    "resident": Keep(resident=True),
}


def assert_keeping_changes_no_gradient(folder: Path, device: str, dtype: str) -> None:
    model = sloth.load(folder, quant="nf4", device=device, dtype=dtype)
    randomised(model.add_lora(sloth.LoraConfig(r=8)))
    plan_everything(model, Keep())
    expected = gradients(model, TOKENS)
    assert len(expected) == 2 * 7 * len(model.network.specs)
    for name, keep in VARIANTS.items():
        plan_everything(model, keep)
        for _ in range(2):  # the second time buffers are used again
            actual = gradients(model, TOKENS)
        for key, value in expected.items():
            torch.testing.assert_close(
                actual[key], value, **tolerance.same_maths(torch.float32), msg=f"{name}: {key}"
            )


def test_keeping_less_changes_no_gradient(folder: Path) -> None:
    assert_keeping_changes_no_gradient(folder, "cpu", "float32")


@pytest.mark.gpu
def test_keeping_less_changes_no_gradient_on_a_gpu(folder: Path) -> None:
    assert_keeping_changes_no_gradient(folder, "cuda", "float32")


def test_plan_of_a_loaded_model(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    free = model.plan(batch=2, seq=40)
    assert free.budget_gib is None and all(keep == Keep() for keep in free.keeps)
    smallest = make_plan(NetworkSizes.of(model.network), 2, 40, 1e-4).predicted_gib
    tight = model.plan(
        batch=2, seq=40, memory_gib=(smallest + free.predicted_gib) / 2 / (1 - FRAGMENTATION)
    )
    assert tight.predicted_gib < free.predicted_gib and tight.keeps != free.keeps
    assert "GiB predicted" in str(tight)
    model.loss(TOKENS, TOKENS).backward()
    with pytest.raises(BudgetTooSmall, match="at least"):
        model.plan(batch=2, seq=40, memory_gib=1e-4)
    with pytest.raises(ValueError, match="at least one row"):
        model.plan(batch=0, seq=40)


def test_what_a_plan_set_is_forgotten_with_it(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    model.loss(TOKENS, TOKENS)
    assert model.network.head_chunk_bytes is not None
    model._planner.forget()
    assert model.network.head_chunk_bytes is None


def test_a_new_shape_is_planned_by_itself(folder: Path, monkeypatch: Any) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    shapes = []
    plan = Planner.plan
    monkeypatch.setattr(
        Planner,
        "plan",
        lambda self, batch, seq: (shapes.append((batch, seq)), plan(self, batch, seq))[1],
    )
    for rows in (TOKENS, TOKENS, TOKENS[:1], TOKENS[:, :30]):
        model.loss(rows, rows)
    assert shapes == [(2, 256), (1, 256)]


def test_evaluation_keeps_nothing_and_changes_no_plan(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    model.plan(batch=2, seq=256, memory_gib=1.0)
    trained = model._planner.keeps(2, 256)
    assert all(keep.resident and keep.up for keep in trained)
    with torch.no_grad():
        for shape in ((2, 256), (64, 4096)):
            keeps = model._planner.keeps(*shape)
            bare = replace(POLICIES["P1"], resident=True)
            assert [replace(keep, tile_tokens=None) for keep in keeps] == [bare] * len(keeps)
    assert model._planner.keeps(2, 256) == trained


def test_shapes_that_take_turns_prepare_each_layer_once(folder: Path, monkeypatch: Any) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    sizes = NetworkSizes.of(model.network)

    def unpacked(seq: int, budget: float) -> int:
        return sum(keep.resident for keep in make_plan(sizes, 2, seq, budget).keeps)

    least = make_plan(sizes, 2, 512, 1e-4).predicted_gib / (1 - FRAGMENTATION)
    budgets = (least * (1 + step / 1000) for step in range(3000))
    budget = next(b for b in budgets if unpacked(256, b) > unpacked(512, b) > 0)
    prepared = []
    prepare = FusedLayer.__init__
    monkeypatch.setattr(
        FusedLayer, "__init__", lambda self, *a: (prepared.append(self), prepare(self, *a))[1]
    )
    model.plan(batch=2, seq=256, memory_gib=budget)
    short, long = (torch.randint(3, 160, (2, length)) for length in (250, 500))
    counts = []
    for tokens in (short, long, short, long, short):
        prepared.clear()
        model.loss(tokens, tokens).backward()
        with torch.no_grad():
            model.loss(tokens[:1], tokens[:1])
        counts.append(len(prepared))
    assert counts[2:] == [0, 0, 0]


def test_an_embedding_that_one_shape_wants_in_host_memory_stays_there(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    roomy = model.plan(batch=1, seq=40)
    assert not model._planner._embedding_on_host
    model._planner._settle(replace(roomy, embedding_on_host=True))
    model._planner.plan(1, 300)
    assert model._planner._embedding_on_host
    model._planner.forget()
    assert not model._planner._embedding_on_host


def test_memory_of_others_in_the_process_is_not_counted_as_free() -> None:
    gib = 2**30
    alone = free_budget_gib(30 * gib, 45 * gib, 5 * gib, None, own=5 * gib)
    beside = free_budget_gib(30 * gib, 45 * gib, 45 * gib, None, own=5 * gib)
    assert alone == pytest.approx(75 * 0.98) and beside == pytest.approx(75 * 0.98 - 40)
    capped = free_budget_gib(30 * gib, 10 * gib, 8 * gib, 12 * gib, own=8 * gib)
    assert capped == pytest.approx(12 * 0.98)


def test_what_is_free_may_not_be_enough_and_is_said(folder: Path, monkeypatch: Any) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    monkeypatch.setattr("sloth.planning.device_budget_gib", lambda device, own: 1e-4)
    with pytest.warns(UserWarning, match="need at least"):
        model.plan(batch=2, seq=40)


def test_sizes_are_those_of_every_layer(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu")
    config = sloth.LoraConfig(r=8, rank_pattern={r"layers\.2\.mlp\.up_proj": 256})
    sizes = NetworkSizes.of(model.add_lora(config).network)
    assert sizes.ranks == (64, 64, 320, 64) and sizes.shapes == (1, 1, 2, 1)
    some = sloth.load(folder, quant="nf4", device="cpu").add_lora(layers=[1, 3])
    assert NetworkSizes.of(some.network).ranks == (64, 64, 64, 64)
    assert NetworkSizes.of(some.network).shapes == (2, 2, 2, 2)


def test_only_the_fused_level_plans(folder: Path) -> None:
    model = sloth.load(folder, device="cpu", level="ops")
    with pytest.raises(KernelUnavailable, match="fused"):
        model.plan(batch=1, seq=8)


def test_embedding_may_wait_in_host_memory(folder: Path) -> None:
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    expected = model.loss(TOKENS, TOKENS)
    weight = model.network.model.embed_tokens.weight
    weight.data = weight.data.to("cpu")
    assert torch.equal(model.loss(TOKENS, TOKENS), expected)


def test_estimate_reads_no_weights_and_agrees_with_the_loaded_model(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    predicted = sloth.estimate(tmp_path, seq=256, batch=2, quant="nf4", dtype="float32")
    model = sloth.load(folder, quant="nf4", device="cpu").add_lora()
    assert predicted.predicted_gib == model.plan(batch=2, seq=256).predicted_gib


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [None, "fp8"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("share", [1.2, 0.8, 0.55])
def test_predicted_peak_is_within_five_percent(
    quantized: bool, share: float, compute: BaseCompute
) -> None:
    config = LlamaConfig.from_hf(
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632}
        | {"num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4}
    )
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved_before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with torch.device("cuda"):
        network = LlamaDecoder(
            config,
            lambda path, i, o, b: (Linear4bit if quantized else sloth.linear.Linear)(i, o, b),
        )
    network.bfloat16()
    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.quantize_(torch.randn(module.out_features, module.in_features, device="cuda"))
    kinds: Any = {"is_quantized": quantized, "frozen_base": True, "base_compute": compute}
    model = sloth.Model(network, {}, None, name="random", **kinds)
    model.add_lora(sloth.LoraConfig(r=16))
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True)
    tokens = torch.randint(32000, (2, 4096), device="cuda")
    whole = StepMemory(NetworkSizes.of(network), 2, 4096).peak([Keep()] * 6, False) / 2**30
    plan = model.plan(batch=2, seq=4096, memory_gib=whole * share / (1 - FRAGMENTATION))
    recorded = plan.keeps[0].recorded
    for _ in range(4):
        if recorded:  # its memory is reserved, and free to nobody
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        model.loss(tokens, tokens).backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before
    if recorded:
        peak = (torch.cuda.max_memory_reserved() - reserved_before) * (1 - FRAGMENTATION)
    measured = peak / 2**30
    assert abs(plan.predicted_gib / measured - 1) < 0.05, (plan.predicted_gib, measured)
