"""What a run is about, in a form that files keep: run.json in its folder, and the model card.

run.json: which base (name, commit, fingerprint) on which machine and versions, what became of the
rows of the data, and where each setting came from. Written before the first step, without secrets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sloth.data.counts import DataCounts
from sloth.machine import describe_machine
from sloth.redact import Redactor
from sloth.train.run_folder import FACTS

if TYPE_CHECKING:
    from sloth.data.dataset import Dataset
    from sloth.train.config import TrainConfig
    from sloth.train.records import Progress
    from sloth.train.state import TrainState


@dataclass(frozen=True)
class DataFacts:
    """A data set: where it is from, sha256 of its tokens and labels, what became of its rows, its
    commit on the hub.
    """

    name: str
    fingerprint: str
    counts: DataCounts
    revision: str | None = None

    @classmethod
    def of(cls, data: Dataset) -> DataFacts:
        """The facts of a data set that is read."""
        return cls(data.name, data.fingerprint, data.counts, data.revision)


@dataclass(frozen=True)
class RunFacts:
    """Known before the first step. base: sha256 of samples of the frozen weights; settings and
    origins: by name, as JSON types.
    """

    model: str
    revision: str | None
    base: str
    is_quantized: bool
    device: str
    level: str
    data: DataFacts
    eval_data: DataFacts | None
    settings: dict[str, Any]
    origins: dict[str, str]
    machine: dict[str, str]

    @classmethod
    def of(
        cls, state: TrainState, config: TrainConfig, data: Dataset, held_out: Dataset | None
    ) -> RunFacts:
        """The facts of a run that is about to begin."""
        model = state.model
        return cls(
            model=model.name,
            revision=model.revision,
            base=state.identity.base,
            is_quantized=model.is_quantized,
            device=str(model.device),
            level=f"{model.level}: {model.level_reason}",
            data=DataFacts.of(data),
            eval_data=DataFacts.of(held_out) if held_out is not None else None,
            settings=config.plain(),
            origins=config.origins(),
            machine=describe_machine(),
        )

    def write(self, output: Path, resumed_from: Path | None) -> None:
        """run.json, without secrets."""
        told = asdict(self)
        told["settings"] = {
            name: {"value": value, "from": self.origins[name]}
            for name, value in self.settings.items()
        }
        del told["origins"]
        told["resumed_from"] = str(resumed_from) if resumed_from else None
        text = json.dumps(Redactor().value(told), indent=1)
        (output / FACTS).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Training:
    """A run that is over: what a model card tells of it. losses: by step, from 1."""

    facts: RunFacts
    losses: list[float]
    eval_losses: Mapping[int, float] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, facts: RunFacts, progress: Progress) -> Training:
        """What came of a run that went so far."""
        return cls(
            facts,
            progress.losses,
            progress.eval_losses_by_step,
            progress.tokens,
            progress.trained_tokens,
            progress.seconds,
        )
