"""`sloth init`: a file of every setting, and Axolotl files of which no key gets lost."""

from __future__ import annotations

from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth import cli
from sloth.commands.axolotl import _LORA, _SAME, _SPECIAL, _VALUES, convert
from sloth.commands.axolotl_reasons import REASONS
from sloth.lora_config import LoraConfig
from sloth.train.config import TrainConfig, load_config

QLORA = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    field_instruction: q
    shards: 4
  - path: other.jsonl
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 1024
sample_packing: true
lora_r: 8
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_project: mine
use_wandb: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: linear
learning_rate: 2e-4
train_on_inputs: true
bf16: true
gradient_checkpointing: true
early_stopping_patience: 3
warmup_ratio: 0.1
frobnicate: 7
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_is_every_setting_with_its_meaning_and_default(place, capsys):
    assert cli.main(["init"]) == 0
    assert "sloth train MODEL DATA --config sloth.yaml" in capsys.readouterr().out
    assert load_config(place / "sloth.yaml") == TrainConfig()
    text = (place / "sloth.yaml").read_text()
    flowing = " ".join(text.replace("\n#", "").split())
    assert list(yaml.safe_load(text)) == list(TrainConfig.model_fields)
    for name, field in TrainConfig.model_fields.items():
        assert field.description and field.description in flowing, name
    commented = text[text.index("# lora:") :].split("\n\n")[0].replace("# ", "")
    assert LoraConfig(**yaml.safe_load(commented)["lora"]) == LoraConfig()


def test_a_file_that_is_there_is_not_overwritten(place, capsys):
    (place / "mine.yaml").write_text("lr: 1")
    assert cli.main(["init", "mine.yaml"]) == 2
    assert "mine.yaml exists" in capsys.readouterr().err
    assert (place / "mine.yaml").read_text() == "lr: 1"


def test_an_axolotl_file_becomes_settings_arguments_and_reasons(place, capsys):
    (place / "axolotl.yml").write_text(QLORA)
    assert cli.main(["init", "run.yaml", "--from", "axolotl.yml"]) == 0
    assert load_config(place / "run.yaml") == TrainConfig(
        output="out",
        epochs=3,
        batch_size=2,
        grad_accum=4,
        max_length=1024,
        on_long="drop",  # Axolotl's default
        packing=True,
        train_on="everything",
        columns={"instruction": "q"},
        lr=2e-4,
        schedule="linear",
        warmup_ratio=0.1,
        val_set_size=0.1,
        weight_decay=0.0,  # Axolotl's default
        trackers=["wandb"],
        project="mine",
        lora=LoraConfig(r=8, alpha=32, dropout=0.05),
        quant="nf4",
    )
    text = " ".join((place / "run.yaml").read_text().replace("\n#", "").split())
    assert "(From excess_length_strategy, Axolotl's default.)" in text
    assert "(From micro_batch_size.)" in text
    said = capsys.readouterr().out
    for line in (
        "  sloth train NousResearch/Llama-3.2-1B hf://datasets/teknium/GPT4-LLM-Cleaned --config "
        "run.yaml --dtype bfloat16",
        "so anyway: load_in_8bit, strict, datasets[0].type",
        "not taken  optimizer: 'paged_adamw_8bit': sloth has adamw and adamw_8bit",
        "not taken  datasets[1]: other.jsonl: a run reads one file",
        "not taken  datasets[0].shards: 4: sloth has nothing like it",
        "not taken  early_stopping_patience: it counts evaluations: add it with eval_steps",
        "not taken  lora_model_dir: empty",
        "not taken  frobnicate: sloth has nothing like it",
    ):
        assert line in said, line


def test_no_key_gets_lost():
    """Each is in a setting's origin, an argument, the list of what is so anyway, or the reasons."""
    file = yaml.safe_load(QLORA)
    found = convert(file)
    sources = {key for origin in found.origins.values() for key in origin.split(", ")}
    named = sources | set(found.unneeded) | set(found.left)
    by_argument = {"base_model": "MODEL", "datasets": "DATA", "bf16": "--dtype"}
    for key in file:
        given = found.arguments.get(by_argument.get(key, ""))
        assert key in named or given, key


def test_a_reader_with_a_file_is_that_file():
    found = convert({"datasets": [{"path": "json", "data_files": "x.jsonl", "type": "alpaca"}]})
    assert found.arguments["DATA"] == "x.jsonl" and "datasets[0].data_files" not in found.left
    found = convert({"test_datasets": [{"path": "csv", "data_files": ["v/held.csv"]}]})
    assert found.settings["eval_data"] == "v/held.csv"
    found = convert({"datasets": [{"path": "json", "data_files": ["a.json", "b.json"]}]})
    assert "datasets[0].data_files" in found.left


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ({"rl": "orpo", "orpo_alpha": 0.2}, {"objective": "orpo", "beta": 0.2}),
        ({"rl": "dpo", "sample_packing": True}, {"objective": "dpo"}),
        ({"rl_beta": 0.3}, {}),
        ({"test_datasets": [{"path": "v.jsonl"}], "eval_steps": 20}, {"eval_steps": 20}),
        ({"save_steps": 0.25}, {}),
        ({"save_steps": [1]}, {"save_steps": 200}),
        ({"save_steps": True}, {"save_steps": 200}),
        ({"save_steps": 30.0}, {"save_steps": 30}),
        ({"val_set_size": 200, "eval_steps": 9, "eval_batch_size": 2}, {"val_set_size": 200}),
        ({"val_set_size": 0.1, "test_datasets": [{"path": "v.jsonl"}]}, {"val_set_size": None}),
        ({"eval_batch_size": 2, "early_stopping_patience": 2}, {"eval_batch_size": None}),
        ({"warmup_ratio": 0.03}, {"warmup_ratio": 0.03}),
        ({"max_steps": 9}, {"max_steps": 9, "epochs": None}),
        ({"adapter": "lora", "lora_target_modules": ["q_proj"]}, {"lora": {"targets": ["q_proj"]}}),
        ({"lora_r": 4}, {"lora": None}),
        ({"num_epochs": 2}, {"warmup_ratio": 0.03}),
        ({"max_steps": 100}, {"warmup_steps": 3, "warmup_ratio": 0.0}),
        ({"max_steps": 20_000}, {"warmup_steps": 100}),
        ({"warmup_steps": 0}, {"warmup_steps": 0, "warmup_ratio": 0.0}),
        ({"excess_length_strategy": "raise"}, {"on_long": "error"}),
    ],
)
def test_what_depends_on_other_keys(file, settings):
    found = convert(file)
    config = TrainConfig(**found.settings)  # nothing of it is refused
    expected = TrainConfig(**{**found.settings, **settings})
    assert config == expected
    assert set(file) <= {*found.left, *", ".join(found.origins.values()).split(", ")}


KEYS = sorted({*_SAME, *_LORA, *_VALUES, *_SPECIAL, *REASONS, "lora_target_linear", "unknown"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_any_value_of_any_key_is_taken_left_with_a_reason_or_refused(file):
    found = convert(file)
    assert all(isinstance(why, str) for why in found.left.values()) and found.command("c.yaml")
    with suppress(ValueError):
        TrainConfig(**found.settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: &x 1\nb: *x\n", "aliases are not accepted"), ("lora_r: 0\nadapter: lora\n", "lora.r")],
)
def test_an_axolotl_file_that_cannot_be_is_one_line(place, capsys, text, said):
    (place / "axolotl.yml").write_text(text)
    assert cli.main(["init", "--from", "axolotl.yml"]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1
    assert not (place / "sloth.yaml").exists()
