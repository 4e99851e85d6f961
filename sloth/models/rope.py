"""Rotary position embedding: from config.json to the cos and sin tables of one forward pass.

Base frequencies are f_i = theta^(-2i/d). Each scaling type changes them (d = head_dim):

    default    f_i
    linear     f_i / factor
    dynamic    theta grows once a sequence passes max_position_embeddings (NTK-aware)
    llama3     long waves divided by factor, short ones kept, a ramp between (Llama 3.1)
    yarn       a ramp between f_i / factor and f_i, and cos, sin times an attention factor
               (Peng et al. 2023, https://arxiv.org/abs/2309.00071)

Frequencies, angles, cos and sin are fp32 and cast once, at the end, to the activation dtype, as
Hugging Face does: bf16 angles are off by whole turns at long contexts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sloth.errors import UnsupportedConfig
from sloth.kernels.rows import compute_dtype
from sloth.models.values import checked

DEFAULT_THETA = 10000.0

# What each type needs and what it may carry beside rope_theta and the type itself.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "default": (),
    "linear": (),
    "dynamic": ("original_max_position_embeddings",),
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
# What files carry for other programs: Transformers does not read it, whatever it says.
_FOR_OTHERS = {"yarn": ("attn_factor",)}
# What says nothing of a type that does not read it.
_NEUTRAL = {"default": {"factor": 1.0}}


@dataclass(frozen=True)
class RopeParameters:
    """One rotary table. `settings` holds the scaling type's own numbers, sorted by name."""

    rope_type: str
    theta: float
    head_dim: int
    max_positions: int
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(
        cls,
        parameters: dict[str, Any] | None,
        theta: float,
        head_dim: int,
        max_positions: int,
        ignore: Iterable[str] = (),
    ) -> RopeParameters:
        """Read `rope_parameters` or `rope_scaling`; `theta` and `max_positions` fill what it lacks.

        ignore: keys that no type reads and that shall be left unread. Raises UnsupportedConfig for
        an unknown type, a missing or malformed number, or any other key no type reads.
        """
        given = {k: checked(k, v) for k, v in (parameters or {}).items() if v is not None}
        rope_type = str(given.pop("rope_type", given.pop("type", "default")))
        given.pop("type", None)
        theta = float(given.pop("rope_theta", theta))
        if head_dim % 2:
            raise UnsupportedConfig(
                f"heads of {head_dim} dims cannot be rotated; expected an even number"
            )
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedConfig("partial_rotary_factor other than 1 is not supported")
        if rope_type not in _REQUIRED:
            raise UnsupportedConfig(
                f"rope_type {rope_type!r} is not supported; known: {', '.join(_REQUIRED)}"
            )
        original = given.get("original_max_position_embeddings")
        if rope_type == "yarn" and original:  # the factor may be left to the two lengths
            given.setdefault("factor", max_positions / original)
        missing = [key for key in _REQUIRED[rope_type] if key not in given]
        if missing:
            raise UnsupportedConfig(f"rope_type {rope_type!r} lacks {', '.join(missing)}")
        known = set(_REQUIRED[rope_type]) | set(_OPTIONAL[rope_type])
        neutral = _NEUTRAL.get(rope_type, {})
        for key in sorted(given.keys() - known):
            value = given.pop(key)
            if key in _FOR_OTHERS.get(rope_type, ()):
                warnings.warn(
                    f"config.json sets {key}={value!r}, which Transformers does not read of "
                    f"rope_type {rope_type!r}; sloth leaves it unread, too",
                    stacklevel=2,
                )
            elif key not in ignore and (key not in neutral or value != neutral[key]):
                raise UnsupportedConfig(
                    f"config.json sets {key}={value!r}, which rope_type {rope_type!r} does not "
                    f"read. To load it all the same: sloth.load(..., ignore_config=[{key!r}])"
                )
        if rope_type in ("llama3", "yarn"):
            given.setdefault("original_max_position_embeddings", max_positions)
        return cls(rope_type, theta, head_dim, max_positions, tuple(sorted(given.items())))

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` entry of a Transformers 5 config.json."""
        return {"rope_theta": self.theta, "rope_type": self.rope_type, **dict(self.settings)}

    def __getitem__(self, key: str) -> Any:
        return dict(self.settings)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A setting of the scaling type, or `default`."""
        return dict(self.settings).get(key, default)


@dataclass(frozen=True)
class QueryScale:
    """A factor on queries that grows with position, so that long contexts stay sharply attended:

        1 + beta ln(1 + floor(position / original_max_positions))

    1 within the length the model was first trained on. From Llama 4's temperature tuning (Nakanishi
    2025, https://arxiv.org/abs/2501.19399), where config.json calls beta `llama_4_scaling_beta`.
    """

    beta: float
    original_max_positions: int

    def table(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions [B or 1, T] -> factors [B or 1, T, 1, 1], formed in fp32, cast to dtype."""
        periods = torch.floor(positions / self.original_max_positions)
        return (1 + self.beta * torch.log(1 + periods))[..., None, None].to(dtype)


class Rope:
    """cos and sin of one rotary table; keeps the frequencies between calls.

    The frequencies are no buffer on purpose: `network.to(torch.bfloat16)` would round them.
    """

    def __init__(self, parameters: RopeParameters) -> None:
        self.parameters = parameters
        self.frequencies, self.attention_factor = _frequencies(parameters)
        self._plain, self._exponents = self.frequencies, _exponents(parameters.head_dim)
        self._longest = parameters.max_positions  # dynamic: length the frequencies were made for

    def tables(
        self, positions: Tensor, dtype: torch.dtype, alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """positions [B, T] or [1, T] -> cos, sin [B or 1, T, head_dim] in `dtype`.

        alone: where the table follows the length (dynamic), each row's own, as if nothing else had
        been read; otherwise all rows share that of the longest one so far, as in Hugging Face.
        fp64 activations get tables computed in fp64 from the fp32 frequencies. Positions on meta
        give tables on meta, and what is kept between calls stays as it is.
        """
        if positions.is_meta:
            empty = positions.new_empty(*positions.shape, 2 * len(self._plain), dtype=dtype)
            return empty, empty.clone()
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
            self._plain = self._plain.to(positions.device)
            self._exponents = self._exponents.to(positions.device)
        frequencies = self.frequencies
        if self.parameters.rope_type == "dynamic":
            frequencies = self._of_rows(positions) if alone else self._follow_length(positions)
        wide = compute_dtype(dtype)
        angles = positions[..., None].to(wide) * frequencies.to(wide)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _follow_length(self, positions: Tensor) -> Tensor:
        """Grow with the longest sequence seen; return to the plain table below max_positions."""
        length = positions.max() + 1  # stays a tensor: Hugging Face forms theta in fp32 from it
        if length > self._longest:
            self.frequencies = self._grown(length)
            self._longest = int(length)
        elif length < self.parameters.max_positions < self._longest:
            self.frequencies = self._plain
            self._longest = self.parameters.max_positions
        return self.frequencies

    def _of_rows(self, positions: Tensor) -> Tensor:
        """Frequencies [B, 1, head_dim / 2] by each row's length; the device is not waited for."""
        length = positions.amax(-1)[:, None, None] + 1
        is_long = length > self.parameters.max_positions
        return torch.where(is_long, self._grown(length), self._plain)

    def _grown(self, length: Tensor) -> Tensor:
        """Frequencies of a dynamic table for sequences of this length."""
        p = self.parameters
        growth = (p["factor"] * length / p.max_positions) - (p["factor"] - 1)
        theta = p.theta * growth ** (p.head_dim / (p.head_dim - 2))
        return 1.0 / (theta**self._exponents)


def _frequencies(p: RopeParameters) -> tuple[Tensor, float]:
    """fp32 frequencies [head_dim / 2] and the factor on cos and sin."""
    plain = 1.0 / (p.theta ** _exponents(p.head_dim))
    if p.rope_type == "linear":
        return plain / p["factor"], 1.0
    if p.rope_type == "llama3":
        return _llama3_frequencies(p, plain), 1.0
    if p.rope_type == "yarn":
        return _yarn_frequencies(p), _yarn_attention_factor(p)
    return plain, 1.0  # default, and dynamic up to max_positions


def _exponents(head_dim: int) -> Tensor:
    # On the CPU whatever the default device: a decoder is built on meta.
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim


def _llama3_frequencies(p: RopeParameters, plain: Tensor) -> Tensor:
    low, high, factor = p["low_freq_factor"], p["high_freq_factor"], p["factor"]
    original = p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    is_long, is_short = wavelength > original / low, wavelength < original / high
    scaled = torch.where(is_long, plain / factor, plain)
    ramp = (original / wavelength - low) / (high - low)
    between = (1 - ramp) * scaled / factor + ramp * scaled
    return torch.where(~is_short & ~is_long, between, scaled)


def _yarn_frequencies(p: RopeParameters) -> Tensor:
    dim, factor = p.head_dim, p["factor"]

    def dimension_of(rotations: float) -> float:
        """Index of the frequency that turns `rotations` times over the original context."""
        original = p["original_max_position_embeddings"]
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(p.theta))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = torch.clamp(
        (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1
    )
    waves = p.theta ** _exponents(dim)
    keep = 1 - ramp
    return 1.0 / (factor * waves) * (1 - keep) + 1.0 / waves * keep


def _yarn_attention_factor(p: RopeParameters) -> float:
    given = p.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    mscale, mscale_all_dim = p.get("mscale"), p.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return float(magnitude(p["factor"], mscale) / magnitude(p["factor"], mscale_all_dim))
    return magnitude(p["factor"])
