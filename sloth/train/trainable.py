"""What training asks of a model. `sloth.Model` has it, and stands above what is here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sloth.lora_config import LoraConfig

if TYPE_CHECKING:
    from sloth.models.decoder import Decoder
    from sloth.text.tokenizer import Tokenizer
    from sloth.train.facts import Training
    from sloth.train.memory import Plan


class StepPlanner(Protocol):
    """Plans the memory of steps within `memory_gib`, None for what the device has free."""

    memory_gib: float | None

    def forget(self) -> None: ...


class Trainable(Protocol):
    """A model as the trainer sees it."""

    network: Decoder
    name: str
    revision: str | None
    training: Training | None
    is_quantized: bool
    level_reason: str
    lora_config: LoraConfig | None

    @property
    def level(self) -> str: ...
    @property
    def planner(self) -> StepPlanner: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def has_adapter(self) -> bool: ...
    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        num_trained: int | Tensor | None = None,
    ) -> Tensor: ...
    def logprobs(
        self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor: ...
    def plan(self, *, batch: int, seq: int, memory_gib: float | None = None) -> Plan: ...
    def adapter_off(self) -> AbstractContextManager[None]: ...
    def add_lora(self, config: LoraConfig | None = None) -> object: ...
    def save_adapter(self, folder: Path) -> object: ...
    def save_merged(self, folder: Path) -> object: ...
