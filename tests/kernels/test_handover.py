"""Gradients that layers hand on with room behind them: used where they arrive as they were sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sloth
from sloth.kernels.handover import Handover
from sloth.kernels.stacked import LoraStack
from tests import tolerance
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised

TOKENS = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("handover") / "base", **WHOLE_BLOCKS)


def backward(
    folder: Path, monkeypatch: Any, seen: list[bool], hook: Any = None, never: bool = False
) -> dict[str, Tensor]:
    """Every gradient; `seen` says of each layer, last first, whether its dY came with room."""
    arrived = Handover.arrived

    def spy(self: Handover, dy: Tensor, stack: LoraStack) -> Tensor | None:
        wide = None if never else arrived(self, dy, stack)
        seen.append(wide is not None)
        assert wide is None or torch.equal(wide[:, : stack.N], dy.flatten(0, 1))
        return wide

    monkeypatch.setattr(Handover, "arrived", spy)
    torch.manual_seed(0)
    model = randomised(sloth.load(folder, quant="nf4", device="cpu").add_lora(r=8))
    run_block = model.network.run_block
    if hook is not None:

        def hooked(block: Any, hidden: Tensor, context: Any) -> Tensor:
            out = run_block(block, hidden, context)
            out.register_hook(hook)
            return out

        model.network.run_block = hooked
    model.loss(TOKENS, TOKENS).backward()
    monkeypatch.undo()
    found = model.network.named_parameters()
    return {name: p.grad for name, p in found if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = tolerance.same_maths(torch.float32)
        torch.testing.assert_close(actual[name], value, **same, msg=name)


def test_only_the_first_gradient_of_a_backward_is_copied(folder, monkeypatch):
    seen: list[bool] = []
    actual = backward(folder, monkeypatch, seen)
    assert seen == [False, True, True, True]
    assert_same(actual, backward(folder, monkeypatch, [], never=True))


def test_a_gradient_that_a_hook_replaced_has_no_room(folder, monkeypatch):
    seen: list[bool] = []
    twice = backward(folder, monkeypatch, seen, hook=lambda dy: dy * 2)
    assert not any(seen)
    kept: list[bool] = []
    assert_same(
        backward(folder, monkeypatch, kept, hook=lambda dy: None), backward(folder, monkeypatch, [])
    )
    assert kept == [False, True, True, True]
    once = backward(folder, monkeypatch, [])
    last = max(name for name in once if "layers.3" in name and "lora_B" in name)
    torch.testing.assert_close(twice[last], 2 * once[last], **tolerance.same_maths(torch.float32))


def test_memory_of_another_size_at_the_same_place_has_no_room():
    handover, shape = Handover(), (1, 5, 64)
    stack = torch.nn.Module()
    stack.N, stack.R = 64, 64
    storage = torch.zeros(5 * 128)
    handover.hand_on(storage.view(5, 128), 64, shape)
    dense = storage[: 5 * 64].view(shape)
    assert handover.arrived(dense, stack) is None
    dx = handover.hand_on(storage.view(5, 128), 64, shape)
    assert handover.arrived(dx, stack).shape == (5, 128)
    assert handover.arrived(dx, stack) is None  # once only
    stack.R = 128
    assert handover.arrived(handover.hand_on(storage.view(5, 128), 64, shape), stack) is None
