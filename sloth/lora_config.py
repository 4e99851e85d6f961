"""What a LoRA adapter looks like: rank, scale, and which projections carry it. Needs no torch.

y = W x + s B A dropout(x), with s = alpha / r, or alpha / sqrt(r) with `use_rslora` (Hu et al.
2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
With `use_dora` the rows of W + s B A are scaled to trained lengths as well (Liu et al. 2024,
https://arxiv.org/abs/2402.09353).
The matching rules are those of PEFT, so that a written adapter means the same there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

_VOCABULARY_MODULES = ("embed_tokens", "lm_head")


class LoraConfig(BaseModel):
    """Settings of one adapter.

    r: rank. alpha: scale numerator. dropout: probability on the adapter's input, in [0, 1).
    targets: "all-linear" (every projection but the output head), a list of module names or
    suffixes, or one regular expression that must match a whole module path.
    exclude: names or a regular expression to leave out. layers: layer indices that get the adapter.
    rank_pattern, alpha_pattern: {module suffix or regular expression: value}; the first match wins.
    use_dora: DoRA on every adapted projection.
    modules_to_save: modules trained in full and stored whole, of `embed_tokens` and `lm_head`.
    trainable_token_indices: ids of tokens whose rows are trained whole, the others being frozen: a
    list, for embed_tokens (and a head tied to it), or {"embed_tokens": ids, "lm_head": ids}.
    `embed_tokens` and `lm_head` may be targets as well, by name: low-rank, as PEFT does it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    layers: list[int] | None = None
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] = Field(default_factory=list)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @field_validator("r", "alpha", "dropout", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("expected a number, got a boolean")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_positive(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern, rank in value.items():
            if rank < 1:
                raise ValueError(f"rank_pattern[{pattern!r}] must be at least 1, got {rank}")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_are_regular(cls, value: Any, info: ValidationInfo) -> Any:
        for pattern in value:
            try:
                re.compile(_whole(pattern))
            except re.error as error:
                raise ValueError(
                    f"{info.field_name} names {pattern!r}, no regular expression: {error}"
                ) from error
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _known_modules(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in _VOCABULARY_MODULES:
                raise ValueError(f"modules_to_save knows embed_tokens and lm_head, got {name!r}")
        return value

    @model_validator(mode="after")
    def _tokens_fit(self) -> LoraConfig:
        for name, ids in self.token_rows.items():
            if name not in _VOCABULARY_MODULES:
                raise ValueError(
                    f"trainable_token_indices knows embed_tokens and lm_head, got {name!r}"
                )
            if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
                raise ValueError(
                    f"trainable_token_indices of {name} must be token ids from 0 on, each once, "
                    f"got {ids}"
                )
            if name in self.modules_to_save:
                raise ValueError(
                    f"{name} is in modules_to_save, which trains all of its rows; leave it out of "
                    "trainable_token_indices, or of modules_to_save"
                )
        return self

    @property
    def token_rows(self) -> dict[str, list[int]]:
        """Module -> ids of its trained rows."""
        given = self.trainable_token_indices
        if isinstance(given, list):
            return {"embed_tokens": given}
        return given or {}

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path` (e.g. model.layers.0.self_attn.q_proj)."""
        return int(_first_match(self.rank_pattern, path, self.r))

    def alpha_of(self, path: str) -> float:
        """Scale numerator of the module at `path`."""
        return float(_first_match(self.alpha_pattern, path, self.alpha))

    def scale_of(self, path: str) -> float:
        """alpha / r of the module at `path`, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def idle_patterns(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """Setting -> its patterns that match none of these modules; empty if all do."""
        paths = list(paths)
        given = {"rank_pattern": [*self.rank_pattern], "alpha_pattern": [*self.alpha_pattern]}
        idle = {
            name: [p for p in patterns if not any(re.match(_whole(p), path) for path in paths)]
            for name, patterns in given.items()
        }
        return {name: patterns for name, patterns in idle.items() if patterns}


def _whole(pattern: str) -> str:
    """What a module's path must match: the pattern, after any parents."""
    return rf"(.*\.)?({pattern})$"


def _first_match(patterns: dict, path: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(_whole(pattern), path):
            return value
    return default
