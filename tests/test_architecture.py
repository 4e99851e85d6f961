"""config.json -> network without weights: what loading, estimates and `data check` make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sloth
from sloth import cli
from sloth.architecture import describe
from sloth.commands import data as data_command
from sloth.errors import CheckpointMismatch
from sloth.estimating import on_meta
from tests.commands.models import save_texts, save_tokenizer
from tests.commands.test_estimate import LLAMA_8B
from tests.formats.test_wrapper import TEXTS
from tests.models.common import read_config
from tests.oracles import hf_ties, save_tiny, save_tiny_wrapper
from tests.tiny_configs import GGUF_TYPES

KINDS = (*GGUF_TYPES, *TEXTS)
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
TIED = "tie_word_embeddings"
# (top level, text_config) of files that there are, None for no word -> whether the head is tied.
SAID = {
    "mistral_small_3": ("mistral3", "mistral", None, None, False),
    "ministral_3_3b": ("mistral3", "ministral3", None, True, True),
    "ministral_3_8b": ("mistral3", "ministral3", None, None, False),
    "ministral_3_8b_saved_by_transformers_5": ("mistral3", "ministral3", True, False, False),
    "untied_as_a_whole": ("gemma3", "gemma3_text", False, None, False),
    "gemma_3_4b": ("gemma3", "gemma3_text", None, None, True),
    "gemma_3_saved_by_transformers_5": ("gemma3", "gemma3_text", True, True, True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every type, each with a tokenizer; wrappers have a tied head."""
    root = tmp_path_factory.mktemp("kinds")
    saved = {kind: save_tiny(kind, root / kind) for kind in GGUF_TYPES}
    for name, text in TEXTS.items():
        saved[name] = save_tiny_wrapper(name.split("_")[0], root / name, text)
    return {kind: save_tokenizer(folder) for kind, folder in saved.items()}


def three_counts(folder: Path) -> list[int]:
    """Parameters as loaded, as estimated, and as `sloth data check` counts them."""
    networks = (sloth.load(folder, device="cpu").network, on_meta(folder, None, torch.float32)[0])
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    return [*counts, data_command._read_model(str(folder), None)[1]]


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("kind", KINDS)
def test_loading_estimates_and_data_check_count_the_same_parameters(folders, kind):
    loaded, estimated, checked = three_counts(folders[kind])
    assert loaded == estimated == checked


@pytest.mark.filterwarnings("ignore:this .* model reads images too")
@pytest.mark.parametrize("kind", TEXTS)
def test_they_count_a_wrappers_own_head(folders, kind, tmp_path):
    folder = tmp_path / "untied"
    folder.mkdir()
    for file in folders[kind].glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folders[kind] / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    counts = three_counts(folder)
    assert counts == [three_counts(folders[kind])[0] + tensors[HEAD].numel()] * 3


@pytest.mark.parametrize("has_head", [True, False])
def test_the_index_tells_of_the_head_before_the_shards_are_there(folders, has_head, tmp_path):
    """As with a model on the hub, whose weights estimates do not fetch."""
    for file in folders["mistral3"].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = [*load_file(folders["mistral3"] / "model.safetensors"), *([HEAD] if has_head else [])]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert describe(tmp_path).config.tie_word_embeddings is not has_head
    config = read_config(tmp_path)
    config["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="asks for 5 layers, and the weights are of 4"):
        sloth.estimate(tmp_path, seq=8)


@pytest.mark.parametrize("case", SAID)
def test_without_tensors_the_text_models_word_says_whether_the_head_is_tied(case, tmp_path):
    wrapper, model_type, whole, text, tied = SAID[case]
    levels = [{} if said is None else {TIED: said} for said in (whole, text)]
    inner = {**LLAMA_8B, "num_hidden_layers": 2, "model_type": model_type}
    estimates = []
    for name, config in (
        ("wrapper", {"model_type": wrapper, "text_config": inner | levels[1], **levels[0]}),
        ("alone", {**inner, TIED: tied}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert describe(tmp_path / name).config.tie_word_embeddings is tied
        estimates.append(sloth.estimate(tmp_path / name, seq=64))
    assert estimates[0].parts == estimates[1].parts


def test_the_text_models_default_is_that_of_transformers():
    """Whose wrapper ties for want of a word, unless the file has a head: the 24B models have."""
    for wrapper, model_type, whole, text, tied in SAID.values():
        if whole is None and text is None:
            assert hf_ties(wrapper, {"model_type": model_type}) == (True, tied)


def test_data_check_refuses_weights_that_cannot_be_read(folders, tmp_path, capsys):
    folder = save_tokenizer(save_tiny("llama", tmp_path / "base"))
    rows = save_texts(tmp_path / "rows.jsonl")
    config = read_config(folder) | dict(quantization_config=dict(quant_method="gptq"))
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    said = []
    for command in (["data", "check", str(rows), "--model"], ["estimate"]):
        assert cli.main([*command, str(folder)]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and "quantized with gptq" in said[0]
