"""New tokens: tokenizer and matrices grow, and every way out carries the rows (row 29)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

import sloth
from sloth import errors
from sloth.text.tokenizer import Tokenizer
from tests.oracles import (
    hf_logits,
    hf_tokenizer,
    peft_model,
    resized_hf_folder,
    save_peft_adapter,
    save_tiny,
)
from tests.test_lora import randomised
from tests.text.test_tokenizer import byte_level_folder, sentencepiece_model
from tests.tolerance import FP32_ADAPTER, FP32_CHAIN

NEW = ["<think>", "</think>", "<tool>"]
TEXT = "hello<think> the user</think> in <tool>two lines"
VOCABULARY = 303  # of the tokenizer, two added ones among them
SMALL = dict(num_hidden_layers=2, head_dim=16, pad_token_id=2)
# (rows of the base, tied): as many as tokens; some to spare, as Qwen has them.
BASES = {
    "exact": (VOCABULARY, False),
    "exact tied": (VOCABULARY, True),
    "padded": (VOCABULARY + 2, False),
    "padded tied": (VOCABULARY + 8, True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("new_tokens")
    for name, (rows, tied) in BASES.items():
        folder = save_tiny("llama", root / name, vocab_size=rows, tie_word_embeddings=tied, **SMALL)
        byte_level_folder(folder)
    return {name: root / name for name in BASES}


def grown(folder: Path, **settings) -> tuple[sloth.Model, list[int]]:
    model = sloth.load(folder, device="cpu", **settings)
    return model, model.add_tokens(NEW)


def tokens_of(model: sloth.Model) -> torch.Tensor:
    return torch.tensor([model.tokenizer.encode(TEXT)])


def logits(model: sloth.Model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(tokens)


@pytest.mark.parametrize("base", BASES)
def test_rows_grow_as_far_as_needed_and_old_ones_stay(folders, base):
    rows = BASES[base][0]
    before = sloth.load(folders[base], device="cpu")
    model, ids = grown(folders[base])
    assert ids == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert model.tokenizer.vocab_size == VOCABULARY + 3
    assert model.config.vocab_size == max(rows, VOCABULARY + 3)
    old, new = (m.network.model.embed_tokens.weight for m in (before, model))
    assert new.shape[0] == model.config.vocab_size
    assert torch.equal(new[:VOCABULARY], old[:VOCABULARY])
    mean = old[:VOCABULARY].mean(0)
    assert_close(new[ids], mean.expand(3, -1), **FP32_CHAIN)
    tokens = torch.arange(3, 23)[None]
    width = min(rows, VOCABULARY)
    ours, theirs = logits(model, tokens), logits(before, tokens)
    assert_close(ours[..., :width], theirs[..., :width], **FP32_CHAIN)


def test_new_rows_start_as_asked(folders):
    def rows(init: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = sloth.load(folders["exact"], device="cpu")
        ids = model.add_tokens(NEW, init=init)
        return model.network.model.embed_tokens.weight[ids].detach()

    assert torch.equal(rows("zeros"), torch.zeros(3, 64))
    normal = rows("normal")
    assert not torch.equal(normal[0], normal[1])
    base = sloth.load(folders["exact"], device="cpu").network.model.embed_tokens.weight.detach()
    assert 0.3 < ((normal - base.mean(0)).std() / base.std()).item() < 3
    with pytest.raises(ValueError, match="mean, normal, zeros"):
        rows("random")


@pytest.mark.parametrize("special", [False, True])
def test_tokenizer_files_are_read_alike_by_hugging_face(folders, tmp_path, special):
    model = sloth.load(folders["exact"], device="cpu")
    ids = model.add_tokens(NEW, special=special)
    model.tokenizer.save(tmp_path)
    theirs, ours = hf_tokenizer(tmp_path), Tokenizer.from_folder(tmp_path)
    encoded = theirs.encode(TEXT)
    assert set(ids) <= set(encoded)
    assert model.tokenizer.encode(TEXT) == encoded == ours.encode(TEXT)
    for text in (ours.decode(encoded), theirs.decode(encoded, skip_special_tokens=True)):
        assert ("</think>" in text) == (not special)


def test_a_sentencepiece_tokenizer_grows_too(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    before = Tokenizer.from_folder(tmp_path)
    after = before.with_tokens(NEW)
    (tmp_path / "out").mkdir()
    after.save(tmp_path / "out")
    for tokenizer in (after, Tokenizer.from_folder(tmp_path / "out")):
        ids = [tokenizer.id_of(token) for token in NEW]
        assert ids == list(range(before.vocab_size, before.vocab_size + 3))
        assert set(ids) <= set(tokenizer.encode(TEXT))
        assert tokenizer.vocab_size == before.vocab_size + 3


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_adapter_carries_the_rows(folders, tmp_path, base, quant):
    model, ids = grown(folders[base], quant=quant)
    randomised(model.add_lora(targets=["v_proj"], r=4))
    tokens = tokens_of(model)
    ours = logits(model, tokens)
    model.save_adapter(tmp_path / "adapter")
    again = sloth.load(folders[base], adapter=tmp_path / "adapter", device="cpu", quant=quant)
    assert again.tokenizer.encode(TEXT) == tokens[0].tolist()
    assert torch.equal(logits(again, tokens), ours)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    rows = {name: size for name, size in sizes.items() if "lora" not in name}
    assert list(rows.values()) == [[3, 64]] * (1 if BASES[base][1] else 2)
    if quant is None:
        resized = resized_hf_folder(folders[base], tmp_path / "resized", model.config.vocab_size)
        with torch.no_grad():
            theirs = peft_model(resized, tmp_path / "adapter")(tokens).logits
        assert_close(ours, theirs, **FP32_ADAPTER)


@pytest.mark.parametrize("base", BASES)
def test_merged_and_full_exports_have_the_rows(folders, tmp_path, base):
    model, ids = grown(folders[base])
    model.save_base(tmp_path / "base")
    tokens = tokens_of(model)
    assert_close(hf_logits(tmp_path / "base", tokens), logits(model, tokens), **FP32_CHAIN)
    randomised(model.add_lora(targets=["v_proj"], r=4))
    model.save_merged(tmp_path / "merged")
    ours = logits(model, tokens)
    assert_close(hf_logits(tmp_path / "merged", tokens), ours, **FP32_CHAIN)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == model.config.vocab_size
    assert config["tie_word_embeddings"] == BASES[base][1]
    again = sloth.load(tmp_path / "merged", device="cpu")
    assert again.tokenizer.encode(TEXT) == tokens[0].tolist()
    model.save_gguf(tmp_path / "model.gguf", quant="f16")
    gguf = sloth.load(tmp_path / "model.gguf", device="cpu")
    assert gguf.tokenizer.encode(TEXT) == tokens[0].tolist()
    assert gguf.config.vocab_size >= model.config.vocab_size


def test_rows_that_peft_writes_along_with_a_low_rank_embedding_are_read(folders, tmp_path):
    resized = resized_hf_folder(folders["exact"], tmp_path / "resized", VOCABULARY + 3)
    theirs = save_peft_adapter(
        resized, tmp_path / "adapter", target_modules=["v_proj", "embed_tokens"], r=4
    )
    model = sloth.load(folders["exact"], adapter=tmp_path / "adapter", device="cpu")
    tokens = torch.arange(VOCABULARY - 9, VOCABULARY + 3)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
    # the head's new rows are in no file: PEFT writes those of adapted modules alone
    ours = logits(model, tokens)[..., :VOCABULARY]
    assert_close(ours, expected[..., :VOCABULARY], **FP32_ADAPTER)


def test_only_the_new_rows_are_trained(folders):
    model, ids = grown(folders["exact"])
    model.add_lora(targets=["v_proj"], r=4)
    tokens = tokens_of(model)
    model.loss(tokens, tokens).backward()
    assert model.network.model.embed_tokens.weight.grad is None
    rows = model.network.model.embed_tokens.token_adapter
    assert rows.indices.tolist() == ids
    assert rows.trainable_tokens_delta.grad.abs().sum(1).min() > 0


def test_rows_trained_in_full_need_no_list_of_their_own(folders, tmp_path):
    model, ids = grown(folders["exact"])
    model.add_lora(targets=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert model.lora_config.trainable_token_indices is None
    model.save_adapter(tmp_path / "adapter")
    again = sloth.load(folders["exact"], adapter=tmp_path / "adapter", device="cpu")
    tokens = tokens_of(model)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_what_would_lose_the_rows_is_refused(folders):
    model, _ = grown(folders["exact tied"])
    with pytest.raises(errors.AdapterMismatch, match="lm_head"):
        model.add_lora(modules_to_save=["embed_tokens"])
    with pytest.raises(errors.AdapterMismatch, match="new tokens"):
        model.add_lora(targets=["v_proj", "embed_tokens"])
    model.add_lora(targets=["v_proj"])
    with pytest.raises(errors.AdapterMismatch, match="add tokens first"):
        model.add_tokens(["<more>"])


@pytest.mark.parametrize("tokens", [[], ["<s>"], ["<a>", "<a>"], [""], "<think>"])
def test_tokens_without_meaning_are_refused(folders, tokens):
    model = sloth.load(folders["exact"], device="cpu")
    with pytest.raises(ValueError, match="add_tokens|tokens must be"):
        model.add_tokens(tokens)
    assert model.config.vocab_size == VOCABULARY
