"""DPO and ORPO: TRL's losses and gradients, formulas by hand, the shared loop, what is held."""

from __future__ import annotations

import json
import math

import pytest
import torch

import sloth
from sloth.constants import IGNORE_INDEX
from sloth.data.batches import collate_pairs
from sloth.data.examples import Example
from sloth.errors import DataError
from sloth.lora_config import LoraConfig
from sloth.train.config import TrainConfig
from sloth.train.objectives import DPO, ORPO, log_odds, objective_of, preference_losses
from sloth.train.records import EvalRecord
from sloth.train.trackers import eval_metrics
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.oracles import save_peft_adapter, save_tiny_llama, trl_preference
from tests.train.fakes import PAIRS, ROWS, FakeModel, FakeTokenizer
from tests.train.runs import DieIn, Stopped, metrics, same, weights
from tests.train.test_evaluate import Watch

LORA = {"r": 4, "target_modules": "all-linear"}
SETTINGS = {
    "max_steps": 6,
    "batch_size": 2,
    "grad_accum": 3,
    "lr": 0.02,
    "save_steps": 1,
    "lora": LoraConfig(r=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("preference") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter(folder):
    save_peft_adapter(folder, folder.parent / "adapter", **LORA)
    return folder.parent / "adapter"


def pairs(count=3, seed=3):
    """Pairs of random tokens, of lengths of their own."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    def example(prompt):
        answer = [number(4, 130) for _ in range(number(1, 9))]
        return Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer)

    prompts = [[number(4, 130) for _ in range(number(2, 9))] for _ in range(count)]
    return [(example(prompt), example(prompt)) for prompt in prompts]


def load(folder, adapter=None, **settings):
    return sloth.load(folder, adapter=adapter, device="cpu", dtype="float32", **settings)


def measured(objective, batch):
    """(loss, metrics) of a batch that is a whole step."""
    shares = objective.measure(batch, objective.sizes([batch]))
    return shares[0], dict(zip(objective.metrics, shares[1:].tolist(), strict=True))


# -- the losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DPO, ORPO])
def test_losses_and_gradients_are_trls(folder, adapter, kind):
    batch = collate_pairs(pairs(), 0, padding_free=False)
    model = load(folder, adapter)
    loss, told = measured(kind(model, 0.3), batch)
    loss.backward()
    theirs, gradients, said = trl_preference(kind.__name__.lower(), folder, adapter, batch, 0.3)
    assert loss.item() == pytest.approx(theirs, **tolerance.TRL_LOSS)
    ours = {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys() and len(ours) == 28
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, **tolerance.FP32_CHAIN)
    for name, trl_name in {
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        **({"nll": "nll_loss"} if kind is ORPO else {}),
    }.items():
        assert told[name] == pytest.approx(float(said[trl_name]), **tolerance.TRL_LOSS)


def test_losses_follow_the_papers_formulas_pair_by_pair(folder, adapter):
    """Written out with Python's own exp and log, from logits, one example at a time."""
    held, beta = pairs(), 0.3
    model = load(folder, adapter)

    def log_p(example):
        with torch.no_grad():
            logits = model.logits(torch.tensor([example.tokens]))[0].double().log_softmax(-1)
        return [logits[t, token].item() for t, token in enumerate(example.tokens[1:])]

    def of_answer(example, values):
        return [v for v, label in zip(values, example.labels[1:], strict=True) if label >= 0]

    dpo, odds, nlls = [], [], []
    for pair in held:
        policy = [log_p(example) for example in pair]
        with model.adapter_off():
            reference = [log_p(example) for example in pair]
        answers = [of_answer(e, v) for e, v in zip(pair, policy, strict=True)]
        before = [of_answer(e, v) for e, v in zip(pair, reference, strict=True)]
        ratio = [sum(a) - sum(b) for a, b in zip(answers, before, strict=True)]
        dpo.append(math.log(1 + math.exp(-beta * (ratio[0] - ratio[1]))))
        chances = [math.exp(sum(a) / len(a)) for a in answers]
        good, bad = (p / (1 - p) for p in chances)
        odds.append(-math.log(1 / (1 + bad / good)))
        nlls += [-value for value in policy[0]]
    batch = collate_pairs(held, 0, padding_free=False)
    loss, _ = measured(DPO(model, beta), batch)
    assert loss.item() == pytest.approx(sum(dpo) / 3, **tolerance.TRL_LOSS)
    loss, _ = measured(ORPO(model, beta), batch)
    expected = sum(nlls) / len(nlls) + beta * sum(odds) / 3
    assert loss.item() == pytest.approx(expected, **tolerance.TRL_LOSS)


def test_odds_stay_finite_at_both_ends_and_so_do_their_gradients():
    log_p = torch.tensor([0.0, -1e-9, -1e-3, -0.7, -20.0, -300.0]).requires_grad_()
    odds = log_odds(log_p)
    (gradient,) = torch.autograd.grad(preference_losses(odds, odds.flip(0).detach()).sum(), log_p)
    assert odds.isfinite().all() and gradient.isfinite().all()
    exact = log_p.detach().double()[2:]
    expected = exact - torch.log1p(-torch.exp(exact))
    torch.testing.assert_close(odds[2:].double(), expected, **tolerance.FP32_CHAIN)


@pytest.mark.parametrize("kind", [DPO, ORPO])
def test_padding_free_and_one_by_one_give_the_gradients_of_the_padded_step(folder, adapter, kind):
    held, results = pairs(4), []
    for parts, padding_free in (([held], False), ([held], True), ([[p] for p in held], False)):
        model = load(folder, adapter)
        objective = kind(model, 0.3)
        batches = [collate_pairs(part, 0, padding_free) for part in parts]
        sizes = objective.sizes(batches)
        total = sum(objective.measure(batch, sizes) for batch in batches)
        total[0].backward()
        results.append([total, *(p.grad for p in model.network.parameters() if p.requires_grad)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, **tolerance.FP32_CHAIN)


# -- the reference ---------------------------------------------------------------------------------


def test_reference_is_the_model_before_training_and_stays_it(folder, tmp_path):
    """The first loss is log 2 to the last bit, since policy and reference are one network then."""
    model = load(folder)
    model._tokenizer = FakeTokenizer()
    base = load(folder).logprobs(torch.tensor([[5, 9, 30, 7]])).detach()
    report = model.train(PAIRS, output=tmp_path / "run", objective="dpo", **SETTINGS)
    assert report.losses[0] == pytest.approx(math.log(2), rel=tolerance.FLOAT32_ROUNDING)
    tokens = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad(), model.adapter_off():
        torch.testing.assert_close(model.logprobs(tokens), base, **tolerance.FP32_CHAIN)
    assert not torch.allclose(model.logprobs(tokens), base)


def test_reference_sees_neither_dropout_nor_noise_and_draws_nothing():
    model = FakeModel().add_lora(LoraConfig(r=2, dropout=0.5))
    run = Trainer(model, PAIRS, objective="dpo", neftune=5.0)
    seen = []
    plain = model.logprobs

    def logprobs(*args):
        seen.append((model.network.training, torch.is_grad_enabled(), torch.get_rng_state()))
        return plain(*args)

    model.logprobs = logprobs
    model.network.train()
    run.objective.measure(run._batch(run.data, [0, 1]), [2])
    (training, grads, before), (training_after, grads_after, after) = seen
    assert (training, grads, training_after, grads_after) == (False, False, True, True)
    assert torch.equal(before, after)


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_ever_alive(folder, monkeypatch):
    """The chunk is 3 rows of logits; forward, reference and backward included."""
    vocabulary = 160
    monkeypatch.setattr("sloth.kernels.ops.linear_cross_entropy.CHUNK_BYTES", 3 * 4 * vocabulary)
    batch = collate_pairs(pairs(4), 0, padding_free=False)
    for kind in (DPO, ORPO):
        model = load(folder).add_lora(r=4)
        objective = kind(model, 0.1)
        watch = Watch(model.network)
        with watch:
            objective.measure(batch, objective.sizes([batch]))[0].backward()
        assert watch.rows_of_logits == 3 < batch.num_trained


# -- the loop --------------------------------------------------------------------------------------


def train(output, objective, stop_after=None, rows=PAIRS, **changes):
    model = FakeModel()
    callbacks = [] if stop_after is None else [DieIn(stop_after + 1)]
    settings = {**SETTINGS, "objective": objective, **changes}
    run = Trainer(model, rows, output=output, callbacks=callbacks, **settings)
    if stop_after is None:
        return model, run.run()
    with pytest.raises(Stopped):
        run.run()
    return model, None


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_training_lowers_the_loss_and_prefers_the_chosen(tmp_path, objective):
    _, report = train(
        tmp_path / "run",
        objective,
        max_steps=12,
        eval_data=PAIRS[:4],
        eval_steps=4,
        lr=0.1,
        beta=0.5,
    )
    assert report.losses[-1] < 0.8 * report.losses[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    steps = [row for row in rows if row["event"] == "step"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    assert steps[-1]["reward_accuracy"] == 1.0 and steps[0]["reward_accuracy"] < 1.0
    for row in steps:
        margin = row["reward_chosen"] - row["reward_rejected"]
        assert row["reward_margin"] == pytest.approx(margin, abs=tolerance.FLOAT32_ROUNDING)
    assert [row["step"] for row in evaluations] == [4, 8, 12] and "perplexity" not in evaluations[0]
    assert evaluations[-1]["eval_reward_accuracy"] == 1.0
    assert evaluations[-1]["eval_reward_margin"] > evaluations[0]["eval_reward_margin"] > 0
    assert report.eval_losses[12] == evaluations[-1]["eval_loss"] < report.eval_losses[4]


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_evaluation_is_the_objective_over_all_held_out_pairs_at_once(tmp_path, objective):
    model, report = train(tmp_path / "run", objective, eval_data=PAIRS[:5])
    run = Trainer(model, PAIRS[:5], objective=objective)
    batch = run._batch(run.data, list(range(5)))
    with torch.no_grad():
        loss, told = measured(run.objective, batch)
    (row,) = [r for r in metrics(tmp_path / "run") if r["event"] == "eval"]
    torch.testing.assert_close(report.eval_losses[6], loss.item(), **tolerance.FP32_SAME_MATHS)
    for name, value in told.items():
        assert row[f"eval_{name}"] == pytest.approx(value, abs=tolerance.FLOAT32_ROUNDING)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_resume_is_bitwise_and_the_split_of_a_step_changes_nothing(tmp_path, objective):
    lora = LoraConfig(r=4, dropout=0.3)
    straight_model, straight = train(tmp_path / "straight", objective, lora=lora)
    for stop in (1, 4):
        output = tmp_path / f"stopped-{stop}"
        train(output, objective, stop_after=stop, lora=lora)
        torch.rand(stop)
        model, report = train(output, objective, resume=True, lora=lora)
        assert report.losses == straight.losses
        assert same(weights(model), weights(straight_model))
        assert metrics(output) == metrics(tmp_path / "straight")
    _, split = train(tmp_path / "split", objective)
    _, whole = train(tmp_path / "whole", objective, batch_size=6, grad_accum=1)
    torch.testing.assert_close(split.losses, whole.losses, **tolerance.FP32_CHAIN)


def test_trackers_hear_of_the_rewards_and_of_no_perplexity():
    record = EvalRecord(1, 0.5, metrics={"reward_margin": 2.0}, has_perplexity=False)
    assert eval_metrics(record) == {"eval/loss": 0.5, "eval/reward_margin": 2.0}


def test_another_objective_or_beta_is_another_run(tmp_path):
    train(tmp_path / "run", "dpo", stop_after=2)
    with pytest.raises(ValueError, match="beta was 0.1, now 0.2; objective was 'dpo', now 'orpo'"):
        train(tmp_path / "run", "orpo", resume=True, beta=0.2)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "dpo", "packing": True}, "packing=True has no effect with objective='dpo'"),
        ({"objective": "orpo", "train_on": "last"}, "train_on='last' has no effect"),
        ({"objective": "dpo", "on_long": "split"}, "on_long='split' cannot be with"),
        ({"beta": 0.2}, "beta=0.2 has no effect with objective='sft'"),
        ({"objective": "ppo"}, "objective"),
        ({"beta": True}, "beta.*boolean"),
        ({"rl": "dpo"}, "did you mean 'objective'"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        TrainConfig(**settings)


def test_dpo_without_an_adapter_is_refused_and_orpo_is_not(tmp_path):
    with pytest.raises(ValueError, match="fake has none: give lora, or use objective='orpo'"):
        Trainer(FakeModel(), PAIRS, objective="dpo")
    for model, config in (
        (FakeModel(), TrainConfig(objective="dpo", lora=LoraConfig())),
        (FakeModel().add_lora(), TrainConfig(objective="dpo")),
        (FakeModel(is_quantized=True), TrainConfig(objective="dpo")),
    ):
        assert isinstance(objective_of(model, config), DPO)
    _, report = train(tmp_path / "full", "orpo", lora=None)
    assert report.losses[-1] < report.losses[0]
    with pytest.raises(DataError, match="preference pair"):
        train(tmp_path / "sft", "sft", rows=PAIRS)
    with pytest.raises(DataError, match="expected a preference pair"):
        train(tmp_path / "dpo", "dpo", rows=ROWS)


def test_the_plan_says_what_is_compared(tmp_path):
    plan = Trainer(FakeModel(), PAIRS, objective="dpo", beta=0.2, lora=LoraConfig()).dry_run()
    assert plan["objective"] == "dpo, beta 0.2; the reference is fake with its adapter off"
    assert plan["data"].startswith("9 rows (9 preference): 18 examples")
