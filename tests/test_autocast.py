"""`torch.autocast` around a model: at the levels `ops` and `fused` it changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.function import once_differentiable

import sloth
from sloth.infer.generate import generate_tokens
from sloth.kernels.function import Function, is_autocast_on
from sloth.lora import is_lora_name
from tests.oracles import save_tiny

HEAD = ["q_proj", "lm_head"]
# name -> (model type, settings of the model, how it is loaded, its adapter)
KINDS = {
    "dense": ("llama", {}, {}, {}),
    "nf4": ("llama", {}, dict(quant="nf4"), {}),
    "dora": ("llama", {}, {}, dict(use_dora=True)),
    "tied": ("llama", dict(tie_word_embeddings=True), {}, {}),
    "gemma2": ("gemma2", dict(head_dim=16, query_pre_attn_scalar=16), {}, {}),
    "qwen3": ("qwen3", {}, {}, {}),
    "head": ("llama", {}, {}, dict(targets=[*HEAD, "embed_tokens"])),
    "dora head": ("llama", {}, {}, dict(targets=HEAD, use_dora=True)),
    "rows": ("llama", dict(tie_word_embeddings=True), {}, dict(trainable_token_indices=[5, 9])),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    model_type, config, *settings = KINDS[request.param]
    folder = save_tiny(
        model_type, tmp_path_factory.mktemp("autocast"), num_hidden_layers=2, **config
    )
    return folder, *settings


def load(kind, level):
    """An fp32 model whose adapter, without dropout, changes what it says."""
    folder, settings, adapter = kind
    first = "auto" if level == "fused" else level
    model = sloth.load(folder, device="cpu", dtype="float32", level=first, **settings)
    model.add_lora(**dict(r=4, dropout=0.0, targets="all-linear") | adapter)
    assert model.level == level
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if is_lora_name(name) and "magnitude" not in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def some_tokens():
    return torch.randint(3, 150, (2, 13), generator=torch.Generator().manual_seed(2))


def autocast(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def with_gradients(model, forward, inside_forward, inside_backward):
    model.network.zero_grad()
    with autocast(inside_forward):
        value = forward(model)
    weights = torch.linspace(0.5, 1.5, value.numel()).view_as(value)
    with autocast(inside_backward):
        value.backward(weights.to(value.dtype))
    found = {n: p.grad for n, p in model.network.named_parameters() if p.requires_grad}
    assert found and all(grad is not None for grad in found.values())
    return {"value": value.detach()} | found


FORWARDS = {
    "loss": lambda model: model.loss(some_tokens(), some_tokens()),
    "logprobs": lambda model: model.logprobs(some_tokens()),
    "logits": lambda model: model.logits(some_tokens()),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("level", ["ops", "fused"])
def test_values_and_gradients_under_autocast_are_those_without(kind, level, name):
    model = load(kind, level)
    expected = with_gradients(model, FORWARDS[name], False, False)
    for inside in ((True, True), (True, False), (False, True)):
        found = with_gradients(model, FORWARDS[name], *inside)
        assert found.keys() == expected.keys()
        differing = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not differing, inside
        assert all(found[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.parametrize("level", ["ops", "fused"])
def test_logits_without_a_gradient_and_generation_under_autocast_are_those_without(kind, level):
    model = load(kind, level)

    @torch.no_grad()
    def said():
        logits, hidden = model.logits(some_tokens()), model.hidden(some_tokens())
        answers = list(generate_tokens(model.network, some_tokens().tolist(), 6))
        return logits, hidden, answers

    expected = said()
    with autocast():
        found = said()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_the_reference_level_follows_autocast_as_plain_torch_does(tmp_path):
    model = load((save_tiny("llama", tmp_path, num_hidden_layers=2), {}, {}), "reference")
    with autocast():
        assert model.logits(some_tokens()).dtype == torch.bfloat16


class Product(Function):
    """x w, which notes whether autocast was on."""

    seen: list[bool] = []

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        Product.seen.append(is_autocast_on(x.device))
        return x @ w

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        Product.seen.append(is_autocast_on(x.device))
        return dy @ w.T, x.T @ dy


def test_a_function_sees_no_autocast_and_leaves_it_on_behind_itself():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with autocast():
        y = Product.apply(x, w)
        with torch.no_grad():
            assert Product.apply(x, w).dtype == torch.float32
        y.sum().backward()
        assert is_autocast_on(x.device)
    assert y.dtype == torch.float32 and Product.seen == [False] * 3
    assert torch.equal(x.grad, torch.ones(3, 2) @ w.T.detach())


def test_an_error_in_a_function_leaves_autocast_on():
    with autocast(), pytest.raises(RuntimeError):
        Product.apply(torch.randn(3, 4), torch.randn(3, 4))
    with autocast():
        with pytest.raises(RuntimeError):
            Product.apply(torch.randn(3, 4), torch.randn(3, 4))
        assert is_autocast_on(torch.device("cpu"))


def test_a_function_is_differentiable_once():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2)
    dy = torch.ones(3, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(Product.apply(x, w), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_function_without_autocast_enters_no_context(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a context was entered")

    monkeypatch.setattr(torch, "autocast", refuse)
    Product.apply(torch.randn(3, 4, requires_grad=True), torch.randn(4, 2)).sum().backward()
    Product.apply(torch.empty(3, 4, device="meta"), torch.empty(4, 2, device="meta"))
