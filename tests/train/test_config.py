"""TrainConfig: what is refused, how files and overrides combine, and that no field is idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sloth.lora_config import LoraConfig
from sloth.train.config import TrainConfig, load_config, with_overrides
from sloth.train.other_names import ELSEWHERE


def written(tmp_path, text) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return file


def test_yaml_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    config = load_config(written(tmp_path, "lr: 2e-4\nmax_steps: 3\nlora: {r: 4}\nresume: true\n"))
    assert (config.lr, config.max_steps, config.resume) == (2e-4, 3, True)
    assert config.lora == LoraConfig(r=4)


def test_a_path_in_a_file_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(written(tmp_path, "output: ~/runs/a\nresume: ~/runs/b\n"))
    assert (config.output, config.resume) == (tmp_path / "runs/a", tmp_path / "runs/b")
    assert load_config(Path("~/c.yaml")) == config and TrainConfig(output="~").output == tmp_path
    assert TrainConfig(resume=True).resume is True


def test_overrides_win_over_the_file_and_lora_merges_key_by_key(tmp_path):
    file = written(tmp_path, "lr: 1\nseed: 4\nlora: {r: 4, alpha: 8}\n")
    config = load_config(file, {"lr": 2, "lora": {"r": 5}})
    assert (config.lr, config.seed, config.lora) == (2, 4, LoraConfig(r=5, alpha=8))
    assert load_config(written(tmp_path, "")) == load_config() == TrainConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: yes", "lr.*got a boolean"),
        ("max_steps: true", "max_steps.*got a boolean"),
        ("lr: .nan", "lr.*finite"),
        ("lr: .inf", "lr.*finite"),
        ("lr: -1", "lr.*greater than 0"),
        ("schedule: cosin", "schedule.*'linear', 'cosine'"),
        ("bacth_size: 2", "unknown setting 'bacth_size'; did you mean 'batch_size'"),
        ("learning_rate: 2", "did you mean 'lr'"),
        ("zzz: 2", "unknown setting 'zzz'; known: output, max_steps"),
        ("lora: {rank: 2}", "unknown lora setting 'rank'"),
        ("quant: int8", "quant"),
        ("- 1", "expected `name: value`"),
        ("a: &x 1\nseed: *x", "c.yaml:2: YAML aliases"),
        ("lr: 1\nlr: 2", "c.yaml:2: 'lr' is given twice"),
        ("lr: [", "not valid YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("[a]: 1", "unknown setting|not valid YAML"),
        ("output: " + "x" * 70_000, "more than 65536"),
        ("[" * 5_000, "nested more than 16 deep"),
    ],
)
def test_bad_file_is_a_clear_value_error(tmp_path, text, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        load_config(written(tmp_path, text))


def typos(name):
    """A letter left out, doubled, or changed places with the next."""
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[: i + 1] + name[i:]
        yield name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]


@pytest.mark.parametrize("kind", ["setting", "lora setting"])
def test_every_typo_of_every_setting_is_refused_with_its_name(kind):
    names = (TrainConfig if kind == "setting" else LoraConfig).model_fields
    for name in names:
        for typo in set(typos(name)) - {*names, *ELSEWHERE, ""}:
            given = {typo: 1} if kind == "setting" else {"lora": {typo: 1}}
            with pytest.raises(ValueError, match=f"unknown {kind} '{typo}'; did you mean '{name}'"):
                TrainConfig(**given)


@settings(max_examples=200, deadline=None)
@given(name=st.text(st.characters(exclude_categories=("C", "Z")), min_size=1))
@example(name="model_config")
@example(name="__class__")
@example(name="_origins")
@example(name="Lr")
def test_row_21_no_unknown_key_is_taken_from_a_file(tmp_path_factory, name):
    """By hypothesis: whatever it is called, wherever it stands."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    for names, values in (
        (TrainConfig.model_fields, {"lr": 1, name: 1, "seed": 2}),
        (LoraConfig.model_fields, {"seed": 2, "lora": {"r": 2, name: 1}}),
    ):
        assume(name not in names)
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        with pytest.raises(ValueError, match="(?s)unknown (lora )?setting .*; (did you m|known: )"):
            load_config(file)


def test_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_config_is_frozen_and_overrides_are_validated():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.lr = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        with_overrides(config, {"lr": -1})
    assert with_overrides(TrainConfig(seed=3), {"lr": 1}) == TrainConfig(seed=3, lr=1)


def test_plain_form_reads_back_as_the_same_config(tmp_path):
    config = TrainConfig(
        output="o", resume="runs/x", lora=LoraConfig(r=3), eval_data="e", quant="nf4", lr=1e-05
    )
    again = load_config(written(tmp_path, yaml.safe_dump(config.plain())))
    assert again == config
    in_memory = TrainConfig(eval_data=[{"text": "a"}], eval_steps=2)
    assert TrainConfig(**in_memory.plain()) == TrainConfig()
