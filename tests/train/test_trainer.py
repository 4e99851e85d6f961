"""The loop: what one step computes, what is refused, what a run leaves behind."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from sloth.data.dataset import StepPlan, collate, load_data
from sloth.errors import AdapterMismatch, DataError, NonFiniteGradients, OutputExists
from sloth.lora_config import LoraConfig
from sloth.train.checkpoint import read_tensors
from sloth.train.config import TrainConfig, load_config
from sloth.train.optim import build_optimizer, set_learning_rate, trainable
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.train.fakes import ROWS, FakeModel


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def events(output, event):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def poison(model, steps):
    """Make the gradient of the 0-based `steps` infinite, counting optimizer steps by loss calls."""
    calls, plain = [], model.loss

    def loss(*args, **kwargs):
        value = plain(*args, **kwargs)
        calls.append(1)
        return value * math.inf if len(calls) - 1 in steps else value

    model.loss = loss


def test_step_equals_a_plain_loop_written_out(output):
    model, twin = FakeModel(), FakeModel()
    report = Trainer(
        model,
        ROWS,
        output=output,
        max_steps=4,
        batch_size=3,
        lr=0.01,
        clip=0.5,
        warmup_steps=2,
        seed=5,
    ).run()
    data = load_data(ROWS, twin.tokenizer, 2048)
    plan = StepPlan.of(len(data.examples), 3, 1, 5, 4, None)
    optimizer = build_optimizer(trainable(twin.network), TrainConfig(lr=0.01))
    losses = []
    for step, rate in enumerate((0.005, 0.01, 0.01, 0.005)):
        batch = collate([data.examples[row] for row in plan.rows(step)], 1)
        loss = twin.loss(batch.tokens, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.network.parameters(), 0.5)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(report.losses, losses, **tolerance.FP32_SAME_MATHS)
    assert report.losses[-1] < report.losses[0]


def test_splitting_a_step_into_micro_batches_changes_nothing(output):
    """8x1, 4x2 and 1x8: losses, gradient norms, weights (row 1 of the failure table)."""
    results = []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        model = FakeModel()
        folder = output / str(batch_size)
        report = Trainer(
            model,
            ROWS,
            output=folder,
            max_steps=1,
            batch_size=batch_size,
            grad_accum=grad_accum,
            clip=None,
        ).run()
        norms = [row["grad_norm"] for row in events(folder, "step")]
        results.append((report.losses, norms))
    for losses, norms in results[1:]:
        torch.testing.assert_close(losses, results[0][0], **tolerance.ACCUMULATION)
        torch.testing.assert_close(norms, results[0][1], **tolerance.ACCUMULATION)


def test_split_gradients_agree_parameter_by_parameter():
    model = FakeModel()
    data = load_data(ROWS, model.tokenizer, 2048)
    gradients = []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8)):
        plan = StepPlan.of(len(data.examples), batch_size, grad_accum, 0, 1, None)
        batches = [collate([data.examples[i] for i in rows], 1) for rows in plan.micro_batches(0)]
        num_trained = sum(batch.num_trained for batch in batches)
        model.network.zero_grad()
        for batch in batches:
            model.loss(batch.tokens, batch.labels, num_trained=num_trained).backward()
        gradients.append([p.grad.clone() for p in model.network.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], **tolerance.ACCUMULATION)


def test_evaluation_does_not_depend_on_batch_size_and_is_reported(output):
    reports = [
        Trainer(
            FakeModel(),
            ROWS,
            output=output / str(size),
            max_steps=3,
            batch_size=size,
            grad_accum=8 // size,
            eval_data=ROWS[:5],
            eval_steps=2,
            lora=LoraConfig(r=2, dropout=0.0),
        ).run()
        for size in (8, 1)
    ]
    assert list(reports[0].eval_losses) == [2, 3]
    for step in (2, 3):
        torch.testing.assert_close(
            reports[0].eval_losses[step], reports[1].eval_losses[step], **tolerance.FP32_SAME_MATHS
        )
    assert [row["eval_loss"] for row in events(output / "8", "eval")] == list(
        reports[0].eval_losses.values()
    )


def test_evaluation_leaves_training_as_it_was(output):
    settings = {"max_steps": 4, "batch_size": 2, "lora": LoraConfig(r=2, dropout=0.5)}
    plain = Trainer(FakeModel(), ROWS, output=output / "a", **settings).run()
    evaluated = Trainer(
        FakeModel(), ROWS, output=output / "b", eval_data=ROWS, eval_steps=1, **settings
    ).run()
    assert plain.losses == evaluated.losses


def test_infinite_gradient_skips_the_step_and_is_counted(output):
    model = FakeModel()
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    poison(model, {0})
    report = Trainer(model, ROWS, output=output, max_steps=1, batch_size=4).run()
    assert report.skipped == 1 and math.isinf(report.losses[0])
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name])
    (row,) = events(output, "step")
    assert row["skipped"] and row["loss"] is None and len(row["rows"]) == 4


def test_one_infinite_gradient_of_a_finite_loss_skips_the_step(output):
    """Row 3: no parameter moves and no moment is touched."""
    model = FakeModel()
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    handle = model.network.norm.bias.register_hook(
        lambda gradient: torch.full_like(gradient, math.inf)
    )
    report = Trainer(model, ROWS, output=output, max_steps=1, batch_size=4).run()
    handle.remove()
    assert report.skipped == 1 and math.isfinite(report.losses[0])
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name])
    moments = read_tensors(report.paths["checkpoint"], "optimizer")
    assert not any(tensor.any() for tensor in moments.values())


def test_bad_steps_in_a_row_stop_the_run_and_leave_the_checkpoint(output):
    model = FakeModel()
    poison(model, {1, 3, 4, 5})  # one alone does not stop it
    with pytest.raises(NonFiniteGradients, match=r"3 steps in a row.*step-000004, is good"):
        Trainer(
            model, ROWS, output=output, max_steps=9, batch_size=2, save_steps=2, max_bad_steps=3
        ).run()
    assert all(torch.isfinite(p).all() for p in model.network.parameters())
    resumed = Trainer(
        FakeModel(), ROWS, output=output, max_steps=9, batch_size=2, save_steps=2, resume=True
    ).run()
    assert len(resumed.losses) == 9 and resumed.skipped == 2


def test_rows_of_a_bad_step_are_told_by_their_beginnings(output, capsys):
    """Their numbers are of no row of a file once others were dropped before them."""
    model = FakeModel()
    poison(model, {1})
    Trainer(model, [{"text": "  sun\nrise"}], output=output, max_steps=2, batch_size=1).run()
    (skipped,) = [row for row in events(output, "step") if row["skipped"]]
    assert skipped["rows"] == [0] and skipped["begins"] == ["sun rise"]
    assert "rows [0] as they are batched; the first begin 'sun rise'" in " ".join(
        capsys.readouterr().out.split()
    )
    assert all("begins" not in row for row in events(output, "step") if not row["skipped"])


def test_run_leaves_what_the_report_names(output):
    model = FakeModel()
    report = Trainer(model, ROWS, output=output, max_steps=3, eval_data=ROWS[:2]).run()
    assert set(report.paths) >= {"output", "config", "metrics", "loss_svg", "model", "checkpoint"}
    assert all(path.exists() for path in report.paths.values())
    assert model.calls == ["merged"]
    assert len(report.losses) == 3 and report.seconds > 0
    assert report.tokens == sum(row["tokens"] for row in events(output, "step"))
    svg = ElementTree.parse(report.paths["loss_svg"]).getroot()
    assert len(svg.findall("{http://www.w3.org/2000/svg}polyline")) == 1
    assert load_config(report.paths["config"]).max_steps == 3


def test_default_output_is_a_new_folder_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {Trainer(FakeModel(), ROWS, max_steps=1).run().paths["output"] for _ in range(2)}
    assert len(folders) == 2 and {folder.parent.name for folder in folders} == {"runs"}


def test_output_with_files_is_refused_and_left_alone(output):
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    with pytest.raises(OutputExists, match="not empty"):
        Trainer(FakeModel(), ROWS, output=output, max_steps=1).run()
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


def test_nf4_model_without_adapter_gets_one_and_says_so(output, capsys):
    model = FakeModel(is_quantized=True)
    report = Trainer(model, ROWS, output=output, max_steps=1, quant="nf4").run()
    assert model.lora_config == LoraConfig() and model.calls == ["adapter"]
    assert report.paths["adapter"] == output / "adapter"
    assert "attached LoRA r=16" in capsys.readouterr().out


def test_lora_setting_attaches_to_a_dense_model_and_trains_only_it(output):
    model = FakeModel()
    before = model.network.lm_head.weight.clone()
    Trainer(model, ROWS, output=output, max_steps=2, lora=LoraConfig(r=3)).run()
    assert model.network.q_proj.lora_A.weight.shape[0] == 3
    assert model.network.q_proj.lora_B.weight.any()
    assert torch.equal(model.network.lm_head.weight, before)


def test_settings_that_cannot_take_effect_are_refused():
    with pytest.raises(ValueError, match=r"loaded dense; use sloth.load\('fake', quant='nf4'\)"):
        Trainer(FakeModel(), ROWS, quant="nf4")
    with pytest.raises(AdapterMismatch, match="already has an adapter"):
        Trainer(FakeModel().add_lora(LoraConfig(r=2)), ROWS, lora=LoraConfig(r=3))
    with pytest.raises(DataError, match="max_length=4"):
        Trainer(FakeModel(), ROWS, max_length=4)


def test_tokens_that_the_model_has_no_row_for_are_refused_before_training(output):
    """Of a tokenizer that is larger than the model; held-out rows, too."""
    rows = [{"text": "abc"}, {"text": "abz"}]
    model = FakeModel()
    model.network.config.vocab_size = model.tokenizer.encode("z", False)[0]
    Trainer(model, rows[:1], output=output, max_steps=1).run()
    said = r"holds the token id 126, and the model has rows for 126 tokens .vocab_size."
    for settings in ({"eval_data": rows}, {}):
        with pytest.raises(DataError, match=said):
            Trainer(model, rows[: 1 if settings else 2], **settings)


def test_examples_longer_than_the_models_positions_are_told(output, capsys):
    model = FakeModel()
    model.network.config.max_position_embeddings = 70
    trainer = Trainer(model, ROWS, output=output, max_steps=1)
    said = "2 examples are longer than the 70 positions that the model is made for"
    assert said in trainer.dry_run()["warnings"]
    trainer.run()
    assert f"WARNING: {said}" in capsys.readouterr().out


def test_frozen_model_is_refused(output):
    model = FakeModel()
    model.network.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter.*add_lora"):
        Trainer(model, ROWS, output=output).run()


def test_run_leaves_global_state_as_it_was(output):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = FakeModel()
    model.network.eval()
    seen = []
    plain = model.loss
    model.loss = lambda *a, **k: (
        seen.append((model.network.training, torch.are_deterministic_algorithms_enabled()))
        or plain(*a, **k)
    )
    Trainer(model, ROWS, output=output, max_steps=1, deterministic=True).run()
    assert seen == [(True, True)]
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not model.network.training
    assert all(p.grad is None for p in model.network.parameters())


def test_terminal_shows_data_counts_and_one_masked_row(output, capsys):
    Trainer(FakeModel(), ROWS[:1], output=output, max_steps=2).run()
    out = capsys.readouterr().out
    assert "1 rows (1 messages): 1 examples" in out
    assert "<|start|>assistant\n[+yo<|end|>+]" in out
    assert "step 1/2  epoch" in out and "step 2/2  epoch" in out
