"""DoRA inside every family's twin: norms on q and k, scaled queries, four norms, softcaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.kernels.context import POLICIES
from sloth.lora import adapters_held, is_lora_name
from sloth.train.memory import make_plan
from sloth.train.network_sizes import NetworkSizes
from sloth.train.step_memory import StepMemory
from tests import tolerance
from tests.kernels.common import nan_poisoned_empty
from tests.kernels.test_twins import LENGTH, run
from tests.models.common import random_tokens
from tests.models.families import FIRST_TWINNED, TWINNED
from tests.oracles import save_tiny

NAMES = list(dict.fromkeys([*FIRST_TWINNED.values(), *(n for n in TWINNED if "ministral3" in n)]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dora")
    return {name: save_tiny(folder=root / name, **TWINNED[name]) for name in NAMES}


def adapted(folder: Path, quant: str | None = "nf4", use_dora: bool = True) -> sloth.Model:
    """The model with random factors, and magnitudes away from the norms."""
    model = sloth.load(folder, quant=quant, device="cpu", dtype="float32")
    model.add_lora(r=4, use_dora=use_dora)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.network.named_parameters():
        if is_lora_name(name):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_length = name.endswith("magnitude_vector")
            parameter.data = parameter.data * (1 + noise) if is_length else noise
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["P1", "P6"])
def test_twin_equals_the_model_file(folders: dict[str, Path], name: str, policy: str) -> None:
    model, tokens = adapted(folders[name]), random_tokens(2, LENGTH)
    model.network.double()
    expected = run(model, "reference", tokens)
    assert sum(key.endswith("magnitude_vector") for key in expected) >= 14
    with nan_poisoned_empty():
        actual = run(model, "fused", tokens, POLICIES[policy])
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **tolerance.FP64_CHAIN, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_norms_held_for_decoding_are_those_of_the_factors(folders: dict[str, Path]) -> None:
    model, tokens = adapted(folders[NAMES[0]]), random_tokens(1, 20)
    model.network.set_level("ops")
    with torch.no_grad():
        expected = model.network(tokens)
        with adapters_held(model.network):
            torch.testing.assert_close(model.network(tokens), expected, **tolerance.FP32_CHAIN)
            for name, parameter in model.network.named_parameters():
                if name.endswith("lora_B.weight"):
                    parameter.mul_(2.0)
            held = model.network(tokens)
        assert not torch.allclose(model.network(tokens), held)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_the_planner_counts_what_dora_keeps(folders: dict[str, Path], quant: str | None) -> None:
    plain = NetworkSizes.of(adapted(folders[NAMES[0]], quant, use_dora=False).network)
    dora = NetworkSizes.of(adapted(folders[NAMES[0]], quant).network)
    assert dora.dora == (True,) * 4 and not any(plain.dora)
    one, other = (StepMemory(sizes, 2, LENGTH) for sizes in (plain, dora))
    keep = POLICIES["P1"]
    # the output of P_down, which a magnitude's gradient reads
    width = plain.hidden * plain.element * 2 * LENGTH
    assert other.kept_bytes(keep) - one.kept_bytes(keep) == width
    assert other.forward_bytes(keep) >= one.forward_bytes(keep)
    assert other.backward_bytes(keep) > one.backward_bytes(keep)
    # one scratch for all layers, dense matrices copied into it too; gains and squared norms
    static = other.static_parts([keep] * plain.num_layers, False)["scratch"]
    outputs = sum(size for size, _ in dora.stack_sizes)
    assert static > dora.layer_scratch + 3 * 4 * outputs * dora.num_layers
    for sizes in (plain, dora):  # what stays unpacked lies in scratch of its own either way
        kept = [keep.resident for keep in make_plan(sizes, 2, LENGTH, 10.0).keeps]
        assert all(kept) if quant else not any(kept)
