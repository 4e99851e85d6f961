"""Recorded layers: the same numbers as unrecorded ones, and nothing stale is ever replayed.

On a CPU the passes are run instead of replayed, which leaves the bookkeeping to be tested; a GPU
replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sloth
from sloth.kernels import recording
from sloth.kernels.context import BlockContext, Keep
from sloth.kernels.llama import LlamaBlockFunction
from sloth.kernels.recording import Recorder, RunLayers
from tests import tolerance
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised

GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(3, 160, (2, 40), generator=GENERATOR)
OTHERS = torch.randint(3, 160, (2, 40), generator=GENERATOR)


class RunPasses:
    """Passes that are run each time, on memory that is overwritten as a recording's is.

    Like a graph they read what was recorded, whatever became of the modules since: those of
    `network` when they were made.
    """

    made = 0
    network: Any = None

    def __init__(
        self,
        run: RunLayers,
        hidden: Tensor,
        contexts: Sequence[BlockContext],
        matrices: list[Tensor],
    ) -> None:
        type(self).made += 1
        self.contexts, self.matrices = contexts, matrices
        self.input = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        self.result = run(self.input, contexts)
        self.output = torch.empty_like(hidden)
        self.backward(torch.zeros_like(hidden))  # a recording has one or fails
        self.layers = self.network.workspace.prepared(self.network.model.layers)
        places = {matrix.data_ptr(): matrix for matrix in matrices}
        self.factors = [
            [m if m is None else places.get(m.data_ptr(), m) for m in layer.matrices]
            for layer in self.layers
        ]

    def forward(self, hidden: Tensor) -> Tensor:
        self.input.detach().copy_(hidden)
        with torch.enable_grad():
            x = self.input
            for layer, context, own in zip(self.layers, self.contexts, self.factors, strict=True):
                x = LlamaBlockFunction.apply(x, layer, context, *own)
        self.result = x
        self.output.copy_(self.result.detach())
        return self.output.detach()

    def backward(self, d_hidden: Tensor) -> list[Tensor]:
        sources = [self.input] * self.input.requires_grad + self.matrices
        return list(torch.autograd.grad(self.result, sources, d_hidden))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("recording") / "base", **WHOLE_BLOCKS)


def load(folder: Path, **lora: object) -> sloth.Model:
    model = sloth.load(folder, quant="nf4", device="cpu")
    return recorded(randomised(model.add_lora(sloth.LoraConfig(r=8, **lora))))


def recorded(model: sloth.Model) -> sloth.Model:
    network = RunPasses.network = model.network
    network.planner = lambda batch, seq: [Keep(recorded=True)] * len(network.specs)
    blocks = list(network.model.layers)
    network.recorder = Recorder(network._run_layers, blocks, network.workspace, RunPasses)
    RunPasses.made = 0
    return model


def gradients(model: sloth.Model, tokens: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """The loss and every gradient."""
    model.network.zero_grad(set_to_none=True)
    loss = model.loss(tokens, tokens, positions)
    loss.backward()
    grads = [p.grad for p in model.network.parameters() if p.grad is not None]
    assert len(grads) == sum(p.requires_grad for p in model.network.parameters())
    return [loss.detach(), *grads]


def unrecorded(model: sloth.Model, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    planner, network = model.network.planner, model.network
    network.planner = lambda batch, seq: [Keep()] * len(network.specs)
    found = run()
    network.planner = planner
    return found


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def warm_up(model: sloth.Model, tokens: Tensor = TOKENS) -> None:
    """Until the next pass of the shape replays."""
    for _ in range(recording._TRIES + 1):
        gradients(model, tokens)


def test_a_shape_is_recorded_when_it_comes_again_and_again(folder):
    model = load(folder)
    expected = unrecorded(model, lambda: gradients(model, OTHERS))
    for made in (0, 0, 1, 1):
        gradients(model, TOKENS)
        assert RunPasses.made == made
    assert_equal(gradients(model, OTHERS), expected)
    assert RunPasses.made == 1


def test_another_shape_ends_a_recording(folder):
    model = load(folder)
    warm_up(model)
    short = gradients(model, TOKENS[:1])
    assert_equal(short, unrecorded(model, lambda: gradients(model, TOKENS[:1])))
    assert model.network.recorder._recording is None
    warm_up(model)
    assert RunPasses.made == 2


@pytest.mark.parametrize("kind", ["launched", "packed"])
def test_a_step_that_is_not_recorded_has_the_memory_of_a_recording(folder, kind):
    model = load(folder)
    network = model.network
    network.planner = lambda batch, seq: [Keep(recorded=batch == len(TOKENS))] * len(network.specs)
    warm_up(model)
    with torch.no_grad():  # keeps nothing, and needs none of it
        model.loss(TOKENS[:1], TOKENS[:1])
    assert network.recorder._recording is not None
    if kind == "packed":
        gradients(model, TOKENS, torch.cat([torch.arange(15), torch.arange(25)]))
    else:
        gradients(model, TOKENS[:1])
    assert network.recorder._recording is None


def test_kernels_that_repeat_bit_for_bit_are_recorded_anew(folder):
    model = load(folder)
    warm_up(model)
    torch.use_deterministic_algorithms(True)
    try:
        gradients(model, TOKENS)
        assert model.network.recorder._recording is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_evaluation_in_between_does_not_end_it(folder):
    model = load(folder)
    warm_up(model)
    with torch.no_grad():
        model.loss(TOKENS[:1], TOKENS[:1])
    gradients(model, TOKENS)
    assert RunPasses.made == 1


def test_a_second_forward_before_the_backward_gets_tensors_of_its_own(folder):
    model = load(folder)

    def both() -> list[Tensor]:
        model.network.zero_grad(set_to_none=True)
        losses = [model.loss(rows, rows) for rows in (TOKENS, OTHERS)]
        for loss in losses:
            loss.backward()
        return [p.grad for p in model.network.parameters() if p.grad is not None]

    expected = unrecorded(model, both)
    warm_up(model)
    assert_equal(both(), expected)


def test_a_forward_that_is_forgotten_does_not_block_the_next(folder):
    model = load(folder)
    warm_up(model)
    model.loss(TOKENS, TOKENS)
    assert not model.network.recorder._recording.is_busy


def test_packed_rows_are_never_recorded(folder):
    model = load(folder)
    positions = torch.cat([torch.arange(15), torch.arange(25)])
    expected = unrecorded(model, lambda: gradients(model, TOKENS, positions))
    for _ in range(4):
        assert_equal(gradients(model, TOKENS, positions), expected)
    assert RunPasses.made == 0


def test_dropout_is_never_recorded(folder):
    model = load(folder, dropout=0.5)
    model.network.train()
    warm_up(model)
    assert RunPasses.made == 0


def test_a_switched_off_adapter_is_not_replayed(folder):
    model = load(folder)
    warm_up(model)
    expected = gradients(model, TOKENS)
    bare = sloth.load(folder, quant="nf4", device="cpu").loss(TOKENS, TOKENS).item()
    assert bare != expected[0].item()
    for _ in range(2):  # with gradients enabled, as for a reference that is not trained
        with model.adapter_off():
            assert model.loss(TOKENS, TOKENS).item() == bare
        assert_equal(gradients(model, TOKENS), expected)
    assert RunPasses.made == 1


def test_layers_run_as_stored_are_not_replayed(folder):
    model = load(folder)
    warm_up(model)
    network, ran = model.network, []
    network.base_compute = "fp8"
    block = network.model.layers[0]
    block.register_forward_hook(lambda *_: ran.append(1))
    with network.as_stored():
        model.loss(TOKENS, TOKENS)
    assert ran == [1]
    gradients(model, TOKENS)
    assert ran == [1] and RunPasses.made == 1


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], None])
def test_layers_without_a_trained_matrix_run_unrecorded(folder, targets):
    model = sloth.load(folder, quant="nf4", device="cpu")
    if targets is None:
        model.network.requires_grad_(False)
        model._update_level()
    else:
        model.add_lora(sloth.LoraConfig(r=8, targets=targets))
    recorded(model)
    losses = {model.loss(TOKENS, TOKENS).item() for _ in range(2 * recording._TRIES + 1)}
    assert len(losses) == 1 and RunPasses.made == 0
    if targets is not None:
        gradients(model, TOKENS)


def test_a_matrix_that_is_frozen_later_gets_no_gradient(folder):
    model = load(folder)
    warm_up(model)
    frozen = model.network.model.layers[1].mlp.up_proj.lora_A.weight
    frozen.requires_grad_(False)
    gradients(model, TOKENS)
    assert frozen.grad is None and RunPasses.made == 1
    warm_up(model)
    assert frozen.grad is None and RunPasses.made == 2


def test_a_matrix_frozen_every_other_step_is_recorded_ever_more_rarely(folder):
    model = load(folder)
    warm_up(model)
    matrix = model.network.model.layers[1].mlp.up_proj.lora_A.weight
    for step in range(20):
        matrix.requires_grad_(step % 2 == 1)
        gradients(model, TOKENS)
        assert (matrix.grad is None) == (step % 2 == 0)
    assert RunPasses.made <= 4


def test_a_norm_that_is_replaced_ends_a_recording(folder):
    model = load(folder)
    warm_up(model)
    norm = model.network.model.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight.mul_(3)  # read where it lies
    gradients(model, TOKENS)
    assert model.network.recorder._recording is not None
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2, requires_grad=False)
    gradients(model, TOKENS)
    assert model.network.recorder._recording is None
    warm_up(model)
    norm.eps *= 2
    gradients(model, TOKENS)
    assert model.network.recorder._recording is None


def test_a_matrix_changed_before_the_backward_is_an_error(folder):
    model = load(folder)
    warm_up(model)
    loss = model.loss(TOKENS, TOKENS)
    with torch.no_grad():
        model.network.model.layers[0].mlp.up_proj.lora_B.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_is_an_error(folder):
    model = load(folder)
    warm_up(model)
    loss = model.loss(TOKENS, TOKENS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time through recorded layers"):
        loss.backward()


def test_gradients_are_nobody_elses_memory(folder):
    model = load(folder)
    warm_up(model)
    first = gradients(model, TOKENS)
    kept = [x.clone() for x in first]
    gradients(model, OTHERS)
    assert_equal(first, kept)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_replay_does_what_a_run_does(folder, quant):
    model = sloth.load(folder, quant=quant)
    randomised(model.add_lora(sloth.LoraConfig(r=8)))
    network = model.network
    trained = [p for p in network.parameters() if p.requires_grad]
    steps = {}
    start = [p.detach().clone() for p in trained]
    for recorded in (False, True):
        keeps = [Keep(recorded=recorded)] * len(network.specs)
        network.planner = lambda batch, seq, keeps=keeps: keeps
        with torch.no_grad():
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
        steps[recorded] = []
        for step in range(6):
            for rows in (TOKENS, OTHERS):  # gradients add up
                tokens = rows.roll(step, 1)
                loss = model.loss(tokens, tokens)
                loss.backward()
                steps[recorded].append(loss.item())
            steps[recorded] += [p.grad.norm().item() for p in trained]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert network.recorder._recording is not None
    torch.testing.assert_close(
        torch.tensor(steps[True]),
        torch.tensor(steps[False]),
        **tolerance.same_maths(torch.bfloat16),
    )


@pytest.mark.gpu
def test_a_graph_waits_while_the_adapter_is_off(folder):
    model = sloth.load(folder, quant="nf4")
    randomised(model.add_lora(sloth.LoraConfig(r=8)))
    network = model.network

    def losses() -> list[float]:
        found = []
        for _ in range(recording._TRIES + 3):
            loss = model.loss(TOKENS, TOKENS)
            loss.backward()
            with model.adapter_off():
                found += [loss.item(), model.loss(TOKENS, TOKENS).item()]
        return found

    network.planner = lambda batch, seq: [Keep()] * len(network.specs)
    expected = losses()
    assert expected[0] != expected[1]
    network.planner = lambda batch, seq: [Keep(recorded=True)] * len(network.specs)
    actual = losses()
    assert network.recorder._recording is not None and network.recorder._given_way == 0
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), **tolerance.same_maths(torch.bfloat16)
    )
