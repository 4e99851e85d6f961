"""What a caller may say about data. Needs no torch, so that `sloth train --help` is quick."""

from __future__ import annotations

from typing import Any, Literal, Protocol

OnLong = Literal["truncate", "split", "drop", "error"]
TrainOn = Literal["assistant", "last", "everything"]

# What a row of data can hold, for `columns`; rows.py reads them.
ROW_FIELDS = (
    *("messages", "tools", "conversations", "system", "prompt", "completion", "instruction"),
    *("input", "output", "history", "chosen", "rejected", "text"),
)


class DataSettings(Protocol):
    """The settings of a run that data hang on; `TrainConfig` has them, and says what they mean."""

    @property
    def max_length(self) -> int: ...
    @property
    def on_long(self) -> OnLong: ...
    @property
    def train_on(self) -> TrainOn: ...
    @property
    def columns(self) -> dict[str, str] | None: ...
    @property
    def packing(self) -> bool: ...
    @property
    def skip_bad(self) -> bool: ...
    @property
    def pairs(self) -> bool: ...


class RunSettings(DataSettings, Protocol):
    """Of a run's settings, those that decide which of its rows are held out, and those that mean
    nothing without any.
    """

    @property
    def seed(self) -> int: ...
    @property
    def eval_data(self) -> Any: ...
    @property
    def val_set_size(self) -> float | None: ...
    @property
    def eval_batch_size(self) -> int | None: ...
    @property
    def eval_steps(self) -> int | None: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def load_best(self) -> bool: ...
    @property
    def sample_prompts(self) -> list[str]: ...
