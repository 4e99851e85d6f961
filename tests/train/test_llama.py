"""The trainer on a real tiny Llama: fused twin, NF4, adapters on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.data.dataset import StepPlan, collate, load_data
from tests import tolerance
from tests.oracles import save_tiny_llama
from tests.train.fakes import ROWS, FakeTokenizer

LORA = sloth.LoraConfig(r=4, dropout=0.2)
TOKENS = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("train") / "base")


def load(folder, **settings):
    """The tiny model with a tokenizer of characters; the folder has none."""
    model = sloth.load(folder, device="cpu", **settings)
    model._tokenizer = FakeTokenizer()
    return model


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_six_steps_equal_three_and_a_resume_of_three(folder, tmp_path, quant):
    config = sloth.TrainConfig(
        max_steps=6, batch_size=2, grad_accum=3, lr=1e-2, save_steps=3, lora=LORA, quant=quant
    )
    straight = load(folder, quant=quant)
    whole = straight.train(ROWS, config, output=tmp_path / "straight")
    half = tmp_path / "straight" / "step-000003"
    resumed = load(folder, quant=quant)
    assert straight.level == "fused"
    report = resumed.train(ROWS, config, output=tmp_path / "resumed", resume=half)
    assert report.losses == whole.losses
    assert whole.losses[-1] < whole.losses[0]
    assert torch.equal(resumed.logits(TOKENS), straight.logits(TOKENS))


def test_published_adapter_gives_the_trained_models_logits(folder, tmp_path):
    model = load(folder)
    report = model.train(ROWS, max_steps=3, lr=1e-2, lora=LORA, output=tmp_path / "run")
    again = load(folder, adapter=report.paths["adapter"])
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    assert not torch.equal(again.logits(TOKENS), load(folder).logits(TOKENS))


def test_full_fine_tune_writes_a_model_that_loads(folder, tmp_path):
    model = load(folder)
    report = model.train(ROWS, max_steps=2, lr=1e-3, output=tmp_path / "run")
    again = sloth.load(report.paths["model"], device="cpu")
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_step_gradients_do_not_depend_on_the_split(folder, quant):
    torch.manual_seed(0)
    model = load(folder, quant=quant).add_lora(r=4)
    with torch.no_grad():  # B starts at zero, where A has no gradient
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    data = load_data(ROWS, model.tokenizer, 2048)
    gradients = []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        plan = StepPlan.of(len(data.examples), batch_size, grad_accum, 0, 1, None)
        batches = [collate([data.examples[i] for i in rows], 1) for rows in plan.micro_batches(0)]
        num_trained = sum(batch.num_trained for batch in batches)
        model.network.zero_grad(set_to_none=True)
        for batch in batches:
            model.loss(batch.tokens, batch.labels, num_trained=num_trained).backward()
        gradients.append([p.grad for p in model.network.parameters() if p.requires_grad])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], **tolerance.ACCUMULATION)
