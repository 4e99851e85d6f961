"""Held-out loss and perplexity, samples, early stopping, the best weights; and what it costs."""

from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sloth
from sloth.data.dataset import load_data
from sloth.errors import DataError
from sloth.infer.decode import GrowingStep
from sloth.lora_config import LoraConfig
from sloth.quant.linear4bit import Linear4bit
from sloth.train import evaluate, held_out
from sloth.train.callbacks import Callback
from sloth.train.checkpoint import is_good, read_state, read_tensors, write_checkpoint
from sloth.train.evaluate import best_step, has_stalled, sample_answers, summed
from sloth.train.records import EvalRecord
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.oracles import save_tiny_llama
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer
from tests.train.runs import Stopped, metrics, train, weights

NAN = math.nan


def evaluated(tmp_path, monkeypatch, losses, **settings):
    """A run whose evaluations give these losses."""
    left = iter(losses)
    monkeypatch.setattr(held_out, "summed", lambda *rest: [next(left)])
    return train(tmp_path / "run", eval_data=ROWS[:3], eval_steps=1, **settings)


def test_perplexity_is_the_exponential_of_the_mean_token_loss(tmp_path, capsys):
    model, report = train(tmp_path / "run", eval_data=ROWS[:5])
    data = load_data(ROWS[:5], model.tokenizer, 2048)
    model.network.eval()
    with torch.no_grad():
        sums = [
            model.loss(torch.tensor([e.tokens]), torch.tensor([e.labels]), num_trained=1).item()
            for e in data.examples
        ]
    expected = sum(sums) / data.counts.trained_tokens
    (row,) = [r for r in events(tmp_path / "run") if r["event"] == "eval"]
    torch.testing.assert_close(report.eval_losses[6], expected, **tolerance.FP32_SAME_MATHS)
    assert row["eval_loss"] == report.eval_losses[6]
    assert row["perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    assert f"perplexity {row['perplexity']:.4g}" in capsys.readouterr().out


def events(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_perplexity_beyond_all_numbers_is_infinite():
    assert EvalRecord(1, 1e4).perplexity == math.inf
    assert EvalRecord(1, None).perplexity is None


def test_best_step_and_patience_are_functions_of_what_was_measured():
    assert best_step({}) is None and best_step({1: NAN}) is None
    losses = {1: 3.0, 2: 2.0, 3: NAN, 4: 2.0, 5: 2.5}
    assert best_step(losses) == 2
    assert [has_stalled(losses, n) for n in (None, 4, 3, 2)] == [False, False, True, True]
    assert has_stalled({1: NAN, 2: NAN}, 2) and not has_stalled({}, 1)


def test_run_stops_when_patience_runs_out(tmp_path, monkeypatch):
    _, report = evaluated(tmp_path, monkeypatch, [4.0, 2.0, 3.0, NAN, 9.0], patience=2)
    assert report.stopped_early and len(report.losses) == 4 and report.best_step == 2
    assert report.paths["checkpoint"].name == "step-000004"
    _, again = train(tmp_path / "run", resume=True, eval_data=ROWS[:3], eval_steps=1, patience=2)
    assert again.losses == report.losses


@pytest.mark.parametrize("load_best", [False, True])
def test_best_weights_are_published_when_asked_for(tmp_path, monkeypatch, load_best):
    model, report = evaluated(
        tmp_path, monkeypatch, [4.0, 2.0, 3.0, 3.0, 3.0, 3.0], load_best=load_best
    )
    best = read_tensors(tmp_path / "run" / "step-000002", "trainable")
    held = weights(model)
    assert all(torch.equal(held[name], tensor) for name, tensor in best.items()) == load_best
    assert ("best" in report.paths) == load_best


def test_samples_are_greedy_answers_in_the_log(tmp_path, monkeypatch, capsys):
    asked = []

    def answers(network, ids, num_tokens, stop_ids):
        assert not network.training
        asked.append((ids, num_tokens, stop_ids))
        yield [FakeTokenizer().encode("o", False)[0], FakeTokenizer().encode("n", False)[0]]
        yield [FakeTokenizer().encode("k", False)[0], None]

    monkeypatch.setattr(evaluate, "generate_tokens", answers)
    prompts = ["is it\nso?", "really"]
    train(tmp_path / "run", sample_prompts=prompts, sample_tokens=7, eval_steps=4)
    assert "  is it\\nso? -> ok\n  really -> n\n" in capsys.readouterr().out
    evaluations = [row for row in events(tmp_path / "run") if row["event"] == "eval"]
    assert [row["step"] for row in evaluations] == [4, 6]
    assert evaluations[0]["samples"][0] == {"prompt": "is it\nso?", "answer": "ok"}
    assert "eval_loss" not in evaluations[0]
    ids, num_tokens, stop_ids = asked[0]
    text = FakeTokenizer().decode(ids[1], skip_special_tokens=False)
    assert text == "<s><|start|>user\nreally<|end|>\n<|start|>assistant\n"
    assert (num_tokens, stop_ids) == (7, (3, 1))


def test_a_prompt_that_cannot_be_asked_is_refused_before_training():
    def refusing(messages, for_generation):
        if messages[0]["role"] != "system":
            raise DataError("the chat template: a system message is needed")
        return "".join(message["content"] for message in messages)

    model = FakeModel()
    model.tokenizer = FakeTokenizer(refusing)
    with pytest.raises(ValueError, match=r"sample_prompts\[0\]='hi' .*a system message is needed"):
        Trainer(model, [{"text": "abc"}], sample_prompts=["hi"])
    model.tokenizer.chat, model.tokenizer.encode = (
        None,
        lambda text, *rest, **more: [*map(ord, text)],
    )
    with pytest.raises(ValueError, match=r"sample_prompts\[1\]='' .*no tokens"):
        Trainer(model, [{"text": "abc"}], sample_prompts=["hi", ""])


def test_a_sample_that_fails_is_a_warning_and_costs_no_loss(tmp_path, monkeypatch, capsys):
    def broken(*rest):
        raise ValueError("no such answer")

    monkeypatch.setattr(evaluate, "generate_tokens", broken)
    _, report = train(tmp_path / "run", sample_prompts=["hi"], eval_data=ROWS[:3])
    assert len(report.losses) == 6 and list(report.eval_losses) == [6]
    said = capsys.readouterr().out
    assert "WARNING: samples are left out, ValueError: no such answer" in said


@pytest.mark.parametrize("is_old", [False, True])
def test_a_step_is_saved_before_it_is_evaluated(tmp_path, monkeypatch, is_old):
    """Whatever ends that: the steps are there, and a resumed run evaluates first, and once. An
    older checkpoint calls what is due by another name.
    """
    settings = {"eval_data": ROWS[:4], "eval_steps": 2, "save_steps": 2}
    _, straight = train(tmp_path / "straight", **settings)

    def broken(*rest):
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(held_out, "summed", broken)
        train(tmp_path / "run", **settings)
    kept = tmp_path / "run" / "step-000002"
    state = read_state(kept)
    assert is_good(kept) and state["progress"]["eval_losses"] == {}
    if is_old:
        state["progress"]["is_look_due"] = state["progress"].pop("is_eval_due")
        tensors = {n: read_tensors(kept, n) for n in ("trainable", "optimizer", "rng")}
        write_checkpoint(kept.parent, 2, tensors, state)
    _, report = train(tmp_path / "other", resume=kept, **settings)
    assert report.eval_losses == straight.eval_losses and len(list(kept.glob("looked*"))) == 0
    _, report = train(tmp_path / "run", resume=True, **settings)
    assert report.losses == straight.losses and report.eval_losses == straight.eval_losses
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    again = read_state(report.paths["checkpoint"])["progress"]["eval_losses"]
    assert {int(step): loss for step, loss in again.items()} == straight.eval_losses


# -- on a real model: what it holds ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("evaluate") / "base")


def load(folder, **settings):
    model = sloth.load(folder, device="cpu", **settings)
    model._tokenizer = FakeTokenizer()
    return model


def test_samples_of_a_real_model_are_what_it_generates_and_leave_codes_packed(folder, monkeypatch):
    model = load(folder, quant="nf4")
    model.network.train()
    dense = []
    with monkeypatch.context() as patched:
        patched.setattr(Linear4bit, "keep_dense", lambda self, dtype: dense.append(dtype))
        answers = sample_answers(model.network, model.tokenizer, ["hi", "hello you"], 5)
    assert not dense and model.network.training
    asked = [[{"role": "user", "content": text}] for text in ("hi", "hello you")]
    assert [answer for _, answer in answers] == model.generate(asked, max_new_tokens=5)


class Watch(TorchDispatchMode):
    """The most bytes of results alive at once, the most rows of one as wide as the vocabulary;
    views of weights are none.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.vocab_size = network.config.vocab_size
        self.weights = {p.untyped_storage()._cdata for p in network.parameters()}
        self.alive: dict[int, int] = {}
        self.peak_bytes = self.rows_of_logits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in self.weights:
            return
        self.alive[key] = storage.nbytes()
        weakref.finalize(tensor, self.alive.pop, key, None)
        self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        if tensor.shape[-1:] == (self.vocab_size,):
            self.rows_of_logits = max(self.rows_of_logits, tensor.numel() // self.vocab_size)


def test_evaluation_holds_less_than_a_training_step_and_no_logits(folder):
    """Row 16: no activation is kept; logits exist of trained tokens only, in chunks."""
    model = load(folder).add_lora(LoraConfig(r=4))
    chunk_rows = 3
    row_bytes = model.config.vocab_size * torch.float32.itemsize
    planned = model.network.planner

    def in_small_chunks(batch, seq):
        keeps = planned(batch, seq)
        model.network.head_chunk_bytes = chunk_rows * row_bytes
        return keeps

    model.network.planner = in_small_chunks
    run = Trainer(model, ROWS, batch_size=4, eval_data=ROWS)
    batch = run._batch(run.data, [0, 2, 5, 9])

    kept = []

    def measure(rows):
        measured = run.objective.measure(batch, [batch.num_trained])
        kept.append(measured.requires_grad)
        return measured

    model.network.train()
    with Watch(model.network) as training:
        measure([]).backward()
    with Watch(model.network) as looking:
        summed([[0, 2, 5, 9]], measure, model.network)
    assert kept == [True, False]
    assert looking.peak_bytes <= training.peak_bytes
    assert looking.rows_of_logits == chunk_rows < batch.num_trained < batch.tokens.numel()


def test_evaluation_draws_nothing_and_keeps_the_mode():
    model = FakeModel().add_lora(LoraConfig(r=2, dropout=0.5))
    run = Trainer(model, ROWS, eval_data=ROWS)
    model.network.train()
    before = torch.get_rng_state()
    losses = [
        summed(
            [[0], [1]],
            lambda rows: run.objective.measure(run._batch(run.data, rows), [3]),
            model.network,
        )
        for _ in range(2)
    ]
    assert losses[0] == losses[1] and model.network.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"quant": "nf4"}], ids=["dense", "nf4"])
def test_evaluation_peaks_below_training_on_a_gpu(folder, tmp_path, settings, monkeypatch):
    """Row 16, as the allocator sees it: losses and samples included, held-out rows longer."""
    peaks = {}
    # Recorded, a step holds library workspaces of 32 MiB, which dwarf this model.
    monkeypatch.setattr("sloth.infer.generate.start_decoding", GrowingStep)

    class Peak(Callback):
        def step(self, record):
            peaks["train"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

        def evaluation(self, record):
            peaks["eval"] = torch.cuda.max_memory_allocated()

    model = sloth.load(folder, device="cuda", **settings)
    model._tokenizer = FakeTokenizer()
    model.tokenizer.decode = lambda ids, **rest: str(ids)  # an untrained model answers anything
    long = [{"prompt": "hi " * 60, "completion": "yo" * 60} for _ in range(16)]
    model.train(
        long,
        output=tmp_path / "run",
        max_steps=1,
        batch_size=8,
        lora=LoraConfig(r=4),
        eval_data=[{**row, "completion": "yo" * 70} for row in long],
        sample_prompts=["hi"],
        callbacks=[Peak()],
    )
    assert 0 < peaks["eval"] <= peaks["train"]
