"""The trainer on a real tiny Llama: fused twin, NF4, adapters on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.data.dataset import StepPlan, collate, load_data
from sloth.errors import BudgetTooSmall, KernelUnavailable
from sloth.train.callbacks import Callback
from sloth.train.trainer import Trainer
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
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    report = model.train(ROWS, max_steps=2, lr=1e-3, output=tmp_path / "run")
    trained = dict(model.network.named_parameters())
    assert trained.keys() == before.keys()
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]
    again = sloth.load(report.paths["model"], device="cpu")
    reloaded = dict(again.network.named_parameters())
    assert reloaded.keys() == trained.keys()
    assert not [name for name, p in reloaded.items() if not torch.equal(p, trained[name])]
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


@pytest.mark.parametrize("memory_gib", [None, 1.0])
def test_a_run_gives_back_what_layers_prepared_for_its_steps(folder, tmp_path, memory_gib):
    model = load(folder, quant="nf4").add_lora(r=4)
    rows, held = [{"text": "a" * 60}] * 4, []

    class Seen(Callback):
        def step(self, record):
            held.append(model.network.workspace.num_bytes)

    settings = {"max_steps": 1, "memory_gib": memory_gib, "output": tmp_path / "run"}
    Trainer(model, rows, callbacks=[Seen()], **settings).run()
    assert held[0] > 0 and model.network.workspace.num_bytes == 0


# GiB that hold a step of four rows of 512 tokens on this model if little of it is kept, and that
# do not hold a row.
TIGHT, TOO_SMALL = 0.09, 0.01


def test_a_stated_budget_is_the_planners_for_the_run_alone(folder, tmp_path):
    """The smallest plan that fits it is kept to; what holds no row at all is refused at once."""
    model = load(folder, quant="nf4").add_lora(r=4)
    rows = [{"text": "a" * 510}] * 4
    shape = {"batch": 4, "seq": 512}
    roomy, tight = (model.plan(**shape, memory_gib=gib) for gib in (4.0, TIGHT))
    assert roomy.predicted_gib > tight.predicted_gib
    model.plan(**shape, memory_gib=3.0)
    kept = []

    class Seen(Callback):
        def step(self, record):
            kept.append((model.planner.memory_gib, list(model.network.planner(4, 512))))

    for gib in (4.0, TIGHT):
        settings = {"max_steps": 1, "memory_gib": gib, "output": tmp_path / str(gib)}
        Trainer(model, rows, callbacks=[Seen()], **settings).run()
        assert model.planner.memory_gib == 3.0
    assert [gib for gib, _ in kept] == [4.0, TIGHT] and kept[0][1] != kept[1][1]
    for act in ("run", "dry_run"):
        trainer = Trainer(model, rows, memory_gib=TOO_SMALL, output=tmp_path / "none")
        with pytest.raises(BudgetTooSmall, match="1 x 512 tokens need at least"):
            getattr(trainer, act)()
    with pytest.raises(KernelUnavailable, match="takes memory_gib; this model runs at ops"):
        load(folder).train(rows, memory_gib=4.0, output=tmp_path / "full")
