"""`sloth estimate MODEL`: what a training step will take, before any weights are fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from sloth.commands.base import ModelName, parse, show
from sloth.lora_config import LoraConfig
from sloth.train.config import Optimizer

if TYPE_CHECKING:
    from sloth.train.memory import Plan


@dataclass(frozen=True)
class Estimate:
    """Predict the memory of a training step on MODEL from its config.json, without its weights."""

    model: ModelName
    seq: int = 2048
    """Tokens of a row."""
    batch: int = 1
    """Rows of a forward pass."""
    quant: Literal["nf4", "none"] = "none"
    """How the base is loaded: nf4, or none for as its files are."""
    full: bool = False
    """Train every weight, without an adapter."""
    memory_gib: float | None = None
    """The budget; what the first GPU has free unless said."""
    dtype: str = "bfloat16"
    """What the model computes in: bfloat16, float16 or float32."""
    optimizer: Optimizer = "adamw"
    """Of a full training: adamw, or adamw_8bit."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    base_compute: Literal["fp8"] | None = None
    """fp8: products with the frozen base in 8-bit floats, whose copies take memory."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def plan(self) -> Plan:
        """The prediction."""
        from sloth.estimating import estimate

        return estimate(
            self.model,
            seq=self.seq,
            batch=self.batch,
            quant=None if self.quant == "none" else self.quant,
            lora=None if self.full else self.lora,
            full=self.full,
            memory_gib=self.memory_gib,
            dtype=self.dtype,
            optimizer=self.optimizer,
            revision=self.revision,
            base_compute=self.base_compute,
        )

    def smaller(self) -> Iterator[tuple[str, Estimate]]:
        """What needs less, in words, the least loss first."""
        if self.full:
            adapter = replace(self, full=False, optimizer="adamw")
            yield "a LoRA adapter (without --full)", adapter
            yield "--quant nf4 with an adapter", replace(adapter, quant="nf4")
            return
        quantized = replace(self, quant="nf4")
        if self.quant == "none":
            yield "--quant nf4", quantized
        if self.batch > 1:
            yield "--batch 1", replace(self, batch=1)
            yield "--quant nf4 --batch 1", replace(quantized, batch=1)
        seq = self.seq // 2
        while seq >= 128:
            yield f"--quant nf4 --batch 1 --seq {seq}", replace(quantized, batch=1, seq=seq)
            seq //= 2


def run(arguments: Sequence[str]) -> int:
    """Predict the memory of a training step, without loading weights."""
    parsed: Estimate = parse(Estimate, "estimate", arguments)
    if parsed.full and any(argument.startswith("--lora.") for argument in arguments):
        raise ValueError("--full trains every weight and attaches no adapter; leave --lora.* out")
    if not parsed.full and parsed.optimizer != "adamw":
        raise ValueError(
            "--optimizer has no effect without --full: plans of an adapter count its moments in "
            "32 bits, which are few"
        )
    plan = parsed.plan()
    show(str(plan))
    if plan.budget_gib is not None:
        show(f"fits          {'yes' if plan.fits else f'no; {_what_would(parsed)}'}")
    return 0


def _what_would(parsed: Estimate) -> str:
    for said, other in parsed.smaller():
        plan = other.plan()
        if plan.fits:
            return f"{said} would, with {plan.predicted_gib:.2f} GiB"
    return "nor would a 4-bit base, one row, or short ones"
