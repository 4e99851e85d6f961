"""Groups of rate and decay, clipping, 8-bit moments, noise on embeddings, fp32 masters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sloth.train import checkpoint
from sloth.train.config import TrainConfig
from sloth.train.masters import Masters
from sloth.train.neftune import noisy_embeddings
from sloth.train.optim import (
    build_optimizer,
    clip_gradients,
    eight_bit_library,
    gradient_norm,
    set_learning_rate,
    trainable,
)
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.train.fakes import FakeModel, FakeNetwork
from tests.train.runs import same, train, weights


def groups_by_name(model, **settings):
    parameters = trainable(model.network)
    names = {id(parameter): name for name, parameter in parameters.items()}
    optimizer = build_optimizer(parameters, TrainConfig(**settings))
    set_learning_rate(optimizer, settings["lr"] / 2)
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_norms_and_biases_are_not_decayed_and_embeddings_have_their_own_rate():
    groups = groups_by_name(FakeModel(), lr=0.2, weight_decay=0.5, embedding_lr=0.02)
    assert groups == {
        "embed_tokens.weight": (pytest.approx(0.01), 0.5),
        "q_proj.weight": (0.1, 0.5),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "lm_head.weight": (pytest.approx(0.01), 0.5),
    }


def test_lora_plus_raises_the_rate_of_b_alone():
    groups = groups_by_name(FakeModel().add_lora(), lr=0.2, lora_plus=16)
    assert groups == {
        "q_proj.lora_A.weight": (0.1, 0.01),
        "q_proj.lora_B.weight": (pytest.approx(1.6), 0.01),
    }


def test_rates_without_a_parameter_are_refused(tmp_path):
    with pytest.raises(ValueError, match="embedding_lr=0.1 has no effect: neither embed_tokens"):
        train(tmp_path / "a", embedding_lr=0.1)
    with pytest.raises(ValueError, match="lora_plus=16 has no effect without a LoRA adapter"):
        train(tmp_path / "b", lora=None, lora_plus=16)


def test_adamw_is_the_fused_one():
    assert build_optimizer(trainable(FakeModel().network), TrainConfig()).defaults["fused"]


def test_clipping_scales_the_whole_gradient_to_the_norm():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    for largest, expected in ((None, 13.0), (26.0, 13.0), (6.5, 6.5)):
        a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        norm = gradient_norm([a, b])
        clip_gradients([a, b], norm, largest)
        torch.testing.assert_close(norm.item(), 13.0, **tolerance.FP32_SAME_MATHS)
        torch.testing.assert_close(
            gradient_norm([a, b]).item(), expected, **tolerance.FP32_SAME_MATHS
        )


# -- 8 bits ----------------------------------------------------------------------------------------


def wide_model(device="cpu"):
    """Matrices of 4096 numbers and more, which get 8-bit moments."""
    model = FakeModel(device=device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.network = FakeNetwork(model.tokenizer.vocab_size, 64).to(device)
    return model


@pytest.fixture
def bitsandbytes():
    try:
        return eight_bit_library()
    except ValueError as error:
        pytest.skip(str(error))


def test_8_bit_moments_train_nearly_alike_and_resume_bitwise(tmp_path, bitsandbytes):
    settings = {"lora": None, "lr": 0.005, "max_steps": 8}
    _, plain = train(tmp_path / "plain", model=wide_model(), **settings)
    settings["optimizer"] = "adamw_8bit"
    model, straight = train(tmp_path / "a", model=wide_model(), **settings)
    assert straight.losses != plain.losses
    torch.testing.assert_close(straight.losses, plain.losses, **tolerance.EIGHT_BIT_MOMENTS)
    train(tmp_path / "b", model=wide_model(), stop_after=4, **settings)
    stored = checkpoint.read_tensors(tmp_path / "b" / "step-000004", "optimizer")
    assert stored["q_proj.weight|state1"].dtype == torch.uint8
    resumed, report = train(tmp_path / "b", model=wide_model(), resume=True, **settings)
    assert report.losses == straight.losses and same(weights(resumed), weights(model))
    with pytest.raises(ValueError, match="optimizer was 'adamw_8bit', now 'adamw'"):
        train(tmp_path / "a", resume=True, **{**settings, "optimizer": "adamw"})


@pytest.mark.gpu
def test_8_bit_moments_resume_on_a_gpu(tmp_path, bitsandbytes):
    settings = {"lora": None, "lr": 0.005, "max_steps": 8, "optimizer": "adamw_8bit"}
    _, straight = train(tmp_path / "a", model=wide_model("cuda"), **settings)
    train(tmp_path / "b", model=wide_model("cuda"), stop_after=4, **settings)
    _, report = train(tmp_path / "b", model=wide_model("cuda"), resume=True, **settings)
    torch.testing.assert_close(report.losses, straight.losses, **tolerance.FP32_SAME_MATHS)


def test_8_bits_without_the_library_is_refused_before_anything_is_loaded(monkeypatch):
    def missing(name):
        raise ImportError("no such module")

    monkeypatch.setattr("sloth.train.optim.importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'sloth-llm\[bnb\]'"):
        Trainer(FakeModel(), "no-such-file.jsonl", optimizer="adamw_8bit")


# -- NEFTune ---------------------------------------------------------------------------------------


def test_noise_has_its_size_in_training_and_is_absent_elsewhere():
    network = FakeNetwork(50, 16)
    tokens = torch.randint(0, 50, (4, 9))
    clean = network.embed_tokens(tokens)
    with noisy_embeddings(network, 5.0):
        noise = network.embed_tokens(tokens) - clean
        network.eval()
        assert torch.equal(network.embed_tokens(tokens), clean)
        network.train()
    largest = 5.0 / math.sqrt(9 * 16)
    assert 0.9 * largest < noise.abs().max() <= largest * (1 + 1e-4)
    assert torch.equal(network.embed_tokens(tokens), clean)
    with noisy_embeddings(network, None):
        assert torch.equal(network.embed_tokens(tokens), clean)


def test_noise_without_an_embedding_is_refused():
    with pytest.raises(ValueError, match="needs one embed_tokens, the model has 0"):
        with noisy_embeddings(nn.Linear(2, 2), 5.0):
            pass


# -- fp32 masters ----------------------------------------------------------------------------------


def test_masters_keep_what_bf16_rounds_away():
    """A thousand steps of 1e-4 from 1: bf16 alone would not move at all."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"w": parameter})
    optimizer = torch.optim.SGD(masters.by_name.values(), lr=1e-4)
    with masters.collecting_gradients():
        for _ in range(1000):
            parameter.sum().backward()
            optimizer.step()
            masters.write_back()
            masters.drop_gradients()
    assert torch.equal(parameter.float(), torch.tensor(0.9).bfloat16().float().expand(4))
    still = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    still.grad = torch.ones_like(still)
    torch.optim.SGD([still], lr=1e-4).step()
    assert torch.equal(still, torch.ones_like(still))


def test_micro_batches_add_up_in_fp32():
    """256 + 1 is 256 in bf16."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = Masters({"w": parameter})
    with masters.collecting_gradients():
        for value in (256.0, 1.0, 1.0):
            (parameter * value).sum().backward()
            assert parameter.grad is None
    assert masters.by_name["w"].grad.item() == 258.0


def test_full_training_of_a_bf16_model_saves_fp32_masters_and_learns(tmp_path):
    model = FakeModel()
    model.network.bfloat16()
    _, report = train(tmp_path / "run", model=model, lora=None, lr=1e-3, max_steps=12)
    stored = checkpoint.read_tensors(report.paths["checkpoint"], "trainable")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    for name, parameter in model.network.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(stored[name].bfloat16(), parameter)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in stored.values())
    assert report.losses[-1] < report.losses[0]


def test_fp32_parameters_are_their_own_masters():
    network = FakeModel().network
    masters = Masters(trainable(network))
    assert masters.count == 0
    assert all(masters.by_name[name] is p for name, p in network.named_parameters())
