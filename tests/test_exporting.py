"""Exports: names and bytes kept, read by Hugging Face, verified first, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import sloth
from sloth import errors, exporting
from tests.oracles import WHOLE_BLOCKS, bnb_logits, hf_logits, hf_tokenizer, save_tiny_llama
from tests.test_lora import randomised
from tests.text.test_tokenizer import byte_level_folder
from tests.tolerance import FP32_CHAIN, MERGED_BF16_DIVERGENCE

TOKENS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("exporting") / "base", **WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exporting_tied")
    return save_tiny_llama(
        root / "base", tie_word_embeddings=True, attention_bias=True, **WHOLE_BLOCKS
    )


def logits(model: sloth.Model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


def test_folders_may_begin_at_home(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = sloth.load(folder, device="cpu")
    assert model.save_base("~/base") == tmp_path / "base"
    model.add_lora(sloth.LoraConfig(r=2))
    assert model.save_adapter("~/adapter") == tmp_path / "adapter"
    assert model.save_merged("~/merged") == tmp_path / "merged"
    assert sloth.load("~/base", adapter="~/adapter", device="cpu").has_adapter


@pytest.mark.parametrize("which", ["folder", "tied"])
def test_base_saved_dense_has_the_same_names_and_bytes(which, request, tmp_path):
    source = request.getfixturevalue(which)
    sloth.load(source, device="cpu").save_base(tmp_path / "base")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "base" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(hf_logits(tmp_path / "base", TOKENS), hf_logits(source, TOKENS))


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("which", ["folder", "tied"])
def test_merged_model_equals_the_adapted_one_in_hugging_face(which, quant, request, tmp_path):
    source = request.getfixturevalue(which)
    model = randomised(sloth.load(source, quant=quant, device="cpu").add_lora())
    model.save_merged(tmp_path / "merged")
    assert_close(hf_logits(tmp_path / "merged", TOKENS), logits(model), **FP32_CHAIN)
    assert_close(logits(sloth.load(tmp_path / "merged", device="cpu")), logits(model), **FP32_CHAIN)


def test_merged_dtype_is_the_one_asked_for(folder, tmp_path):
    model = randomised(sloth.load(folder, device="cpu").add_lora())
    model.save_merged(tmp_path / "merged", dtype="bfloat16")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("which", ["folder", "tied"])
@pytest.mark.parametrize("loaded_quant", [None, "nf4"])
def test_nf4_base_loads_in_hugging_face_with_equal_logits(which, loaded_quant, request, tmp_path):
    model = sloth.load(request.getfixturevalue(which), quant=loaded_quant, device="cpu")
    model.save_base(tmp_path / "nf4", quant="nf4")
    again = sloth.load(tmp_path / "nf4", device="cpu")
    assert again.is_quantized
    assert_close(logits(again), bnb_logits(tmp_path / "nf4", TOKENS), **FP32_CHAIN)
    if loaded_quant == "nf4":
        assert torch.equal(logits(again), logits(model))


def test_base_of_an_adapted_model_is_saved_without_the_adapter(folder, tmp_path):
    config = sloth.LoraConfig(modules_to_save=["embed_tokens", "lm_head"])
    model = randomised(sloth.load(folder, device="cpu").add_lora(config))
    trained = logits(model)
    model.save_base(tmp_path / "base")
    assert torch.equal(hf_logits(tmp_path / "base", TOKENS), hf_logits(folder, TOKENS))
    assert torch.equal(logits(model), trained)


def test_nf4_base_with_adapter_reloads_to_the_same_logits(folder, tmp_path):
    model = randomised(sloth.load(folder, quant="nf4", device="cpu").add_lora())
    model.save_base(tmp_path / "base", quant="nf4")
    model.save_adapter(tmp_path / "adapter")
    again = sloth.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_an_existing_folder_is_never_overwritten(folder, tmp_path):
    model = sloth.load(folder, device="cpu").add_lora()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("mine")
    for save in (model.save_adapter, model.save_merged, model.save_base):
        with pytest.raises(errors.OutputExists, match="there"):
            save(tmp_path / "there")
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["precious.txt"]


def test_a_damaged_adapter_is_noticed_and_the_model_stays_as_it_was(folder, tmp_path, monkeypatch):
    model = randomised(sloth.load(folder, device="cpu").add_lora(r=2))
    before, read = logits(model), exporting.read_adapter

    def damaged(path: Path):
        files = read(path)
        next(iter(files.tensors.values())).mul_(2)
        return files

    monkeypatch.setattr(exporting, "read_adapter", damaged)
    with pytest.raises(errors.AdapterMismatch, match="read back, 1 of the adapter's tensors"):
        model.save_adapter(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("room, place", [(1.4, "cuda"), (1.2, "cpu")])
def test_a_model_is_read_back_where_all_of_it_fits(tied, room, place, monkeypatch):
    model = sloth.load(tied, device="cpu")
    nbytes = sum(parameter.nbytes for parameter in model.network.parameters())
    monkeypatch.setattr(sloth.Model, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(room * nbytes), 0))
    assert exporting._device_with_room(model).type == place


def test_a_damaged_export_is_noticed_and_not_published(folder, tmp_path, monkeypatch):
    model = randomised(sloth.load(folder, device="cpu").add_lora())
    monkeypatch.setattr(exporting, "merged_weight", lambda module: module.base.detach() * 0.5)
    with pytest.raises(errors.CheckpointMismatch, match="differ"):
        model.save_merged(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_fails_leaves_the_network_in_training_mode(folder, monkeypatch):
    network = sloth.load(folder, device="cpu").network.train()
    monkeypatch.setattr(network, "forward", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exporting.probe_logits(network, torch.device("cpu"))
    assert all(module.training for module in network.modules())


def test_a_fully_trained_model_is_saved_as_trained(folder, tmp_path):
    model = randomised(sloth.load(folder, device="cpu"))
    model.save_merged(tmp_path / "merged")
    assert_close(hf_logits(tmp_path / "merged", TOKENS), logits(model), **FP32_CHAIN)


TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)
STOP_IDS = [1, 331]  # </s> and <|end|>


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """A tiny model with tokenizer, chat template and two stop ids."""
    folder = save_tiny_llama(tmp_path / "chat", vocab_size=340, **WHOLE_BLOCKS)
    byte_level_folder(folder, chat_template=TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP_IDS}))
    return folder


def test_exports_carry_the_tokenizer_template_and_stop_ids(chat_folder, tmp_path):
    model = randomised(sloth.load(chat_folder, device="cpu").add_lora())
    assert model.tokenizer.stop_ids == tuple(STOP_IDS)
    model.save_merged(tmp_path / "merged")
    model.save_base(tmp_path / "base", quant="nf4")
    model.save_adapter(tmp_path / "adapter")
    messages = [{"role": "user", "content": "hello world"}]
    ids = model.tokenizer.encode(
        model.tokenizer.chat.render(messages, add_generation_prompt=True), add_special_tokens=False
    )
    for name in ("merged", "base", "adapter"):
        theirs = hf_tokenizer(tmp_path / name)
        rendered = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert rendered == ids, name
        settings = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert settings["eos_token_id"] == STOP_IDS, name
    again = sloth.load(tmp_path / "merged", device="cpu")
    assert again.tokenizer.stop_ids == model.tokenizer.stop_ids
    assert again.generate(messages, max_new_tokens=8) == model.generate(messages, max_new_tokens=8)


def test_merged_model_in_bf16_stays_close_to_the_unmerged_one(folder, tmp_path):
    model = randomised(sloth.load(folder, dtype="bfloat16", device="cpu").add_lora())
    model.save_merged(tmp_path / "merged")
    merged = logits(sloth.load(tmp_path / "merged", dtype="bfloat16", device="cpu")).float()
    log_p, log_q = logits(model).float().log_softmax(-1), merged.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert 0 <= divergence < MERGED_BF16_DIVERGENCE
