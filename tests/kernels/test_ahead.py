"""Kernels compiled ahead: each once, all that a layer launches, and nothing else changed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import sloth
from sloth.kernels.ahead import CompilingAhead, compile_ahead
from sloth.kernels.context import BlockContext
from sloth.kernels.dispatch import twin_of, wiring_of
from sloth.kernels.engine import launches_held
from sloth.kernels.layer import prepare
from sloth.kernels.ops.glu import _glu_fwd_kernel, glu_fwd
from tests.models.families import FIRST_TWINNED, TWINNED
from tests.oracles import save_tiny
from tests.test_lora import randomised

triton = pytest.importorskip("triton")


class Kernel:
    """What is compiled, for what types."""

    def __init__(self, fails: bool = False) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.fails = fails

    def warmup(self, *types: Any, grid: tuple[int, ...], **keywords: Any) -> None:
        if self.fails:
            raise RuntimeError("no such instruction")
        self.compiled.append((*types, keywords))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> CompilingAhead:
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    return CompilingAhead(torch.device("cpu"))


def test_each_kernel_is_compiled_once_for_its_types(ahead):
    first, second = Kernel(), Kernel()
    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    for size in (32, 48):  # alike: multiples of 16
        ahead(first, (x, size), {"BLOCK": 64})
    ahead(first, (x, 31), {"BLOCK": 64})
    ahead(first, (x, 32), {"BLOCK": 128})
    ahead(first, (y, 32), {"BLOCK": 64})
    ahead(second, (x, 1), {})
    assert ahead.wait() == 5
    assert len(first.compiled) == 4 and second.compiled == [(torch.float32, 1, {})]


def test_an_unaligned_tensor_and_one_by_name_are_left_for_their_launch(ahead):
    kernel = Kernel()
    ahead(kernel, (), {"x_ptr": torch.zeros(64)})
    ahead(kernel, (torch.zeros(65)[1:],), {})
    assert ahead.wait() == 0 and kernel.compiled == []


def test_a_failed_compilation_is_raised(ahead):
    ahead(Kernel(fails=True), (torch.zeros(16),), {})
    with pytest.raises(RuntimeError, match="no such instruction"):
        ahead.wait()


def test_a_launch_of_another_thread_is_not_held(monkeypatch):
    kernel = _glu_fwd_kernel
    launched, held = [], []
    monkeypatch.setattr(kernel, "run", lambda *args, **keywords: launched.append(args))
    with launches_held(lambda kernel, args, keywords: held.append(args)):
        kernel[(1,)](1)
        other = threading.Thread(target=lambda: kernel[(1,)](2))
        other.start()
        other.join()
    kernel[(1,)](3)
    assert held == [(1,)] and launched == [(2,), (3,)]


def num_compiled() -> int:
    import tests.kernels.test_triton_compile as convention

    kernels = [
        k for module in convention.op_modules() for k in convention.kernels_of(module).values()
    ]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("variant", FIRST_TWINNED.values())
def test_a_step_after_it_compiles_nothing(
    variant: str, quant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(TWINNED[variant])
    folder = save_tiny(settings.pop("model_type"), tmp_path / "base", **settings)
    model = sloth.load(folder, quant=quant, dtype="bfloat16")
    randomised(model.add_lora(r=8))
    network = model.network
    hidden = torch.randn(2, 64, network.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    contexts: list[BlockContext] = network.contexts(hidden, None, None)
    blocks, twin = network.model.layers, twin_of(network.model_type)
    # What stays unpacked is unpacked once, by a launch that is not held.
    prepare(blocks[0], hidden, contexts[0], network.workspace, wiring_of(network.model_type))
    state = torch.cuda.get_rng_state()
    launched = []
    run = type(_glu_fwd_kernel).run
    with monkeypatch.context() as patch:
        patch.setattr(
            type(_glu_fwd_kernel),
            "run",
            lambda self, *args, warmup, **keywords: (
                None if warmup else launched.append(self),
                run(self, *args, warmup=warmup, **keywords),
            )[1],
        )
        count = compile_ahead(
            *(twin, blocks[0], hidden, contexts[0], network.workspace),
            wiring_of(network.model_type),
        )
    assert launched == []  # the backward's neither
    assert count > 5 and torch.equal(torch.cuda.get_rng_state(), state)
    assert all(p.grad is None for p in network.parameters())
    before = num_compiled()
    hidden.requires_grad_()
    twin(blocks[0], hidden, contexts[0], network.workspace).sum().backward()
    assert num_compiled() == before
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.gpu
def test_held_launches_do_not_happen_and_later_ones_do() -> None:
    gate = torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros_like(gate)
    with launches_held(lambda kernel, args, keywords: None):
        glu_fwd(gate, gate, "silu", out)
    assert (out == 0).all()
    glu_fwd(gate, gate, "silu", out)
    assert (out != 0).all()
