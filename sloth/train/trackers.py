"""Trackers as callbacks: tensorboard, wandb, trackio, mlflow. Each library is imported when a run
asks for it by name, and none is needed otherwise.

A tracker that fails while a run goes on (a network that is gone, a full disk) is reported once and
left out from then on: no curve on a web page is worth a training run.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sloth.constants import GIB
from sloth.redact import Redactor
from sloth.train.callbacks import Callback
from sloth.train.records import EvalRecord, StepRecord

DEFAULT_PROJECT = "sloth"


def step_metrics(record: StepRecord) -> dict[str, float]:
    """Names and numbers of a step, the same in every tracker."""
    return {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "train/tokens_per_second": record.tokens_per_second,
        "train/memory_gib": record.memory_bytes / GIB,
        "train/skipped": float(record.skipped),
        **{f"train/{name}": value for name, value in record.metrics.items()},
    }


def eval_metrics(record: EvalRecord) -> dict[str, float]:
    """Names and numbers of an evaluation."""
    if record.loss is None:
        return {}
    measured = {"loss": record.loss, **record.metrics}
    if record.perplexity is not None:
        measured["perplexity"] = record.perplexity
    return {f"eval/{name}": value for name, value in measured.items()}


class TensorBoard(Callback):
    """Event files in <output>/tensorboard."""

    def start(self, output: Path, settings: dict[str, Any]) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(output / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def step(self, record: StepRecord) -> None:
        self._write(step_metrics(record), record.step)

    def evaluation(self, record: EvalRecord) -> None:
        self._write(eval_metrics(record), record.step)
        for number, (prompt, answer) in enumerate(record.samples):
            self._writer.add_text(f"sample/{number}", f"{prompt}\n\n{answer}", record.step)

    def finish(self, error: BaseException | None) -> None:
        self._writer.close()

    def _write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class Wandb(Callback):
    """A run that a resumed training continues, by the id that its folder keeps."""

    module = "wandb"

    def __init__(self, project: str | None) -> None:
        self._project = project or DEFAULT_PROJECT

    def start(self, output: Path, settings: dict[str, Any]) -> None:
        self._library = importlib.import_module(self.module)
        self._library.init(
            project=self._project,
            config=settings,
            resume="allow",
            **self._named(output, _kept_id(output / f"{self.module}_run_id")),
        )

    def step(self, record: StepRecord) -> None:
        self._library.log(step_metrics(record), step=record.step)

    def evaluation(self, record: EvalRecord) -> None:
        samples = {f"sample/{n}": answer for n, (_, answer) in enumerate(record.samples)}
        self._library.log({**eval_metrics(record), **samples}, step=record.step)

    def finish(self, error: BaseException | None) -> None:
        self._library.finish()

    def _named(self, output: Path, identity: str) -> dict[str, Any]:
        return {"name": Redactor().text(output.name), "id": identity, "dir": str(output)}


class Trackio(Wandb):
    """trackio speaks wandb's init, log and finish; a run is continued by its name, so the id is in
    that.
    """

    module = "trackio"

    def _named(self, output: Path, identity: str) -> dict[str, Any]:
        return {"name": f"{Redactor().text(output.name)}-{identity[:8]}"}


class MLflow(Callback):
    """Parameters and metrics of a run in the experiment named like the project. A resumed training
    continues it, by the id that its folder keeps; its parameters stay those of the beginning, as
    mlflow changes none.
    """

    def __init__(self, project: str | None) -> None:
        self._project = project or DEFAULT_PROJECT

    def start(self, output: Path, settings: dict[str, Any]) -> None:
        self._library = importlib.import_module("mlflow")
        self._library.set_experiment(self._project)
        kept = output / "mlflow_run_id"
        if kept.is_file():
            self._library.start_run(run_id=kept.read_text(encoding="utf-8").strip())
            return
        run = self._library.start_run(run_name=Redactor().text(output.name))
        self._library.log_params(settings)
        kept.write_text(f"{run.info.run_id}\n", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        self._library.log_metrics(step_metrics(record), step=record.step)

    def evaluation(self, record: EvalRecord) -> None:
        self._library.log_metrics(eval_metrics(record), step=record.step)

    def finish(self, error: BaseException | None) -> None:
        self._library.end_run("FINISHED" if error is None else "FAILED")


def _kept_id(kept: Path) -> str:
    """The id in this file; a new one the first time. Not made of the folder's path: another run may
    have been there before.
    """
    if not kept.is_file():
        kept.write_text(f"{secrets.token_hex(8)}\n", encoding="utf-8")
    return kept.read_text(encoding="utf-8").strip()


class Guarded(Callback):
    """Passes every moment on until one fails; then says so and is silent."""

    def __init__(self, name: str, inner: Callback, notice: Callable[[str], None]) -> None:
        self._name, self._inner, self._notice = name, inner, notice
        self._is_working = False

    def start(self, output: Path, settings: dict[str, Any]) -> None:
        self._is_working = True
        self._pass_on(lambda: self._inner.start(output, settings))

    def step(self, record: StepRecord) -> None:
        self._pass_on(lambda: self._inner.step(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._pass_on(lambda: self._inner.evaluation(record))

    def saved(self, step: int, folder: Path) -> None:
        self._pass_on(lambda: self._inner.saved(step, folder))

    def finish(self, error: BaseException | None) -> None:
        self._pass_on(lambda: self._inner.finish(error))

    def _pass_on(self, call: Callable[[], None]) -> None:
        if not self._is_working:
            return
        try:
            call()
        except Exception as error:
            self._is_working = False
            self._notice(f"WARNING: {self._name} failed and is left out from here on: {error}")


# name -> what makes the callback of a project, and the package to install
_TRACKERS: dict[str, tuple[Callable[[str | None], Callback], str]] = {
    "tensorboard": (lambda project: TensorBoard(), "tensorboard"),
    "wandb": (Wandb, "wandb"),
    "trackio": (Trackio, "trackio"),
    "mlflow": (MLflow, "mlflow"),
}


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError, before anything is loaded, for a library that is not installed."""
    for name in names:
        package = _TRACKERS[name][1]
        # What is imported already is there, whether or not it says from where.
        is_here = sys.modules.get(package) is not None
        if not is_here and importlib.util.find_spec(package) is None:
            raise ValueError(f"trackers: {name} is not installed; pip install {package}")


def build_trackers(
    names: Sequence[str], project: str | None, notice: Callable[[str], None]
) -> list[Callback]:
    """The callbacks of these names."""
    project = Redactor().text(project) if project is not None else None
    return [Guarded(name, _TRACKERS[name][0](project), notice) for name in names]
