"""Recorded layers: the same numbers as unrecorded ones, and nothing stale is ever replayed.

On a CPU the passes are run instead of replayed, which leaves the bookkeeping to be tested; a GPU
replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sloth
from sloth.kernels import recording
from sloth.kernels.context import BlockContext, Keep
from sloth.kernels.recording import Recorder, RunLayers
from tests import tolerance
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised

GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(3, 160, (2, 40), generator=GENERATOR)
OTHERS = torch.randint(3, 160, (2, 40), generator=GENERATOR)


class RunPasses:
    """Passes that are run each time, on memory that is overwritten as a recording's is."""

    made = 0

    def __init__(
        self,
        run: RunLayers,
        hidden: Tensor,
        contexts: Sequence[BlockContext],
        matrices: list[Tensor],
    ) -> None:
        type(self).made += 1
        self.run, self.contexts, self.matrices = run, contexts, matrices
        self.input = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        self.result, self.output = torch.empty(0), torch.empty_like(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        self.input.detach().copy_(hidden)
        with torch.enable_grad():
            self.result = self.run(self.input, self.contexts)
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
    randomised(model.add_lora(sloth.LoraConfig(r=8, **lora)))
    network = model.network
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
    off = [m for m in model.network.modules() if getattr(m, "lora_A", None) is not None]
    for module in off:
        module.lora_enabled = False
    bare = model.loss(TOKENS, TOKENS).item()
    for module in off:
        module.lora_enabled = True
    assert bare != model.loss(TOKENS, TOKENS).item()
    assert bare == sloth.load(folder, quant="nf4", device="cpu").loss(TOKENS, TOKENS).item()


def test_a_matrix_that_is_frozen_later_gets_no_gradient(folder):
    model = load(folder)
    warm_up(model)
    frozen = model.network.model.layers[1].mlp.up_proj.lora_A.weight
    frozen.requires_grad_(False)
    gradients(model, TOKENS)
    assert frozen.grad is None
    assert RunPasses.made == 2


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
