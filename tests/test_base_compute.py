"""`base_compute="fp8"` on a loaded model: what it changes, what it leaves, where it is refused."""

from __future__ import annotations

import filecmp
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import sloth
from sloth import cli
from sloth.errors import KernelUnavailable
from sloth.estimating import estimate
from sloth.infer.generate import generate_tokens
from sloth.kernels.fp8 import FP8Weight
from sloth.lora_config import LoraConfig
from sloth.train.evaluate import summed
from sloth.train.memory import make_plan
from sloth.train.network_sizes import NetworkSizes
from tests import tolerance
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised

pytestmark = pytest.mark.filterwarnings("ignore:base_compute='fp8' is an approximation")

TOKENS = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.cat([torch.arange(15), torch.arange(25)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base_compute") / "base", **WHOLE_BLOCKS)


def adapted(folder: Path, compute: str | None, **settings: Any) -> sloth.Model:
    model = sloth.load(folder, device="cpu", base_compute=compute, **settings)
    torch.manual_seed(0)
    return randomised(model.add_lora(r=8))


def logits(model: sloth.Model, positions: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.logits(TOKENS, positions)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_only_what_the_fused_level_multiplies_by_changes(folder: Path, quant: str | None) -> None:
    exact, model = (adapted(folder, compute, quant=quant) for compute in (None, "fp8"))
    assert (exact.level, model.level) == ("fused", "fused")
    assert "base_compute='fp8'" in model.level_reason and "fp8" not in exact.level_reason
    error = (logits(model) - logits(exact)).norm() / logits(exact).norm()
    # four layers, whose errors add up in squares
    assert 0 < error < 4**0.5 * tolerance.E4M3_LAYER
    prompt = [5, 9, 13]
    rows = [list(generate_tokens(m.network, [prompt], 8)) for m in (exact, model)]
    assert rows[0] == rows[1]  # decoding runs the plain blocks
    with model.network.as_stored():
        torch.testing.assert_close(logits(model), logits(exact), **tolerance.FP32_CHAIN)
    assert not torch.equal(logits(model), logits(exact))


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_files_are_those_of_the_exact_model(
    folder: Path, quant: str | None, tmp_path: Path
) -> None:
    for name, compute in (("exact", None), ("fp8", "fp8")):
        model, out = adapted(folder, compute, quant=quant), tmp_path / name
        logits(model)
        model.save_adapter(out / "adapter")
        model.save_merged(out / "merged")
        model.save_base(out / "base", quant=quant)
    for kind, file in (("adapter", "adapter_model"), ("merged", "model"), ("base", "model")):
        paths = [tmp_path / name / kind / f"{file}.safetensors" for name in ("exact", "fp8")]
        assert filecmp.cmp(*paths, shallow=False), kind


def test_documents_stay_blind_to_each_other(folder: Path) -> None:
    model, other = adapted(folder, "fp8", quant="nf4"), TOKENS.clone()
    other[:, 15:] = (other[:, 15:] + 7) % 150
    with torch.no_grad():
        results = [model.logits(rows, POSITIONS)[:, :15] for rows in (TOKENS, other)]
    assert torch.equal(*results)


def test_a_step_of_training_lowers_the_loss_and_repeats_bit_for_bit(folder: Path) -> None:
    def losses() -> list[float]:
        torch.manual_seed(0)
        model = sloth.load(folder, quant="nf4", device="cpu", base_compute="fp8").add_lora(r=8)
        trainable = [p for p in model.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        found = []
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(TOKENS, TOKENS)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first = losses()
    assert first[-1] < first[0] and first == losses()


def test_the_adapter_is_switched_off_without_casting_the_base_again(folder: Path) -> None:
    model = adapted(folder, "fp8", quant="nf4")
    with mock.patch.object(FP8Weight, "of", side_effect=FP8Weight.of) as spy:
        with_adapter = logits(model)
        casts = spy.call_count
        with model.adapter_off():
            assert not torch.equal(logits(model), with_adapter)
        assert torch.equal(logits(model), with_adapter)
        assert casts == spy.call_count == 4 * len(model.network.specs)


def test_a_dense_base_is_frozen_and_trains_through_an_adapter(folder: Path) -> None:
    model = sloth.load(folder, device="cpu", base_compute="fp8")
    assert not any(p.requires_grad for p in model.network.parameters())
    assert model.level == "fused" and logits(model).isfinite().all()
    model.add_lora(r=4)
    assert model.level == "fused"


@pytest.mark.parametrize("level", ["ops", "reference"])
def test_other_levels_refuse_it(folder: Path, level: str) -> None:
    with pytest.raises(KernelUnavailable, match=f"fused level alone.*level='{level}'"):
        sloth.load(folder, device="cpu", base_compute="fp8", level=level)


def test_dora_is_refused_before_anything_is_attached(folder: Path) -> None:
    model = sloth.load(folder, device="cpu", base_compute="fp8", quant="nf4")
    with pytest.raises(KernelUnavailable, match="DoRA"):
        model.add_lora(use_dora=True)
    assert not model.has_adapter


def test_dora_is_refused_before_a_step_is_predicted(folder: Path) -> None:
    dora = LoraConfig(use_dora=True)
    with pytest.raises(KernelUnavailable, match="attach LoRA without use_dora"):
        estimate(folder, seq=40, base_compute="fp8", lora=dora)
    assert estimate(folder, seq=40, lora=dora).predicted_gib > 0


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_sizes_it_cannot_multiply_are_refused_from_the_config_alone(
    tmp_path: Path, quant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = save_tiny_llama(tmp_path / "odd", **WHOLE_BLOCKS | {"intermediate_size": 200})
    monkeypatch.setattr("sloth.assemble._fill", lambda *rest: pytest.fail("weights were read"))
    for ask in (partial(estimate, seq=40), partial(sloth.load, device="cpu")):
        with pytest.raises(KernelUnavailable, match="gate_up has 64 inputs and 200, 200 outputs"):
            ask(odd, quant=quant, base_compute="fp8")
    assert estimate(odd, seq=40, quant=quant).predicted_gib > 0


@pytest.mark.parametrize("command", ["estimate", "train"])
def test_commands_say_so_in_a_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = save_tiny_llama(tmp_path / "odd", **WHOLE_BLOCKS | {"intermediate_size": 200})
    capsys.readouterr()
    flags = ["none.jsonl", "--dry-run", "--device", "cpu"] if command == "train" else []
    assert cli.main([command, str(odd), *flags, "--base-compute", "fp8", "--lora.r", "4"]) == 2
    said = capsys.readouterr().err
    assert "multiples of 16" in said and said.count("\n") == 1


def test_a_setting_that_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="'fp8' or None, got 'int8'"):
        sloth.load(folder, device="cpu", base_compute="int8")


# -- the planner -----------------------------------------------------------------------------------


def test_a_plan_counts_both_copies_and_unpacks_nothing(folder: Path) -> None:
    plans = {}
    for compute in (None, "fp8"):
        model = adapted(folder, compute, quant="nf4")
        sizes = NetworkSizes.of(model.network)
        plans[compute] = make_plan(sizes, 2, 40, 1.0)
        assert sizes.fp8 == (compute == "fp8")
    assert all(keep.resident for keep in plans[None].keeps)
    assert not any(keep.resident for keep in plans["fp8"].keeps)
    logits(model)
    held = 0
    for block in model.network.model.layers:
        for stack in model.network.workspace.prepared([block])[0].stacks.values():
            held += sum(tensor.nbytes for tensor in stack.weight)
    assert held == plans["fp8"].parts["copies in 8 bits"] * 2**30
    assert "copies in 8 bits" in str(plans["fp8"]) and "8 bits" not in str(plans[None])


def test_an_estimate_agrees_with_the_loaded_model(folder: Path) -> None:
    settings: dict[str, Any] = {"quant": "nf4", "dtype": "float32", "base_compute": "fp8"}
    predicted = estimate(folder, seq=256, batch=2, **settings)
    model = sloth.load(folder, quant="nf4", device="cpu", base_compute="fp8").add_lora()
    assert predicted.predicted_gib == model.plan(batch=2, seq=256).predicted_gib
    exact = estimate(folder, seq=256, batch=2, **settings | {"base_compute": None})
    assert predicted.predicted_gib > exact.predicted_gib


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_near_the_one_a_cpu_emulates(folder: Path, tmp_path: Path) -> None:
    adapter, found = adapted(folder, None).save_adapter(tmp_path / "adapter"), []
    settings: dict[str, Any] = {"quant": "nf4", "dtype": "bfloat16", "base_compute": "fp8"}
    for device in ("cpu", "cuda"):
        model = sloth.load(folder, device=device, adapter=adapter, **settings)
        model.loss(TOKENS, TOKENS).backward()
        named = model.network.named_parameters()
        gradients = {name: p.grad.cpu() for name, p in named if p.grad is not None}
        found.append((logits(model).float().cpu(), gradients))
    (on_cpu, names), (on_gpu, gradients) = found
    assert (on_gpu - on_cpu).norm() / on_cpu.norm() < 4**0.5 * tolerance.E4M3_LAYER
    assert gradients.keys() == names.keys() and len(names) == 2 * 7 * 4
    assert all(value.isfinite().all() and value.norm() > 0 for value in gradients.values())


def test_its_cost_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match="0.7% above"):
        sloth.load(folder, device="cpu", base_compute="fp8")


def test_held_out_losses_are_those_of_the_model_that_is_saved(folder: Path) -> None:
    losses = {}
    for compute in (None, "fp8"):
        model = adapted(folder, compute, quant="nf4")

        def measure(rows: list[int], model: sloth.Model = model) -> torch.Tensor:
            return model.loss(TOKENS[rows], TOKENS[rows])[None]

        losses[compute] = summed([[0], [1]], measure, model.network)
        with torch.no_grad():
            trained_on = sum(measure([row]).item() for row in (0, 1))
        assert (losses[compute] == [trained_on]) == (compute is None)
    torch.testing.assert_close(losses["fp8"], losses[None], **tolerance.same_maths(torch.float32))
