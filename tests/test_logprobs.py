"""`model.hidden`, `model.logprobs` and `model.adapter_off`: what losses of one's own stand on."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import sloth
from sloth.errors import AdapterMismatch
from sloth.kernels.dispatch import LEVELS
from sloth.lora import is_lora_name
from tests import tolerance
from tests.oracles import hf_logits, save_tiny

# gemma2: a tied head with a softcap.
KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
}


def saved(kind, tmp_path_factory):
    model_type = "gemma2" if kind == "gemma2" else "llama"
    where = tmp_path_factory.mktemp("logprobs") / kind
    return save_tiny(model_type, where, num_hidden_layers=2, **KINDS[kind])


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return saved("tied", tmp_path_factory)


def load(folder, level="auto", **settings):
    """A model whose adapter changes what it says."""
    torch.manual_seed(0)
    first = "auto" if level == "fused" else level  # a base that is not frozen yet has no twin
    model = sloth.load(folder, device="cpu", dtype="float32", level=first, **settings)
    model.add_lora(r=4)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if is_lora_name(name):
                parameter.normal_(std=0.1)
    return model


def some_tokens(rows=2, length=13):
    return torch.randint(3, 150, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("level", LEVELS)
def test_logprobs_and_their_gradients_are_those_of_the_logits(folder, level):
    model, tokens = load(folder, level), some_tokens()
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    weights = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))
    found = model.logprobs(tokens)
    assert found.shape == (2, 12) and found.dtype == torch.float32 and model.level == level
    wide = model.logits(tokens)[:, :-1].float().log_softmax(-1)
    expected = wide.gather(-1, tokens[:, 1:, None])[..., 0]
    assert_close(found, expected, **tolerance.FP32_CHAIN)
    ours = torch.autograd.grad((found * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for own, other in zip(ours, theirs, strict=True):
        assert_close(own, other, **tolerance.FP32_CHAIN)


def test_hidden_is_what_the_head_multiplies(folder):
    model, tokens = load(folder), some_tokens()
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 13, 64) and hidden.requires_grad
    assert torch.equal(model.network.head(hidden), model.logits(tokens))


def test_their_sum_is_the_loss_of_padded_and_packed_rows(folder):
    model, tokens = load(folder), some_tokens(2, 14)
    labels = tokens.clone()
    labels[0, :5] = labels[1, 9:] = -100
    positions = torch.cat((torch.arange(6), torch.arange(8))).repeat(2, 1)
    for where in (None, positions):
        found = model.logprobs(tokens, labels, where)
        loss = model.loss(tokens, labels, where, num_trained=1)
        assert_close(-found.sum(), loss, **tolerance.FP32_CHAIN)
        wanted = labels[:, 1:] != -100
        assert not found[~wanted].any()
    assert not found[:, 5].any() and found[1, 4] != 0  # the second document's first token
    alone = model.logprobs(tokens[:, :6], labels[:, :6])
    assert_close(found[:, :5], alone, **tolerance.FP32_CHAIN)
    assert model.logprobs(tokens[:, :1]).shape == (2, 0)


def test_labels_of_another_shape_are_refused(tied):
    with pytest.raises(ValueError, match=r"\[2, 12\], not the \[2, 13\] of tokens"):
        load(tied).logprobs(some_tokens(), some_tokens(2, 12))


# -- the adapter, switched off -------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"quant": "nf4"}, {"level": "ops"}], ids=str)
def test_adapter_off_is_the_base_and_on_again_the_adapter(tied, settings):
    model, tokens = load(tied, **settings), some_tokens()
    base = sloth.load(tied, device="cpu", dtype="float32", **settings).logprobs(tokens)
    before = model.logprobs(tokens)
    for _ in range(2):
        with model.adapter_off():
            assert_close(model.logprobs(tokens), base, **tolerance.FP32_CHAIN)
        assert torch.equal(model.logprobs(tokens), before)
    assert not torch.allclose(before, base)


def test_adapter_off_between_forward_and_backward_changes_no_gradient(tied):
    """The twin folds LoRA into a scratch that both states share."""
    for settings in ({}, {"quant": "nf4"}):
        grads = []
        for look_away in (False, True):
            model = load(tied, **settings)
            loss = model.logprobs(some_tokens()).sum()
            if look_away:
                with torch.no_grad(), model.adapter_off():
                    model.logprobs(some_tokens())
            loss.backward()
            grads.append([p.grad for p in model.network.parameters() if p.requires_grad])
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_adapter_off_puts_matrices_back_that_the_adapter_trains_in_full(tied):
    model = sloth.load(tied, device="cpu", dtype="float32")
    model.add_lora(r=4, modules_to_save=["lm_head", "embed_tokens"])
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    tokens = some_tokens()
    before = model.logits(tokens)
    with pytest.raises(KeyError), model.adapter_off():
        base = model.logits(tokens).detach()
        raise KeyError
    assert_close(base, hf_logits(tied, tokens), **tolerance.FP32_CHAIN)
    assert torch.equal(model.logits(tokens), before) and not torch.allclose(before, base)


def test_adapter_off_without_an_adapter_is_refused(tied):
    model = sloth.load(tied, device="cpu")
    with pytest.raises(AdapterMismatch, match="has no adapter"), model.adapter_off():
        pass
