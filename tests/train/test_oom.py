"""Out of memory: the pass is halved, the step repeated with the same rows, the curve the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sloth.data.dataset import collate, load_data
from sloth.errors import OutOfMemory
from sloth.lora_config import LoraConfig
from sloth.train import checkpoint
from sloth.train.accumulate import Accumulator
from sloth.train.evaluate import eval_batches
from sloth.train.objectives import Supervised
from sloth.train.ranks import Ranks
from tests import tolerance
from tests.train.fakes import ROWS, FakeModel
from tests.train.runs import metrics, same, train, weights

SETTINGS = {
    "max_steps": 5,
    "batch_size": 4,
    "grad_accum": 2,
    "lora": LoraConfig(r=4),
    "lr": 0.02,
}


class Small(FakeModel):
    """Has memory for so many rows at a time, from some call on. `when`: in forward, or with part of
    the gradients already there.
    """

    def __init__(self, rows: int, from_call: int = 0, when: str = "forward") -> None:
        super().__init__()
        self.rows, self.from_call, self.when = rows, from_call, when
        self.num_calls = self.num_failures = 0
        self.sizes: list[int] = []

    def loss(self, tokens, labels, positions=None, num_trained=None):
        self.num_calls += 1
        fails = self.num_calls > self.from_call and len(tokens) > self.rows
        self.num_failures += fails
        if fails and self.when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if not fails:
            self.sizes.append(len(tokens))
        value = super().loss(tokens, labels, positions, num_trained)
        return FailInBackward.apply(value) if fails else value


class FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize(("rows", "from_call"), [(2, 0), (1, 3), (3, 5)])
def test_out_of_memory_keeps_tokens_per_step_and_the_curve(tmp_path, when, rows, from_call, capsys):
    """Row 15. Calls 3 and 5 fall inside a step: what it had added up is dropped and redone."""
    _, roomy = train(tmp_path / "roomy", **SETTINGS)
    model, report = train(tmp_path / "small", model=Small(rows, from_call, when), **SETTINGS)
    torch.testing.assert_close(report.losses, roomy.losses, **tolerance.ACCUMULATION)
    assert report.tokens == roomy.tokens and report.skipped == 0
    steps = [
        [(row["tokens"], row["trained_tokens"], row["lr"]) for row in metrics(tmp_path / name)]
        for name in ("roomy", "small")
    ]
    assert steps[0] == steps[1]
    assert model.num_failures == (2 if rows == 1 else 1)
    assert max(model.sizes[from_call:]) <= rows
    assert (
        "WARNING: out of memory with 4 rows in a pass; going on with 2" in capsys.readouterr().out
    )


def test_gradients_of_a_broken_step_leave_nothing_behind():
    """One pass of the step succeeded before the failure: added twice, the gradient would be off."""
    gradients = []
    for model in (FakeModel(), Small(2, from_call=1, when="backward")):
        data = load_data(ROWS, model.tokenizer, 2048)
        accumulator = Accumulator(
            batch_of=lambda rows, data=data: collate([data.examples[row] for row in rows], 1),
            objective=Supervised(model),
            forget=model.network.zero_grad,
            notice=lambda text: None,
            ranks=Ranks(torch.device("cpu")),
            rows_per_pass=4,
        )
        added = accumulator.step([0, 1, 2, 3, 4, 5, 6, 7])
        gradients.append([added.loss, *(p.grad for p in model.network.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance.ACCUMULATION)


def test_a_repeated_step_draws_the_same_random_numbers():
    drawn = []

    accumulator = Accumulator(
        batch_of=lambda rows: collate(load_data(ROWS, FakeModel().tokenizer, 99).examples, 1),
        objective=SimpleNamespace(
            metrics=(), sizes=lambda batches: [1], measure=lambda batch, sizes: draw().view(1)
        ),
        forget=lambda: None,
        notice=lambda text: None,
        ranks=Ranks(torch.device("cpu")),
        rows_per_pass=4,
    )

    def draw():
        drawn.append(torch.rand(()).item())
        if len(drawn) == 1:
            raise torch.OutOfMemoryError("no")
        return torch.zeros((), requires_grad=True)

    accumulator.step([0, 1, 2, 3])
    assert len(drawn) == 3 and drawn[0] == drawn[1] != drawn[2]


def test_one_row_that_does_not_fit_is_an_error_with_advice(tmp_path):
    with pytest.raises(OutOfMemory, match="one row alone does not fit.*smaller max_length"):
        train(tmp_path / "run", model=Small(0), **SETTINGS)


def test_smaller_passes_are_kept_by_a_resume(tmp_path):
    """So that it adds up in the same order, bit by bit, without failing first."""
    straight_model, straight = train(tmp_path / "a", model=Small(2), save_steps=1, **SETTINGS)
    train(tmp_path / "b", model=Small(2), stop_after=3, save_steps=1, **SETTINGS)
    state = checkpoint.read_state(tmp_path / "b" / "step-000003")
    assert state["progress"]["rows_per_pass"] == 2
    model, report = train(tmp_path / "b", model=Small(2), resume=True, save_steps=1, **SETTINGS)
    assert report.losses == straight.losses and same(weights(model), weights(straight_model))
    assert model.num_failures == 0


def test_evaluation_that_does_not_fit_goes_on_in_smaller_passes(tmp_path):
    settings = {**SETTINGS, "eval_data": ROWS[:5], "max_steps": 1}
    _, roomy = train(tmp_path / "roomy", **settings)
    model, report = train(tmp_path / "small", model=Small(2, from_call=2), **settings)
    assert model.num_failures == 2 and set(model.sizes[2:]) <= {1, 2}
    assert report.losses == roomy.losses
    torch.testing.assert_close(report.eval_losses, roomy.eval_losses, **tolerance.FP32_SAME_MATHS)


def test_evaluation_takes_the_memory_that_steps_were_prepared_in_before_it_shrinks(tmp_path):
    settings = {**SETTINGS, "eval_data": ROWS[:5], "max_steps": 1}

    class Crowded(Small):
        def loss(self, *rest, **more):
            self.rows = 4 if self.network.num_released else 2
            return super().loss(*rest, **more)

    model, report = train(tmp_path / "run", model=Crowded(2, from_call=2), **settings)
    assert model.network.num_released == 1 and model.num_failures == 1
    assert max(model.sizes[2:]) == 4 and report.eval_losses


@pytest.mark.parametrize("max_tokens", [9, 20, 1000])
def test_an_evaluation_pass_is_no_larger_than_trainings(max_tokens):
    """Row 16: rows with padding, longest first; each row once."""
    lengths = [3, 9, 1, 9, 4, 4, 7, 2]
    batches = eval_batches(lengths, 4, max_tokens)
    assert sorted(row for rows in batches for row in rows) == list(range(8))
    for rows in batches:
        assert len(rows) <= 4
        assert len(rows) * max(lengths[row] for row in rows) <= max_tokens
    assert max(lengths[row] for row in batches[0]) == 9


# -- outside of forward and backward ---------------------------------------------------------------


def no_memory(*rest, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_in_an_update_stops_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Half the weights have moved when it happens: they are not saved, and a resume is exact."""
    settings = {**SETTINGS, "save_steps": 1}
    straight_model, straight = train(tmp_path / "a", **settings)
    plain, calls = torch.optim.AdamW.step, []

    def step(optimizer, closure=None):
        calls.append(plain(optimizer, closure))
        if len(calls) == 3:
            no_memory()

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        said = r"outside of forward and backward.*not saved.*adamw_8bit.*step-000002, is good"
        with pytest.raises(OutOfMemory, match=said):
            train(tmp_path / "b", **settings)
    assert sorted(p.name for p in (tmp_path / "b").glob("step-*"))[-1] == "step-000002"
    model, report = train(tmp_path / "b", resume=True, **settings)
    assert report.losses == straight.losses and same(weights(model), weights(straight_model))


def test_moments_exist_before_the_first_step_so_no_update_stops_half_way(tmp_path, monkeypatch):
    model = FakeModel()
    with monkeypatch.context() as patched:
        patched.setattr("sloth.train.trainer.make_moments", no_memory)
        with pytest.raises(OutOfMemory, match="there is no checkpoint yet"):
            train(tmp_path / "run", model=model, **SETTINGS)
    before = {name: p for name, p in weights(FakeModel()).items()}
    assert same(before, {n: p for n, p in weights(model).items() if n in before})

    held = []

    class Noting(torch.optim.AdamW):
        def step(self, closure=None):
            held.append({id(value) for state in self.state.values() for value in state.values()})
            super().step(closure)
            assert held[-1] == {id(v) for state in self.state.values() for v in state.values()}

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    train(tmp_path / "again", **SETTINGS)
    assert len(held[0]) == 6, "two LoRA matrices with a count and two moments each"


def test_one_row_that_does_not_fit_names_the_last_checkpoint(tmp_path):
    settings = {**SETTINGS, "save_steps": 1}
    with pytest.raises(OutOfMemory, match="one row alone.*step-000002, is good"):
        train(tmp_path / "run", model=Small(0, from_call=4), **settings)


class SmallWhenLooking(FakeModel):
    """No memory at all for held-out rows."""

    def loss(self, tokens, labels, positions=None, num_trained=None):
        if not self.network.training:
            no_memory()
        return super().loss(tokens, labels, positions, num_trained)


def test_an_evaluation_that_cannot_be_is_left_out_and_training_goes_on(
    tmp_path, monkeypatch, capsys
):
    """Neither the loss on a held-out row that is too long nor the samples cost the run."""
    settings = {**SETTINGS, "batch_size": 1, "grad_accum": 8}
    _, plain = train(tmp_path / "plain", **settings)
    monkeypatch.setattr("sloth.train.held_out.sample_answers", no_memory)
    settings |= {"eval_data": ROWS[:3], "eval_steps": 2, "patience": 1, "sample_prompts": ["hi"]}
    _, report = train(tmp_path / "run", model=SmallWhenLooking(), **settings)
    assert report.losses == plain.losses and report.eval_losses == {}
    said = capsys.readouterr().out
    assert said.count("WARNING: no evaluation loss, one held-out row alone does not fit") == 3
    assert said.count("WARNING: samples are left out, memory ran out while generating them") == 3


def test_a_smaller_evaluation_pass_is_tried_before_it_is_left_out(tmp_path, capsys):
    settings = {**SETTINGS, "eval_data": ROWS[:3], "max_steps": 2}
    _, report = train(tmp_path / "run", model=SmallWhenLooking(), **settings)
    said = capsys.readouterr().out
    assert "with 4 rows in a pass; going on with 2" in said and "going on with 1" in said
    assert report.eval_losses == {}


@pytest.mark.gpu
def test_a_real_out_of_memory_of_the_gpu_is_survived(tmp_path):
    """Row 15: rows take 64 MiB each of a budget of 3.5 of them. The limit is this process's own and
    far below what a GPU has free, so it is met here first, whoever else uses the card.
    """
    _, roomy = train(tmp_path / "roomy", model=FakeModel(device="cuda"), **SETTINGS)
    row_bytes = 2**26

    class Hungry(FakeModel):
        sizes: list[int] = []

        def loss(self, tokens, labels, positions=None, num_trained=None):
            # Rows come one after the other as documents of one.
            rows = len(tokens) if positions is None else int((positions == 0).sum())
            held = torch.zeros(rows, row_bytes // 4, device=self.device)
            self.sizes.append(rows)
            return super().loss(tokens, labels, positions, num_trained) + 0 * held[:, 0].sum()

    hungry = Hungry(device="cuda")
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    if free_bytes < 8 * row_bytes:
        pytest.skip(f"other processes left {free_bytes / 2**20:.0f} MiB of the GPU")
    budget_bytes = torch.cuda.memory_reserved() + 3.5 * row_bytes
    torch.cuda.set_per_process_memory_fraction(budget_bytes / total_bytes)
    try:
        model, report = train(tmp_path / "small", model=hungry, **SETTINGS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    torch.testing.assert_close(report.losses, roomy.losses, **tolerance.FP32_SAME_MATHS)
    assert max(model.sizes) == 2
