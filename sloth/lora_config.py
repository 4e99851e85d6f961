"""What a LoRA adapter looks like: rank, scale, and which projections carry it. Needs no torch.

y = W x + s B A dropout(x), with s = alpha / r, or alpha / sqrt(r) with `use_rslora` (Hu et al.
2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
The matching rules are those of PEFT, so that a written adapter means the same there.
"""

from __future__ import annotations

import math
import re

from pydantic import BaseModel, ConfigDict, Field, field_validator


class LoraConfig(BaseModel):
    """Settings of one adapter.

    r: rank. alpha: scale numerator. dropout: probability on the adapter's input, in [0, 1).
    targets: "all-linear" (every projection but the output head), a list of module names or
    suffixes, or one regular expression that must match a whole module path.
    exclude: names or a regular expression to leave out. layers: layer indices that get the adapter.
    rank_pattern, alpha_pattern: {module suffix or regular expression: value}; the first match wins.
    modules_to_save: modules trained in full and stored whole, of `embed_tokens` and `lm_head`.
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
    modules_to_save: list[str] = Field(default_factory=list)

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

    @field_validator("modules_to_save")
    @classmethod
    def _known_modules(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in ("embed_tokens", "lm_head"):
                raise ValueError(f"modules_to_save knows embed_tokens and lm_head, got {name!r}")
        return value

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


def _first_match(patterns: dict, path: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
