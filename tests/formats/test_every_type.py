"""Files of every model type, both ways: bitsandbytes folders, PEFT adapters, merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import sloth
from sloth.lora import projections
from sloth.quant.linear4bit import Linear4bit
from tests.models.common import random_tokens
from tests.models.families import FIRST, VARIANTS
from tests.oracles import (
    WHOLE_BLOCKS,
    bnb_logits,
    peft_model,
    save_bnb_folder,
    save_peft_adapter,
    save_tiny,
)
from tests.test_lora import randomised
from tests.tolerance import FP32_ADAPTER, FP32_CHAIN, FP32_MERGE

TOKENS = random_tokens(1, 40)  # past the windows
# Another rank and scale in one place, so that neither can be read off the rest.
PEFT_SETTINGS = dict(
    target_modules="all-linear",
    r=4,
    lora_alpha=6,
    use_rslora=True,
    rank_pattern={r"layers\.1\..*q_proj": 2},
    alpha_pattern={"down_proj": 3},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("every_type")
    return {
        model_type: save_tiny(folder=root / model_type, **VARIANTS[name] | WHOLE_BLOCKS)
        for model_type, name in FIRST.items()
    }


def load(folder: Path, **settings: object) -> sloth.Model:
    return sloth.load(folder, device="cpu", level="ops", **settings)  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: sloth.Model) -> Tensor:
    return model.logits(TOKENS)


@pytest.mark.parametrize("model_type", FIRST)
def test_4_bit_folders_of_bitsandbytes_are_read(folders, model_type, tmp_path):
    folder = save_bnb_folder(folders[model_type], tmp_path / "theirs")
    model = load(folder)
    kinds = {path: type(module) for path, module in projections(model.network).items()}
    assert {path for path, kind in kinds.items() if kind is not Linear4bit} <= {"lm_head"}
    assert_close(logits(model), bnb_logits(folder, TOKENS), **FP32_CHAIN)


@pytest.mark.parametrize("model_type", FIRST)
def test_4_bit_folders_are_read_by_hugging_face(folders, model_type, tmp_path):
    model = load(folders[model_type], quant="nf4")
    saved = model.save_base(tmp_path / "ours", quant="nf4")
    assert_close(logits(model), bnb_logits(saved, TOKENS), **FP32_CHAIN)
    assert torch.equal(logits(load(saved)), logits(model))


@pytest.mark.parametrize("model_type", FIRST)
def test_adapters_of_peft_are_read_and_merged_as_by_peft(folders, model_type, tmp_path):
    theirs = save_peft_adapter(folders[model_type], tmp_path / "adapter", **PEFT_SETTINGS)
    model = load(folders[model_type], adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert_close(logits(model), theirs(TOKENS).logits, **FP32_ADAPTER)
    merged = dict(theirs.merge_and_unload().named_parameters())
    saved = load_file(model.save_merged(tmp_path / "merged") / "model.safetensors")
    assert saved.keys() == merged.keys()
    for name, value in saved.items():
        assert_close(
            value, merged[name].data, **FP32_MERGE, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("model_type", FIRST)
def test_adapters_are_read_by_peft(folders, model_type, tmp_path):
    model = load(folders[model_type])
    patterns = dict(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})
    randomised(model.add_lora(r=4, alpha=6, use_rslora=True, **patterns))
    model.save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        theirs = peft_model(folders[model_type], tmp_path / "adapter")(TOKENS).logits
    assert_close(logits(model), theirs, **FP32_ADAPTER)
