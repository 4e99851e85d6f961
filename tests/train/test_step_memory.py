"""What a layer is predicted to hold is what its host functions allocate, at the size of an 8B
model."""

from __future__ import annotations

from dataclasses import replace

import pytest

import sloth
from sloth.kernels.context import POLICIES, Keep
from sloth.kernels.dispatch import TWINS, wiring_of
from sloth.kernels.layer import Wiring
from sloth.train.step_memory import StepMemory
from tests import tolerance
from tests.train.measured import measure
from tools.shapes import SHAPES

pytest.importorskip("triton")

KEEPS = {
    **POLICIES,
    "P2, tiles": replace(POLICIES["P2"], tile_tokens=2048),
    "P4, tiles": replace(POLICIES["P4"], tile_tokens=4096),
}


def assert_predicted(
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    keep: Keep,
    quantized: bool = True,
    allowed: float = tolerance.STEP_MEMORY,
    **lora: object,
) -> None:
    config = sloth.LoraConfig(**lora)
    sizes, measured = measure(monkeypatch, shape, keep, config, quantized=quantized)
    memory = StepMemory(sizes, 4, 2048)
    assert memory.kept_bytes(keep) == pytest.approx(measured.kept, rel=allowed)
    assert memory.forward_bytes(keep) == pytest.approx(measured.forward, rel=allowed)
    predicted, backward = memory.backward_bytes(keep), measured.backward
    assert predicted <= backward * (1 + allowed)
    # Tiles add their gradients up in tensors that are counted as gradients, once for the adapter.
    counted = measured.gradients if keep.tile_tokens else 0
    assert predicted >= (backward - counted) * (1 - allowed)


@pytest.mark.parametrize("rank", [16, 64, 128, 256])
@pytest.mark.parametrize("name", KEEPS)
def test_a_layer_holds_what_is_predicted(name, rank, monkeypatch):
    assert_predicted(monkeypatch, "llama-3.1-8b", KEEPS[name], r=rank)


OTHERS = {
    "norms on q and k": "qwen3-8b",
    "norms behind the halves": "gemma-2-9b",
    "norms at both places": "gemma-3-12b",
    "small": "llama-3.2-1b",
}


def test_every_kind_of_layer_is_measured():
    """A family whose layers keep something else belongs to the shapes above."""
    kinds = {kind: _kind(wiring_of(kind)) for kind in TWINS}
    measured = {_kind(wiring_of(SHAPES[name]["model_type"])) for name in OTHERS.values()}
    missing = [kind for kind, what in kinds.items() if what not in measured]
    assert not missing, f"{missing}: name a shape of tools/shapes.py in OTHERS"


def _kind(wiring: Wiring) -> tuple[object, ...]:
    return len(wiring.norms), wiring.post_norms, wiring.qk_norms


@pytest.mark.parametrize("name", ["P1", "P3", "P6", "P2, tiles"])
@pytest.mark.parametrize("kind", [*OTHERS, "dense", "no adapter on o"])
def test_layers_of_other_kinds_do(kind, name, monkeypatch):
    shape = OTHERS.get(kind, "llama-3.1-8b")
    lora = {"targets": ["q_proj", "up_proj"]} if kind == "no adapter on o" else {}
    assert_predicted(monkeypatch, shape, KEEPS[name], kind != "dense", **lora)


@pytest.mark.parametrize("name", ["P4", "P6"])
def test_layers_with_dora_do(name, monkeypatch):
    allowed = tolerance.STEP_MEMORY_DORA
    assert_predicted(monkeypatch, "llama-3.1-8b", KEEPS[name], allowed=allowed, use_dora=True)
