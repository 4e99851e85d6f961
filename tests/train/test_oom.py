"""Out of memory: the pass is halved, the step repeated with the same rows, the curve the same."""

from __future__ import annotations

import pytest
import torch

from sloth.data.dataset import collate, load_data
from sloth.errors import OutOfMemory
from sloth.lora_config import LoraConfig
from sloth.train import checkpoint
from sloth.train.accumulate import Accumulator
from sloth.train.evaluate import eval_batches
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
            loss_of=lambda batch, n, model=model: model.loss(
                batch.tokens, batch.labels, num_trained=n
            ),
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
        loss_of=lambda batch, n: draw(),
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
    assert model.num_failures == 1 and set(model.sizes[2:]) <= {1, 2}
    assert report.losses == roomy.losses
    torch.testing.assert_close(report.eval_losses, roomy.eval_losses, **tolerance.FP32_SAME_MATHS)


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


@pytest.mark.gpu
def test_a_real_out_of_memory_of_the_gpu_is_survived(tmp_path):
    """Row 15: rows take 1 GiB each of a budget of 3, whatever the size of the GPU."""
    _, roomy = train(tmp_path / "roomy", model=FakeModel(device="cuda"), **SETTINGS)

    class Hungry(FakeModel):
        sizes: list[int] = []

        def loss(self, tokens, labels, positions=None, num_trained=None):
            held = torch.zeros(len(tokens), 2**28, device=self.device)
            self.sizes.append(len(tokens))
            return super().loss(tokens, labels, positions, num_trained) + 0 * held[:, 0].sum()

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    used_bytes = torch.cuda.memory_reserved(0)
    torch.cuda.set_per_process_memory_fraction((used_bytes + 3.2 * 2**30) / total_bytes)
    try:
        model, report = train(tmp_path / "small", model=Hungry(device="cuda"), **SETTINGS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    torch.testing.assert_close(report.losses, roomy.losses, **tolerance.FP32_SAME_MATHS)
    assert max(model.sizes) == 2
