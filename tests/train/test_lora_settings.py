"""Row 21 of an adapter's settings: each changes what is trained and computed, or is refused."""

from __future__ import annotations

import json

import pytest

import sloth
from sloth.errors import SlothError
from sloth.lora_config import LoraConfig
from sloth.train.trainer import Trainer
from tests.oracles import save_tiny_llama
from tests.train.fakes import ROWS, FakeTokenizer

BASE = {"r": 4, "targets": ["q_proj", "v_proj"]}
CHANGES = {
    "r": 3,
    "alpha": 5,
    "dropout": 0.5,
    "targets": ["q_proj", "down_proj"],
    "exclude": ["v_proj"],
    "layers": [1],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 3},
    "use_rslora": True,
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [125],  # "y", of which there are many
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("settings") / "base")


def test_every_field_is_changed_below():
    assert set(CHANGES) == set(LoraConfig.model_fields), "give a new setting a change to try"


def outcome(folder, output, **changes):
    """What is trained, by name and shape, the curve, and what the files say of it."""
    model = sloth.load(folder, device="cpu")
    model._tokenizer = FakeTokenizer()
    lora = LoraConfig(**{**BASE, **changes})
    settings = {"output": output, "max_steps": 3, "lr": 0.05, "lora": lora}
    report = Trainer(model, ROWS[:4], **settings).run()
    trained = {n: tuple(p.shape) for n, p in model.network.named_parameters() if p.requires_grad}
    told = json.loads((report.paths["adapter"] / "adapter_config.json").read_text())
    return trained, report.losses, told


@pytest.fixture(scope="module")
def before(folder, tmp_path_factory):
    return outcome(folder, tmp_path_factory.mktemp("before") / "run")


@pytest.mark.parametrize("name", CHANGES)
def test_row_21_every_setting_of_an_adapter_changes_the_run(name, folder, before, tmp_path):
    """And is told in PEFT's file, which names layers and exclusions by what is left of targets."""
    trained, losses, told = outcome(folder, tmp_path / "run", **{name: CHANGES[name]})
    assert losses != before[1]
    same_shapes = name in ("alpha", "dropout", "alpha_pattern", "use_rslora")
    assert (trained == before[0]) == same_shapes
    assert told != before[2]


def test_the_same_adapter_gives_the_same_run(folder, before, tmp_path):
    assert outcome(folder, tmp_path / "run") == before


@pytest.mark.parametrize("name", CHANGES)
def test_row_21_no_setting_of_an_adapter_changes_on_resume(name, folder, tmp_path):
    settings = {"output": tmp_path / "run", "max_steps": 1}
    for changes, resume in ((BASE, False), ({**BASE, name: CHANGES[name]}, True)):
        model = sloth.load(folder, device="cpu")
        model._tokenizer = FakeTokenizer()
        trainer = Trainer(model, ROWS[:2], lora=LoraConfig(**changes), resume=resume, **settings)
        if resume:
            with pytest.raises((ValueError, SlothError), match=f"lora.{name} was "):
                trainer.run()
        else:
            trainer.run()
