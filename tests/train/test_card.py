"""The model card beside exported weights, run.json, and where each setting came from."""

from __future__ import annotations

import json
import re

import pytest
import yaml

import sloth
from sloth import cli
from sloth.commands.base import Loading
from sloth.data.counts import DataCounts
from sloth.formats.hub import read_license
from sloth.lora_config import LoraConfig
from sloth.train.card import Subject, render_card
from sloth.train.config import TrainConfig, load_config, with_overrides
from sloth.train.facts import DataFacts, RunFacts, Training
from sloth.train.trainer import Trainer
from tests.oracles import peft_model, save_tiny_llama
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer
from tests.train.runs import SETTINGS, train

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_" + "aB3" * 11


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model trained from Python; (model, report)."""
    place = tmp_path_factory.mktemp("card")
    folder = save_tiny_llama(place / "base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    model = sloth.load(folder, device="cpu", quant="nf4")
    model._tokenizer = FakeTokenizer()
    model.name, model.revision = "org/tiny", COMMIT  # as if it came from the hub
    rows = [{"prompt": f"say {SECRET}", "completion": "no"}, *ROWS]
    settings = {"lora": LoraConfig(r=2), "eval_data": ROWS[:3], "eval_steps": 2, "neftune": 5.0}
    report = model.train(rows, output=place / "run", max_steps=4, batch_size=4, **settings)
    return model, report


def front_matter(text):
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(head), body


def test_card_beside_the_adapter_tells_base_data_settings_and_curve(trained):
    model, report = trained
    folder = report.paths["adapter"]
    head, body = front_matter((folder / "README.md").read_text())
    assert head == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["sloth", "lora"],
    }
    counts = report.data
    share = f"{counts.trained_tokens / counts.tokens:.1%}"
    for said in (
        f"`org/tiny` (commit `{COMMIT}`, its weights in 4 bits (NF4))",
        f"| data | data: 12 rows, 12 examples, {counts.tokens:,} tokens, {share} trained |",
        "| held out | eval_data: 3 rows, 3 examples, ",
        f"| tokens read | {report.tokens:,}, of which trained {report.trained_tokens:,} |",
        f'sloth.load("org/tiny", revision="{COMMIT}", quant="nf4", adapter="THIS_FOLDER")',
        'PeftModel.from_pretrained(base, "THIS_FOLDER")',
    ):
        assert said in body, said
    fingerprint = re.search(r"data fingerprint \| `([0-9a-f]{64})`", body)
    facts = json.loads((report.paths["output"] / "run.json").read_text())
    assert fingerprint[1] == facts["data"]["fingerprint"]
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]*) \|$", body, re.MULTILINE)
    assert [(int(step), float(loss)) for step, loss, _ in table] == [
        (step, round(loss, 4)) for step, loss in enumerate(report.losses, start=1)
    ]
    evaluated = {int(step): float(loss) for step, _, loss in table if loss}
    assert evaluated == {step: round(loss, 4) for step, loss in report.eval_losses.items()}
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1])
    assert settings["neftune"] == 5.0 and settings["lora"]["r"] == 2 and "output" not in settings
    (picture,) = re.findall(r"!\[Loss by step\]\((.*)\)", body)
    assert (folder / picture).read_bytes() == (report.paths["output"] / picture).read_bytes()
    assert (folder / "loss.svg").is_file()


def test_card_goes_with_every_export_of_the_model(trained, tmp_path):
    model, report = trained
    again = model.save_adapter(tmp_path / "again")
    published = report.paths["adapter"]
    assert (again / "README.md").read_text() == (published / "README.md").read_text()
    head, body = front_matter((model.save_merged(tmp_path / "m") / "README.md").read_text())
    assert (head["library_name"], head["base_model_relation"]) == ("transformers", "finetune")
    assert "| tokens read | " in body and 'sloth.load("THIS_FOLDER")' in body


def test_the_cards_way_to_load_works_in_sloth_and_peft(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    folder = sloth.load(base, device="cpu").add_lora(r=2).save_adapter(tmp_path / "adapter")
    assert sloth.load(base, adapter=folder, device="cpu").has_adapter
    assert peft_model(base, folder).peft_config
    assert read_license(folder) is None


def test_no_secret_and_no_path_of_the_machine_gets_into_a_card(trained, tmp_path):
    """Row 32: one came in a row, one by the name of a file."""
    _, report = trained
    assert SECRET not in "".join(
        path.read_bytes().decode("latin-1")
        for path in report.paths["adapter"].iterdir()
        if path.is_file()
    )
    data = tmp_path / f"{SECRET}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = save_tiny_llama(tmp_path / "my-base")
    model = sloth.load(base, device="cpu").add_lora(r=2)
    model._tokenizer = FakeTokenizer()
    report = model.train(data, output=tmp_path / "run", max_steps=1)
    text = (report.paths["adapter"] / "README.md").read_text()
    assert str(tmp_path) not in text and SECRET not in text
    head, body = front_matter(text)
    assert "base_model" not in head and "`my-base` (local files)" in body
    assert SECRET not in (tmp_path / "run" / "run.json").read_text()


def test_a_data_set_of_the_hub_is_linked():
    counts = DataCounts(rows=1, examples=1, tokens=10, trained_tokens=5)
    data = DataFacts("hf://datasets/some/one@v2/en", "f" * 64, counts)
    facts = RunFacts("m", None, "b", False, "cpu", "ops", data, None, {}, {}, {})
    subject = Subject("m", None, None, is_adapter=True, is_quantized=False)
    text = render_card(subject, Training(facts, [1.0]), None)
    assert front_matter(text)[0]["datasets"] == ["some/one"]
    assert "hf://datasets/some/one@v2/en: 1 rows" in text


def test_the_commit_of_a_data_set_is_in_the_run_and_in_the_card(tmp_path, monkeypatch):
    """Of the hub's cache, which names folders by it; the command keeps both slashes."""
    for commit, split in ((COMMIT, "train"), (COMMIT[::-1], "valid")):
        (tmp_path / commit).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / commit / f"{split}.jsonl").write_text(text)
    fetched = []

    def fetch(repo, revision):
        fetched.append(repo)
        return tmp_path / (COMMIT if repo == "some/one" else COMMIT[::-1])

    monkeypatch.setattr("sloth.data.sources.fetch_dataset", fetch)
    model = FakeModel()
    model.train = lambda rows, config: Trainer(model, rows, config).run()
    monkeypatch.setattr(Loading, "load", lambda *rest: model)
    flags = ["--eval-data", "hf://datasets/an/other", "--output", str(tmp_path / "run")]
    assert cli.main(["train", "m", "hf://datasets/some/one", "--max-steps", "1", *flags]) == 0
    assert set(fetched) == {"some/one", "an/other"}
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    named = [(facts[part]["name"], facts[part]["revision"]) for part in ("data", "eval_data")]
    assert named == [
        ("hf://datasets/some/one", COMMIT),
        ("hf://datasets/an/other", COMMIT[::-1]),
    ]
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text)["eval_data"] == "hf://datasets/an/other"
    subject = Subject("m", None, None, is_adapter=True, is_quantized=False)
    text = render_card(subject, model.training, None)
    assert f"| data | hf://datasets/some/one (commit `{COMMIT}`): 11 rows" in text
    assert f"| held out | hf://datasets/an/other (commit `{COMMIT[::-1]}`): 11 rows" in text


def test_a_long_run_is_told_in_a_dozen_rows():
    counts = DataCounts(rows=1, examples=1, tokens=10, trained_tokens=5)
    facts = RunFacts(
        "m", None, "b", False, "cpu", "ops", DataFacts("d", "f", counts), None, {}, {}, {}
    )
    losses = [float(step) for step in range(1, 1001)]
    evaluated = {step: 0.5 for step in range(10, 1001, 10)}
    subject = Subject("m", None, None, is_adapter=True, is_quantized=False)
    text = render_card(subject, Training(facts, losses, evaluated), None)
    steps = [int(step) for step in re.findall(r"^\| (\d+) \| \d", text, re.MULTILINE)]
    assert steps[0] == 1 and steps[-1] == 1000 and len(steps) <= 24


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n", "mit"),
        ("---\nlanguage: en\nlicense: 'llama3.2'\n---\n", "llama3.2"),
        ("license: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
    ],
)
def test_a_licence_is_read_from_the_cards_metadata_alone(tmp_path, card, found):
    (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == found
    assert read_license(tmp_path / "none") is None


# -- where settings came from ----------------------------------------------------------------------


def test_origins_tell_file_flag_argument_and_default(tmp_path):
    file = tmp_path / "orders.yaml"
    file.write_text("lr: 1e-3\nseed: 4\n")
    config = load_config(file, {"seed": 5})
    config = with_overrides(config, {"clip": 2.0}, origin="flag")
    told = config.origins()
    assert [told[n] for n in ("lr", "seed", "clip", "schedule")] == [
        *("orders.yaml", "argument", "flag", "default")
    ]
    assert config == with_overrides(None, {"lr": 1e-3, "seed": 5, "clip": 2.0})
    assert TrainConfig(lr=1).origins()["lr"] == "argument"
    assert TrainConfig(lr=1) != TrainConfig(lr=2)


def test_the_runs_folder_tells_where_each_setting_came_from(tmp_path, monkeypatch, capsys):
    """Of the command: a file, flags over it, and defaults."""
    file, data = tmp_path / "orders.yaml", tmp_path / "d.jsonl"
    file.write_text("max_steps: 2\nlr: 1e-3\n")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = FakeModel()
    model.train = lambda rows, config: Trainer(model, rows, config).run()
    monkeypatch.setattr(Loading, "load", lambda *rest: model)
    flags = ["--config", str(file), "--lr", "2e-3", "--output", str(tmp_path / "run")]
    assert cli.main(["train", "m", str(data), *flags]) == 0
    assert re.search(r"^loss \d+\.\d{4} \S{2} \d+\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["settings"]["lr"] == {"value": 2e-3, "from": "flag"}
    assert facts["settings"]["max_steps"] == {"value": 2, "from": "orders.yaml"}
    assert facts["settings"]["seed"] == {"value": 0, "from": "default"}
    text = (tmp_path / "run" / "config.yaml").read_text()
    first, second, defaults = text.split("# from ")[1:]
    assert first.splitlines()[0] != second.splitlines()[0]
    assert {first.split("\n")[0], second.split("\n")[0]} == {'"flag"', '"orders.yaml"'}
    assert defaults.startswith('"default"\n') and "seed: 0" in defaults
    assert load_config(tmp_path / "run" / "config.yaml").lr == 2e-3


def test_run_json_tells_base_machine_and_what_became_of_the_rows(tmp_path):
    rows = [*ROWS, {"text": 3}]
    model = FakeModel()
    Trainer(model, rows, output=tmp_path / "run", skip_bad=True, **SETTINGS).run()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["model"] == "fake" and len(facts["base"]) == 64
    assert facts["level"] == "reference: it is a fake" and facts["device"] == "cpu"
    assert facts["data"]["counts"]["rows"] == 11 and facts["data"]["counts"]["malformed"] == 1
    assert {"sloth", "torch", "python"} <= facts["machine"].keys()
    assert facts["resumed_from"] is None and facts["eval_data"] is None
    train(tmp_path / "half", stop_after=2)
    train(tmp_path / "half", resume=True)
    again = json.loads((tmp_path / "half" / "run.json").read_text())
    assert again["resumed_from"].endswith("step-000002")
