"""What a forward pass is given: which tokens, labels, positions and divisors are taken, and what
is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.kernels.dispatch import LEVELS
from sloth.models.inputs import check_labels, check_tokens, checked_divisor
from tests.oracles import save_tiny_llama

TOKENS = torch.randint(3, 160, (1, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("inputs") / "base")


WRONG_INPUTS = {
    "a vector": (dict(tokens=TOKENS[0]), r"tokens.*\[20\]"),
    "floats": (dict(tokens=TOKENS.float()), "tokens.*float32"),
    "bytes": (dict(tokens=TOKENS.byte()), "tokens must be int32 or int64 .* got uint8"),
    "short tokens": (dict(tokens=TOKENS.short()), "tokens must be int32 or int64 .* got int16"),
    "marks": (dict(tokens=TOKENS > 9), "tokens must be int32 or int64 .* got bool"),
    "labels of floats": (dict(labels=TOKENS.float()), "labels must be int32 or int64, got float32"),
    "marks as labels": (dict(labels=TOKENS > 9), "labels must be int32 or int64, got bool"),
    "short labels": (dict(labels=TOKENS.short()), "labels must be int32 or int64, got int16"),
    "labels of bytes": (dict(labels=TOKENS.byte()), "labels must be int32 or int64, got uint8"),
    "a list": (dict(tokens=TOKENS.tolist()), "tokens must be a tensor .* got a list"),
    "labels of a list": (dict(labels=TOKENS.tolist()), "labels must be a tensor .* got a list"),
    "no tokens": (dict(tokens=TOKENS[:, :0]), r"tokens.*\[1, 0\]"),
    "no rows": (dict(tokens=TOKENS[:0]), r"tokens.*\[0, 20\]"),
    "an id too large": (dict(tokens=TOKENS + 160), "tokens hold .* from 0 to 159"),
    "an id below zero": (dict(tokens=TOKENS - 160), "tokens hold -"),
    "fewer positions": (dict(positions=torch.arange(19)), r"positions.*\[19\]; expected \[20\]"),
    "positions of more rows": (dict(positions=torch.zeros(2, 20).long()), r"positions.*\[2, 20\]"),
    "fewer labels": (dict(labels=TOKENS[:, :-1]), "labels"),
    "a label too large": (dict(labels=TOKENS + 160), "labels hold"),
    "another label to ignore": (dict(labels=torch.full_like(TOKENS, -1)), "labels hold -1"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_tokens_positions_and_labels_are_refused(folder, name):
    model = sloth.load(folder, device="cpu")
    wrong, words = WRONG_INPUTS[name]
    given = dict(tokens=TOKENS) | wrong
    calls = (model.loss, model.logprobs, *([model.logits, model.hidden] * ("labels" not in wrong)))
    for call in calls:
        labels = dict(labels=given["tokens"]) if call == model.loss else {}
        with pytest.raises(ValueError, match=words):
            call(**labels | given)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("adapter", [{}, dict(trainable_token_indices=[5, 9])], ids=str)
def test_tokens_and_labels_in_32_bits_give_what_64_give(folder, level, adapter):
    first = "auto" if level == "fused" else level
    model = sloth.load(folder, device="cpu", level=first).add_lora(**adapter)
    assert model.level == level
    labels = TOKENS.clone()
    labels[:, :7] = -100
    positions = torch.arange(20) % 12
    for call in (model.loss, model.logprobs):
        expected = call(TOKENS, labels, positions)
        for given in ((TOKENS.int(), labels.int()), (TOKENS.int(), labels), (TOKENS, labels.int())):
            assert torch.equal(call(*given, positions), expected)
    assert torch.equal(model.logprobs(TOKENS.int()), model.logprobs(TOKENS))
    assert torch.equal(model.logits(TOKENS.int()), model.logits(TOKENS))


@pytest.mark.parametrize("level", LEVELS)
def test_a_number_of_trained_tokens_may_be_a_tensor_of_one_element(folder, level):
    first = "auto" if level == "fused" else level
    model = sloth.load(folder, device="cpu", level=first).add_lora()
    expected = model.loss(TOKENS, TOKENS, num_trained=10)
    assert expected.shape == ()
    for number in (torch.tensor(10), torch.tensor([10]), torch.tensor([[10.0]])):
        loss = model.loss(TOKENS, TOKENS, num_trained=number)
        assert loss.shape == () and torch.equal(loss, expected)
        loss.backward()


@pytest.mark.parametrize("number", [0, -3, torch.tensor([10, 10]), torch.empty(0)], ids=str)
def test_another_number_of_trained_tokens_is_refused(folder, number):
    model = sloth.load(folder, device="cpu")
    with pytest.raises(ValueError, match="num_trained must be"):
        model.loss(TOKENS, TOKENS, num_trained=number)


def test_a_number_of_trained_tokens_that_is_a_tensor_is_not_waited_for():
    assert checked_divisor(torch.empty(1, device="meta")).shape == ()


def test_ids_on_another_device_are_not_waited_for(folder):
    model = sloth.load(folder, device="cpu")
    check_tokens(torch.full((1, 3), 10**6, device="meta"), model.config.vocab_size)
    with pytest.raises(ValueError, match="tokens"):
        check_tokens(torch.zeros(3, device="meta"), model.config.vocab_size)
    on_meta = torch.full((1, 3), 10**6, device="meta")
    check_labels(on_meta, on_meta, model.config.vocab_size)
    with pytest.raises(ValueError, match="labels must be int32 or int64, got bool"):
        check_labels(on_meta.bool(), on_meta, model.config.vocab_size)
