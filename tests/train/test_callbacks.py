"""Callbacks hear of every moment; trackers speak to their libraries; no secret gets out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

import sloth
from sloth import cli
from sloth.lora_config import LoraConfig
from sloth.redact import HIDDEN, Redactor
from sloth.train.callbacks import Callback
from sloth.train.trackers import require_trackers
from sloth.train.trainer import Trainer
from tests.commands.models import save_texts, save_tiny_model
from tests.oracles import save_tiny_llama
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer
from tests.train.runs import ROOT, SETTINGS, train

EVALUATED = {**SETTINGS, "eval_data": ROWS[:2], "eval_steps": 3, "save_steps": 4}


class Noting(Callback):
    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def start(self, output, settings):
        self.heard.append(("start", output.name, settings["lr"]))

    def step(self, record):
        self.heard.append(("step", record.step))

    def evaluation(self, record):
        self.heard.append(("evaluation", record.step, record.is_best))

    def saved(self, step, folder):
        assert (folder / "manifest.json").is_file()
        self.heard.append(("saved", step))

    def finish(self, error):
        self.heard.append(("finish", type(error).__name__))


def test_callback_hears_of_every_moment_in_order(tmp_path):
    noting = Noting()
    Trainer(FakeModel(), ROWS, callbacks=[noting], output=tmp_path / "run", **EVALUATED).run()
    assert noting.heard == [
        ("start", "run", 0.02),
        *(("step", 1), ("step", 2), ("step", 3), ("evaluation", 3, True), ("saved", 3)),
        *(("step", 4), ("saved", 4), ("step", 5), ("step", 6), ("saved", 6)),
        *(("evaluation", 6, True), ("finish", "NoneType")),
    ]


def test_finish_is_told_what_ended_the_run(tmp_path):
    noting = Noting()

    def broken(record):
        raise RuntimeError("mine")

    noting.step = broken
    with pytest.raises(RuntimeError, match="mine"):
        Trainer(FakeModel(), ROWS, callbacks=[noting], output=tmp_path / "run", **SETTINGS).run()
    assert noting.heard[-1] == ("finish", "RuntimeError")


# -- trackers: each against a stand-in of its library that keeps what it is told -------------------


class Library(ModuleType):
    """Any function of it notes its name and arguments."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []
        self.__spec__ = type(sys.__spec__)(name, None)
        self.info = SimpleNamespace(run_id="0a1b2c")  # of the run that mlflow.start_run gives

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or self


def run_with(monkeypatch, tmp_path, name, module=None, **changes):
    library = Library(module or name)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setitem(sys.modules, module or name, library)
    settings = {**EVALUATED, "trackers": [name], "project": "orders", **changes}
    Trainer(FakeModel(), ROWS, output=tmp_path / "run", **settings).run()
    return library.calls


def named(calls, name):
    return [(args, kwargs) for called, args, kwargs in calls if called == name]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_config_metrics_and_an_end(monkeypatch, tmp_path, name):
    calls = run_with(monkeypatch, tmp_path, name)
    ((_, started),) = named(calls, "init")
    assert started["project"] == "orders" and started["config"]["lr"] == 0.02
    assert started["resume"] == "allow" and started["name"].startswith("run")
    logged = named(calls, "log")
    assert [kwargs["step"] for _, kwargs in logged] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"train/loss", "train/lr", "train/grad_norm"} <= logged[0][0][0].keys()
    assert logged[3][0][0].keys() == {"eval/loss", "eval/perplexity"}
    assert calls[-1][0] == "finish"


@pytest.mark.parametrize(("name", "told"), [("wandb", "id"), ("trackio", "name")])
def test_wandb_and_trackio_continue_a_resumed_run_and_no_other(monkeypatch, tmp_path, name, told):
    """Not the one that was in a folder of the same path before."""

    def identity(**settings):
        return named(run_with(monkeypatch, tmp_path, name, **settings), "init")[0][1][told]

    first = identity()
    assert identity(resume=True) == first and len(first) >= 12
    shutil.rmtree(tmp_path / "run")
    assert identity() != first


def test_mlflow_gets_parameters_metrics_and_an_end(monkeypatch, tmp_path):
    calls = run_with(monkeypatch, tmp_path, "mlflow")
    assert named(calls, "set_experiment") == [(("orders",), {})]
    assert named(calls, "log_params")[0][0][0]["seed"] == 0
    assert len(named(calls, "log_metrics")) == 8
    assert calls[-1] == ("end_run", ("FINISHED",), {})


def test_mlflow_continues_its_run_when_training_is_resumed(monkeypatch, tmp_path):
    """Its parameters cannot change, and some have: resume itself is one."""
    first = run_with(monkeypatch, tmp_path, "mlflow")
    again = run_with(monkeypatch, tmp_path, "mlflow", resume=True)
    assert named(first, "start_run") == [((), {"run_name": "run"})]
    assert named(again, "start_run") == [((), {"run_id": "0a1b2c"})]
    assert len(named(first, "log_params")) == 1 and not named(again, "log_params")


def test_tensorboard_gets_scalars_in_the_runs_folder(monkeypatch, tmp_path):
    calls = run_with(
        monkeypatch, tmp_path, "tensorboard", module="torch.utils.tensorboard", project=None
    )
    assert named(calls, "SummaryWriter") == [((str(tmp_path / "run" / "tensorboard"),), {})]
    scalars = [args for args, _ in named(calls, "add_scalar")]
    assert [step for name, _, step in scalars if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, _, step in scalars if name == "eval/perplexity"] == [3, 6]
    assert calls[-1][0] == "close"


def test_a_tracker_that_fails_is_left_out_and_told_once(monkeypatch, tmp_path, capsys):
    library = Library("wandb")
    library.init = lambda **settings: None

    def log(values, step):
        raise ConnectionError("the network is gone")

    library.log = log
    monkeypatch.setitem(sys.modules, "wandb", library)
    _, report = train(tmp_path / "run", trackers=["wandb"])
    assert len(report.losses) == 6
    said = capsys.readouterr().out
    assert said.count("WARNING: wandb failed and is left out from here on: the network is") == 1


def test_a_tracker_that_is_not_installed_is_refused_before_data_is_read(monkeypatch):
    monkeypatch.setattr("sloth.train.trackers.importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        with pytest.raises(ValueError, match=f"{name} is not installed; pip install {name}"):
            require_trackers([name])
    with pytest.raises(ValueError, match="wandb is not installed"):
        Trainer(FakeModel(), "no-such-file.jsonl", trackers=["wandb"])


def test_a_tracker_module_that_says_not_where_it_is_from_will_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    assert sys.modules["wandb"].__spec__ is None
    require_trackers(["wandb"])


def test_no_tracker_library_is_imported_unless_asked_for():
    script = (
        "import sys, sloth.train.trainer; "
        "print([n for n in ('tensorboard', 'wandb', 'trackio', 'mlflow', 'bitsandbytes') "
        "if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# -- secrets ---------------------------------------------------------------------------------------

HF = "hf_" + "aB3" * 11
OTHERS = ["sk-" + "x1" * 12, "ghp_" + "Q7" * 18, "AKIA" + "A1B2C3D4E5F6G7H8"]


def test_no_secret_of_the_environment_or_the_settings_reaches_a_file_or_the_terminal(
    monkeypatch, tmp_path, capsys
):
    """Row 32: one known by its shape, one by its variable's name, one in a tracker's settings."""
    by_name = "correct horse battery"
    monkeypatch.setenv("MY_SERVICE_TOKEN", by_name)
    monkeypatch.setenv("HF_TOKEN", HF)
    rows = [{"prompt": f"say {HF}", "completion": f"no, {by_name}"}]
    monkeypatch.setattr("sloth.train.held_out.sample_answers", lambda *rest: [(HF, by_name)])
    library = Library("wandb")
    monkeypatch.setitem(sys.modules, "wandb", library)
    settings = {**SETTINGS, "trackers": ["wandb"], "project": f"p-{HF}", "sample_prompts": [HF]}
    Trainer(FakeModel(), rows, output=tmp_path / "run", **settings).run()
    captured = capsys.readouterr()
    written = [captured.out, captured.err, repr(library.calls)]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.yaml", "state.json"} <= {path.name for path in files}
    written += [path.read_bytes().decode("latin-1") for path in files]
    assert not any(HF in text or by_name in text for text in written)
    assert any(HIDDEN in text for text in written)


def test_row_32_a_secret_in_the_name_of_the_model_or_a_folder_gets_into_no_file(
    tmp_path, monkeypatch, capsys
):
    """Such as the part of a path. Files of an adapter and of a whole model."""
    base = save_tiny_llama(tmp_path / HF)
    library = Library("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", library)
    for settings in ({"lora": LoraConfig(r=2)}, {}):
        model = sloth.load(base, device="cpu")
        model._tokenizer = FakeTokenizer()
        output = tmp_path / f"{len(settings)}-{HF}"
        report = model.train(ROWS, output=output, max_steps=1, trackers=["mlflow"], **settings)
        model.training = None
        files = [path for path in report.paths["output"].rglob("*") if path.is_file()]
        names = {path.name for path in files}
        assert {"state.json", "README.md", "run.json"} <= names
        assert ("adapter_config.json" in names) == bool(settings)
        for path in files:
            assert HF not in path.read_bytes().decode("latin-1"), path.name
    captured = capsys.readouterr()
    assert HF not in captured.out + captured.err + repr(library.calls)


def test_row_32_nothing_that_a_command_prints_holds_a_secret(tmp_path, monkeypatch, capsys):
    """Paths in results, plans and counts, mistakes, defaults from a file."""
    place = tmp_path / HF
    place.mkdir()
    base = save_tiny_model(place / "base")
    data = save_texts(place / "rows.jsonl")
    (place / "c.yaml").write_text(f"output: {place}/run\nsample_prompts: [say {HF}]\n")
    train = ["train", str(base), str(data), "--max-steps", "1", "--device", "cpu"]
    config = ["--config", str(place / "c.yaml")]
    for arguments, code in (
        ([*train, "--lora.r", "2", "--output", f"{place}/run"], 0),
        ([*train, "--lora.r", "2", *config, "--output", f"{place}/new", "--dry-run"], 0),
        ([*train, *config, "--help"], 0),
        ([*train, "--token", HF], 2),
        ([*train, "--lr", HF], 2),
        (["data", "check", str(data), "--model", str(base)], 0),
        (["info", str(base), "--device", "cpu"], 0),
        (["runs", str(place)], 0),
        (["runs", str(place), "--compare", f"{place}/run", f"{place}/none"], 2),
        (["export", str(base), "--base", f"{place}/out", "--device", "cpu"], 0),
        ([f"train-{HF}"], 2),
    ):
        assert cli.main(arguments) == code, arguments
        captured = capsys.readouterr()
        shown = "".join((captured.out + captured.err).split())
        assert HF[-9:] not in shown and HF[:9] not in shown, arguments  # lines may end inside of it


def test_known_shapes_are_hidden_and_ordinary_text_is_not():
    redactor = Redactor(
        {"API_KEY": "short", "DB_PASSWORD": "p.a+s(s)word", "HOME": "/home/someone"}
    )
    for secret in (HF, *OTHERS, "p.a+s(s)word"):
        assert secret not in redactor.text(f"see {secret}, ok")
    assert redactor.text("https://me:pass@host/x") == f"https://me:{HIDDEN}@host/x"
    names = {
        "TOKENIZER_PATH": "/data/tokenizer",
        "MAX_TOKENS": "100000000",
        "PGPASSWORD": "12345678",
    }
    said = "/data/tokenizer 100000000 12345678"
    assert Redactor(names).text(said) == f"/data/tokenizer 100000000 {HIDDEN}"
    plain = "hf_hub is short /home/someone step-000003 sk-learn https://host:80/a@b"
    assert redactor.text(plain) == plain
    assert redactor.value({"a": [HF, 3, None], "b": {"c": (1.5, HF)}}) == {
        "a": [HIDDEN, 3, None],
        "b": {"c": [1.5, HIDDEN]},
    }
