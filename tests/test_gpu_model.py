"""The whole model on a GPU: levels against fp32 truth, generation, training steps, exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.infer.generate import generate_tokens
from tests.kernels.common import assert_no_worse_than_eager
from tests.oracles import WHOLE_BLOCKS, save_tiny_llama
from tests.test_lora import randomised
from tests.tolerance import attention_error_factor, one_rounding

pytestmark = pytest.mark.gpu

TOKENS = torch.randint(3, 160, (2, 128), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.cat([torch.arange(50), torch.arange(78)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("gpu") / "base", **WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomised(sloth.load(folder, device="cpu").add_lora(sloth.LoraConfig(r=8)))
    return model.save_adapter(tmp_path_factory.mktemp("gpu_adapter") / "adapter")


def results(
    folder: Path, adapter: Path, level: str, dtype: str, quant: str | None, packed: bool
) -> dict[str, torch.Tensor]:
    """Logits, loss and every LoRA gradient."""
    model = sloth.load(folder, adapter=adapter, quant=quant, level=level, dtype=dtype)
    assert model.device.type == "cuda" and model.level == level
    positions = POSITIONS if packed else None
    loss = model.loss(TOKENS, TOKENS, positions)
    loss.backward()
    found = {
        name: parameter.grad
        for name, parameter in model.network.named_parameters()
        if parameter.grad is not None
    }
    assert len(found) == 2 * 7 * 4
    with torch.no_grad():
        return {"logits": model.logits(TOKENS, positions), "loss": loss.detach(), **found}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("level", ["ops", "fused"])
def test_bf16_levels_stay_within_the_eager_error(folder, adapter, level, quant, packed):
    truth = results(folder, adapter, "reference", "float32", quant, packed)
    eager = results(folder, adapter, "reference", "bfloat16", quant, packed)
    ours = results(folder, adapter, level, "bfloat16", quant, packed)
    factor = attention_error_factor(torch.bfloat16)
    # One number may be right by luck at any level, so the loss has its own bound: one rounding.
    loss, expected = ours.pop("loss"), truth.pop("loss")
    assert abs(loss - expected) <= one_rounding(torch.bfloat16, expected.item())
    for name, value in truth.items():
        assert_no_worse_than_eager(name, ours[name], eager[name], value, factor)


def test_generation_on_the_gpu_equals_the_cpu_in_fp32(folder, adapter):
    rows = {}
    for device in ("cpu", "cuda"):
        model = sloth.load(folder, adapter=adapter, device=device, dtype="float32")
        prompts = [[5, 9, 13], [8], list(range(20, 50))]
        rows[device] = list(generate_tokens(model.network, prompts, 12))
    assert rows["cpu"] == rows["cuda"]


def test_exports_of_an_nf4_model_on_the_gpu_reload_to_the_same_logits(folder, adapter, tmp_path):
    model = sloth.load(folder, adapter=adapter, quant="nf4")
    with torch.no_grad():
        expected = model.logits(TOKENS)
        model.save_base(tmp_path / "base", quant="nf4")
        model.save_adapter(tmp_path / "adapter")
        again = sloth.load(tmp_path / "base", adapter=tmp_path / "adapter")
        assert torch.equal(again.logits(TOKENS), expected)
    model.save_merged(tmp_path / "merged")


def test_optimizer_steps_lower_the_loss(folder):
    model = sloth.load(folder, quant="nf4").add_lora()
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, fused=True)
    losses = []
    for _ in range(6):
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(TOKENS, TOKENS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
