"""Prepared layers follow what happens to the network around them: modes, switches, writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sloth
from sloth.kernels.context import POLICIES, Keep
from sloth.kernels.layer import FusedLayer
from tests import tolerance
from tests.oracles import WHOLE_BLOCKS, save_tiny, save_tiny_llama
from tests.test_lora import randomised

TOKENS = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(5))
QUANTS = (None, "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("prepared") / "base", **WHOLE_BLOCKS)


def load(folder: Path, quant: str | None = "nf4", device: str = "cpu", **lora: Any) -> sloth.Model:
    model = sloth.load(folder, quant=quant, device=device)
    return randomised(model.add_lora(sloth.LoraConfig(r=8, **lora)))


def gradients(model: sloth.Model, loss: Tensor | None = None) -> dict[str, Tensor]:
    model.network.zero_grad(set_to_none=True)
    (model.loss(TOKENS, TOKENS) if loss is None else loss).backward()
    found = model.network.named_parameters()
    return {name: p.grad.clone() for name, p in found if p.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance.BIT_EXACT, msg=name)


def memory_of_layers(model: sloth.Model) -> int:
    """Bytes of what holds their parameters and stacks."""
    layers = [x for variants in model.network.workspace._layers.values() for x in variants.values()]
    tensors: list[Any] = [stack.scratch for layer in layers for stack in layer.stacks.values()]
    tensors += model.network.model.layers.parameters()
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("level", ["reference", "ops", "fused"])
@pytest.mark.parametrize("quant", QUANTS)
def test_inference_mode_first_does_not_stop_training(folder, quant, level):
    model = sloth.load(folder, quant=quant, device="cpu", level="auto").add_lora()
    model._requested_level = level
    model._update_level()
    with torch.inference_mode():
        model.logits(TOKENS)
    assert len(gradients(model)) == 2 * 7 * len(model.network.specs)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_switched_adapter_prepares_nothing_anew(folder, quant, use_dora, targets, monkeypatch):
    model = load(folder, quant, use_dora=use_dora, targets=targets)
    prepared: list[object] = []
    prepare = FusedLayer.__init__
    monkeypatch.setattr(
        FusedLayer, "__init__", lambda self, *a: (prepared.append(self), prepare(self, *a))[1]
    )
    counts, places = [], []
    for _ in range(3):
        prepared.clear()
        with torch.no_grad(), model.adapter_off():
            model.loss(TOKENS, TOKENS)
        places.append(memory_of_layers(model))
        gradients(model)
        places.append(memory_of_layers(model))
        counts.append(len(prepared))
    assert counts[1:] == [0, 0]
    assert len(set(places)) == 1


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_reference_pass_before_the_backward_changes_no_gradient(folder, quant, use_dora):
    model = load(folder, quant, use_dora=use_dora)
    expected = gradients(model)
    loss = model.loss(TOKENS, TOKENS)
    with torch.no_grad(), model.adapter_off():
        bare = model.loss(TOKENS, TOKENS)
    assert_equal(gradients(model, loss), expected)
    base = sloth.load(folder, quant=quant, device="cpu")
    base.network.requires_grad_(False)
    base._update_level()
    assert base.level == "fused" and bare == base.loss(TOKENS, TOKENS)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_switched_off_adapter_counts_as_zero_even_where_it_is_infinite(folder, quant):
    model = load(folder, quant)
    with torch.no_grad():
        model.network.model.layers[0].self_attn.q_proj.lora_A.weight.fill_(torch.inf)
        model.network.model.layers[1].mlp.up_proj.lora_B.weight.fill_(torch.nan)
        with model.adapter_off():
            bare = model.loss(TOKENS, TOKENS)
    base = sloth.load(folder, quant=quant, device="cpu")
    assert bare == base.loss(TOKENS, TOKENS)


def test_layers_that_stay_unpacked_are_shared_by_both_states(folder):
    model = load(folder)
    network = model.network
    network.planner = lambda batch, seq: [Keep(resident=True)] * len(network.specs)
    model.loss(TOKENS, TOKENS)
    held = network.workspace.num_bytes
    with model.adapter_off():
        model.loss(TOKENS, TOKENS)
    assert network.workspace.num_bytes == held > 0


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "up_proj"]])
@pytest.mark.parametrize("quant", QUANTS)
def test_gradients_keep_no_memory_but_their_own(folder, quant, targets):
    model = load(folder, quant, targets=targets)
    model.loss(TOKENS, TOKENS).backward()
    grads = [p.grad for p in model.network.parameters() if p.grad is not None]
    storages = [grad.untyped_storage() for grad in grads]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert held == sum(grad.nbytes for grad in grads)


def test_an_input_of_no_adapter_is_not_copied(folder):
    model = load(folder, targets=["q_proj"])
    gradients(model)
    (layer,) = model.network.workspace._layers[model.network.model.layers[0]].values()
    x = torch.randn(4, layer.o.K)
    assert layer.o.R == 0 and layer.o.taken_in(x)[0] is x


def test_a_bias_written_in_place_is_seen(tmp_path):
    model = load(save_tiny("qwen2", tmp_path / "qwen2"))
    before = model.loss(TOKENS, TOKENS)
    with torch.no_grad():
        model.network.model.layers[0].self_attn.q_proj.bias.add_(1)
    after = model.loss(TOKENS, TOKENS)
    model.network.release()
    assert after == model.loss(TOKENS, TOKENS) != before


def test_codes_written_in_place_are_seen_by_layers_that_stay_unpacked(folder):
    model = load(folder)
    network = model.network
    network.planner = lambda batch, seq: [Keep(resident=True)] * len(network.specs)
    before = model.loss(TOKENS, TOKENS)
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight.zero_()
    after = model.loss(TOKENS, TOKENS)
    network.release()
    assert after == model.loss(TOKENS, TOKENS) != before


def test_a_replaced_parameter_on_the_same_memory_gets_the_gradient(folder):
    model = load(folder)
    gradients(model)
    factor = model.network.model.layers[0].mlp.up_proj.lora_A
    old, factor.weight = factor.weight, nn.Parameter(factor.weight.detach())
    old.grad = None
    gradients(model)
    assert factor.weight.grad is not None and old.grad is None


OFFLOADED = [Keep(offload=True), Keep(**(vars(POLICIES["P1"]) | {"offload": True}))]


@pytest.mark.gpu
@pytest.mark.parametrize("keep", OFFLOADED)
def test_passes_without_a_backward_do_not_disturb_what_waits_in_host_memory(folder, keep):
    """Evaluation, a forgotten forward, and two forwards before either backward."""
    model = load(folder, device="cuda")
    network = model.network
    network.planner = lambda batch, seq: [keep] * len(network.specs)
    expected = gradients(model)
    locked = network.workspace.stash.pool.num_bytes
    for _ in range(4):
        with torch.no_grad():
            model.loss(TOKENS, TOKENS)
        model.loss(TOKENS, TOKENS)
        assert_close(gradients(model), expected)
        first, second = model.loss(TOKENS, TOKENS), model.loss(TOKENS, TOKENS)
        model.network.zero_grad(set_to_none=True)
        first.backward()
        assert_close(gradients(model, second), expected)
        first, second = model.loss(TOKENS, TOKENS), model.loss(TOKENS, TOKENS)
        second.backward()
        assert_close(gradients(model, first), expected)
    assert network.workspace.stash.pool.num_bytes <= 3 * locked


@pytest.mark.gpu
def test_lengths_that_take_turns_share_locked_memory(folder):
    model = load(folder, device="cuda")
    network = model.network
    network.planner = lambda batch, seq: [OFFLOADED[0]] * len(network.specs)
    for length in (40, 39, 12, 33, 40, 5):
        model.loss(TOKENS[:, :length], TOKENS[:, :length]).backward()
    locked = network.workspace.stash.pool.num_bytes
    assert locked <= 2**29
    model.network.release()
    assert network.workspace.stash.pool.num_bytes == 0


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **tolerance.same_maths(torch.float32), msg=name
        )


def test_blocks_of_large_ranks_are_multiplied_apart(folder):
    """Where zeros between the members' blocks would cost more than launches, they are left out."""
    model = load(folder)
    small = model.network.workspace
    model.loss(TOKENS, TOKENS)
    assert not small.prepared(model.network.model.layers)[0].qkv._apart
    large = sloth.load(folder, quant="nf4", device="cpu").add_lora(r=72, alpha=72)
    large = randomised(large)
    actual = gradients(large)
    stacks = large.network.workspace.prepared(large.network.model.layers)[0].stacks
    assert stacks["qkv"]._apart and not stacks["o"]._apart
    for stack in stacks.values():
        stack._apart = False
    expected = gradients(large)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance.same_maths(torch.float32))
