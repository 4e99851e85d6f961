"""Every family's fused twin against its model file: the whole network, each kind of layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sloth
from sloth.errors import KernelUnavailable
from sloth.kernels.context import POLICIES, Keep
from sloth.kernels.dispatch import TWINS, Level
from sloth.lora import is_lora_name
from sloth.models import ARCHITECTURES
from sloth.planning import predict
from tests import tolerance
from tests.kernels.common import assert_no_worse_than_eager, nan_poisoned_empty
from tests.models.common import random_tokens
from tests.models.families import FIRST_TWINNED, TWINNED, WITHOUT_TWIN
from tests.oracles import save_tiny

LENGTH = 40
POSITIONS = torch.cat([torch.arange(15), torch.arange(25)])
KEEPS = {**POLICIES, "tiled": replace(POLICIES["P2"], tile_tokens=32)}
SOME = ["v_proj", "gate_proj"]
NONE = [
    "embed_tokens"
]  # of the projections: its gradient passes through layers that have no adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("twins")
    return {name: save_tiny(folder=root / name, **TWINNED[name]) for name in TWINNED}


def adapted(
    folder: Path, targets: str | list[str], quant: str | None, device: str = "cpu"
) -> sloth.Model:
    """The model with a LoRA whose both factors are random."""
    model = sloth.load(folder, quant=quant, device=device, dtype="float32")
    model.add_lora(sloth.LoraConfig(r=4, targets=targets, dropout=0.0))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.network.named_parameters():
        if is_lora_name(name):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (0.2 * noise).to(parameter.device)
    return model


def run(
    model: sloth.Model, level: Level, tokens: Tensor, keep: Keep | None = None
) -> dict[str, Tensor]:
    """Logits and every LoRA gradient of a packed batch."""
    network = model.network
    network.set_level(level)
    network.planner = (lambda batch, seq: [keep] * len(network.specs)) if keep else None
    network.zero_grad(set_to_none=True)
    positions = POSITIONS.expand_as(tokens)
    network.loss(tokens, tokens, positions).backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return {"logits": network(tokens, positions), **gradients}


def test_every_architecture_has_a_twin_or_is_known_to_have_none() -> None:
    without = ARCHITECTURES.keys() - TWINS.keys()
    assert without == WITHOUT_TWIN, (
        f"{without ^ WITHOUT_TWIN}: a twin is named in sloth/kernels/dispatch.py, a type without "
        "one in WITHOUT_TWIN of tests/models/families.py"
    )
    assert TWINS.keys() <= ARCHITECTURES.keys()


@pytest.mark.parametrize("name", TWINNED)
@pytest.mark.parametrize(
    ("quant", "targets"),
    [(None, "all-linear"), ("nf4", "all-linear"), ("nf4", SOME), (None, NONE), ("nf4", NONE)],
)
def test_twin_equals_the_model_file(
    folders: dict[str, Path], name: str, quant: str | None, targets: Any
) -> None:
    model, tokens = adapted(folders[name], targets, quant), random_tokens(2, LENGTH)
    model.network.double()
    expected = run(model, "reference", tokens)
    assert len(expected) == 3 if targets == NONE else len(expected) > 4
    with nan_poisoned_empty():
        actual = run(model, "fused", tokens)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **tolerance.FP64_CHAIN, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", FIRST_TWINNED.values())
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_keeping_less_changes_nothing(folders: dict[str, Path], name: str, keep: Keep) -> None:
    model, tokens = adapted(folders[name], "all-linear", "nf4"), random_tokens(2, LENGTH)
    model.network.double()
    expected = run(model, "fused", tokens, Keep())
    with nan_poisoned_empty():
        actual = run(model, "fused", tokens, keep)
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **tolerance.FP64_CHAIN, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", FIRST_TWINNED.values())
def test_documents_are_blind_to_each_other(folders: dict[str, Path], name: str) -> None:
    model, tokens = adapted(folders[name], "all-linear", "nf4"), random_tokens(1, LENGTH)
    other = tokens.clone()
    other[:, 15:] = (other[:, 15:] + 7) % 150
    labels = tokens.clone()
    labels[:, 15:] = -100
    results = []
    for rows in (tokens, other):
        model.network.set_level("fused")
        model.network.zero_grad(set_to_none=True)
        model.network.loss(rows, labels, POSITIONS[None]).backward()
        gradients = [p.grad for p in model.network.parameters() if p.grad is not None]
        with torch.no_grad():
            results.append([model.network(rows, POSITIONS[None])[:, :15], *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIRST_TWINNED.values())
@pytest.mark.parametrize("level", ["ops", "fused"])
def test_bf16_stays_within_the_eager_error(
    folders: dict[str, Path], name: str, level: Level
) -> None:
    model, tokens = adapted(folders[name], "all-linear", None, "cuda"), random_tokens(2, LENGTH)
    network = model.network
    for key, parameter in network.named_parameters():
        if is_lora_name(key):  # factors as large as `adapted`'s make a network that magnifies any
            parameter.data *= 0.25  # rounding: two orders of the same sum then differ tenfold
        parameter.data = parameter.data.bfloat16().float()  # values that both dtypes hold
    truth = run(model, "reference", tokens)
    network.bfloat16()
    eager = run(model, "reference", tokens)
    ours = run(model, level, tokens)
    factor = tolerance.attention_error_factor(torch.bfloat16)
    for key, value in truth.items():
        assert_no_worse_than_eager(key, ours[key], eager[key], value, factor)


def test_a_type_without_a_twin_trains_and_is_planned_for_below_the_fused_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(TWINS, "llama")
    folder = save_tiny("llama", tmp_path / "m")
    with pytest.raises(KernelUnavailable, match="no fused twin yet. Load with level='auto'$"):
        sloth.load(folder, level="fused", device="cpu")
    for full in (True, False):
        assert sloth.estimate(folder, seq=16, full=full).predicted_gib > 0
    model = sloth.load(folder, device="cpu").add_lora(r=2)
    assert model.level == "ops" and "llama has no fused twin yet" in model.level_reason
    assert predict(model, 2, 16, "adamw").predicted_gib > 0
    tokens = random_tokens(2, LENGTH)
    model.loss(tokens, tokens).backward()
