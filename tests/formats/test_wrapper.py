"""Multimodal checkpoints: the text tower under every prefix, what is left out, contradictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sloth
from sloth.assemble import assemble
from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.formats.checkpoint import SafetensorsFolder
from sloth.formats.wrapper import TextTower, text_config
from sloth.models import ARCHITECTURES
from tests.models.common import LINEAR, random_tokens, read_config
from tests.oracles import hf_logits, hf_wrapper_logits, save_tiny_wrapper

TEXTS = {
    "gemma3": dict(
        model_type="gemma3_text",
        num_hidden_layers=7,
        sliding_window=16,
        query_pre_attn_scalar=24,
        tie_word_embeddings=True,
    ),
    "mistral3": dict(model_type="ministral3", tie_word_embeddings=False),
    "mistral3_older": dict(model_type="mistral", sliding_window=None, rope_parameters=LINEAR),
}
# on disk by release; {} is the name inside the text model
PREFIXES = {
    "as_saved_today": ("language_model.model.{}", "language_model.lm_head.{}"),
    "as_saved_by_4_52": ("model.language_model.{}", "lm_head.{}"),
    "plain": ("model.{}", "lm_head.{}"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wrappers")
    return {
        name: save_tiny_wrapper(name.split("_")[0], root / name, text)
        for name, text in TEXTS.items()
    }


def rewritten(source: Path, folder: Path, prefix: str, **config: object) -> Path:
    """The wrapper with its text tensors under another prefix and other words in its config."""
    body, head = PREFIXES[prefix]
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.startswith("language_model.model."):
            name = body.format(name.removeprefix("language_model.model."))
        elif name.startswith("language_model.lm_head."):
            name = head.format(name.removeprefix("language_model.lm_head."))
        elif prefix == "as_saved_by_4_52":
            name = f"model.{name}"
        tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(read_config(source) | config))
    return folder


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TEXTS)
def test_logits_equal_the_whole_models_on_text(folders, name, dtype):
    tokens = random_tokens()
    with torch.no_grad():
        model = sloth.load(folders[name], level="reference", dtype=dtype, device="cpu")
        assert torch.equal(model.logits(tokens), hf_wrapper_logits(folders[name], tokens, dtype))


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("name", TEXTS)
def test_the_text_tower_is_the_text_models_own_network(folders, name, tmp_path):
    """So that what tests show of the text model, its twin among it, they show of this."""
    tower = sloth.load(folders[name], device="cpu").add_lora().network
    text = sloth.load(folders[name], device="cpu").save_base(tmp_path / "text")
    own = sloth.load(text, device="cpu").add_lora().network
    assert type(tower) is ARCHITECTURES[TEXTS[name]["model_type"]][1] is type(own)
    assert tower.model_type == own.model_type == TEXTS[name]["model_type"]
    assert tower.config == own.config and tower.specs == own.specs
    tensors = dict(own.named_parameters())
    assert tensors.keys() == {parameter for parameter, _ in tower.named_parameters()}
    for parameter, tensor in tower.named_parameters():
        assert "lora" in parameter or torch.equal(tensor, tensors[parameter])


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", TEXTS)
def test_every_prefix_on_disk_is_read(folders, name, prefix, tmp_path):
    folder = rewritten(folders[name], tmp_path / "rewritten", prefix)
    tokens = random_tokens()
    with torch.no_grad():
        ours = sloth.load(folder, device="cpu").logits(tokens)
        assert torch.equal(ours, sloth.load(folders[name], device="cpu").logits(tokens))


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_left_out_is_said_and_is_of_images_alone(folders, name):
    with pytest.warns(UserWarning, match=r"tensors \(multi_modal_projector, vision_tower\)"):
        parts = assemble(folders[name], quant=None, device=torch.device("cpu"), dtype=torch.float32)
    on_disk = load_file(folders[name] / "model.safetensors")
    left_out = TextTower(SafetensorsFolder(folders[name])).left_out
    assert set(left_out) == {n for n in on_disk if not n.startswith("language_model.")}
    assert len(left_out) + len(parts.network.state_dict()) == len(on_disk)


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_whether_the_head_is_tied_is_what_the_tensors_say(folders, name, said, tmp_path):
    config = read_config(folders[name])
    contradicting = dict(
        tie_word_embeddings=said,
        text_config=config["text_config"] | dict(tie_word_embeddings=not said),
    )
    folder = rewritten(folders[name], tmp_path / "said", "as_saved_today", **contradicting)
    tensors = load_file(folder / "model.safetensors")
    assert "language_model.lm_head.weight" not in tensors
    assert sloth.load(folder, device="cpu").network.tied
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = embedding.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert not sloth.load(folder, device="cpu").network.tied


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("name", TEXTS)
def test_the_saved_base_is_a_text_model_that_hugging_face_loads(folders, name, tmp_path):
    tokens = random_tokens()
    model = sloth.load(folders[name], level="reference", device="cpu")
    saved = model.save_base(tmp_path / "saved")
    assert read_config(saved)["model_type"] == TEXTS[name]["model_type"]
    expected = hf_wrapper_logits(folders[name], tokens, torch.float32)
    assert torch.equal(hf_logits(saved, tokens), expected)


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_4_bit_tensors_are_read_behind_every_prefix(folders, name, prefix, tmp_path):
    text = sloth.load(folders[name], quant="nf4", level="ops", device="cpu")
    saved = text.save_base(tmp_path / "text", quant="nf4")
    tensors = load_file(saved / "model.safetensors")
    settings = read_config(saved)
    config = read_config(folders[name])
    config |= dict(quantization_config=settings.pop("quantization_config"), text_config=settings)
    folder = tmp_path / "wrapper"
    folder.mkdir()
    save_file({f"language_model.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    again = sloth.load(rewritten(folder, tmp_path / "rewritten", prefix), level="ops", device="cpu")
    tokens = random_tokens()
    with torch.no_grad():
        assert again.is_quantized and torch.equal(again.logits(tokens), text.logits(tokens))


def test_the_wrappers_own_ids_and_quantization_count():
    config = dict(
        model_type="gemma3",
        text_config=dict(hidden_size=8, eos_token_id=1),
        vision_config={},
        eos_token_id=[1, 106],
        quantization_config=dict(load_in_4bit=True),
    )
    text = text_config(config)
    assert text["model_type"] == "gemma3_text" and text["eos_token_id"] == [1, 106]
    assert text["quantization_config"] == dict(load_in_4bit=True)


def test_what_a_wrapper_says_and_nobody_knows_is_refused():
    config = dict(model_type="mistral3", text_config={}, vision_config={})
    with pytest.raises(UnsupportedConfig, match="frobnication"):
        text_config(config | dict(frobnication=1))
    assert text_config(config | dict(frobnication=1), ["frobnication"])
    with pytest.raises(UnsupportedConfig, match="text_config"):
        text_config(dict(model_type="gemma3"))
    with pytest.raises(UnsupportedConfig, match="expected an object"):
        text_config(dict(model_type="gemma3", text_config="x"))


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
def test_strangers_and_doubles_are_refused(folders, tmp_path):
    tensors = load_file(folders["gemma3"] / "model.safetensors")
    name = "language_model.model.norm.weight"
    for case, (extra, words) in enumerate(
        (("language_model.extra.weight", "belong to nothing"), ("model.norm.weight", "are both"))
    ):
        folder = rewritten(folders["gemma3"], tmp_path / str(case), "as_saved_today")
        save_file(tensors | {extra: tensors[name].clone()}, folder / "model.safetensors")
        with pytest.raises(CheckpointMismatch, match=words):
            sloth.load(folder, device="cpu")


def test_a_text_model_nobody_knows_is_named(folders, tmp_path):
    config = read_config(folders["mistral3"])
    text = config["text_config"] | dict(model_type="mistral4")
    folder = rewritten(folders["mistral3"], tmp_path / "x", "plain", text_config=text)
    with (
        pytest.warns(UserWarning, match="reads images"),
        pytest.raises(UnsupportedConfig, match="'mistral4'"),
    ):
        sloth.load(folder, device="cpu")
