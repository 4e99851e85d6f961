"""A run in words: what is said when it starts, and the plan that a dry run prints instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from sloth.constants import MIB
from sloth.data.show import describe_first_row, warnings_of
from sloth.formats.tensor_file import num_bytes
from sloth.train.checkpoint import newer_than
from sloth.train.optim import kind_of, rate_scales

if TYPE_CHECKING:
    from sloth.train.trainer import Trainer


def announce(
    notice: Callable[[str | Text], None],
    trainer: Trainer,
    output: Path,
    source: Path | None,
    changed: Sequence[str],
) -> None:
    """What a person should see before the first step."""
    if trainer.state.attached:
        notice(trainer.state.attached)
    if trainer.config.pairs:
        notice(f"objective: {_objective(trainer)}")
    notice(f"data: {trainer.data.summary()}")
    for warning in _warnings(trainer):
        notice(f"WARNING: {warning}")
    if trainer.eval_data:
        notice(f"eval data: {trainer.eval_data.counts.summary()}")
    notice("first row, trained parts in [+ +]:")
    notice(describe_first_row(trainer.data, trainer.model.tokenizer))
    notice(
        f"training {_parameters(trainer)} for {trainer.plan.num_steps} steps; output in {output}"
    )
    if source is not None:
        for name, why in newer_than(source).items():
            if why is not None:
                notice(f"WARNING: {name} is damaged and passed over: {why}")
        notice(f"resumed from {source} after step {trainer.progress.step}")
    if changed:
        notice(f"allowed to differ from the checkpoint: {'; '.join(changed)}")


def describe_plan(trainer: Trainer) -> dict[str, str]:
    """The resolved plan of a run, name by name."""
    config, plan, model, state = trainer.config, trainer.plan, trainer.model, trainer.state
    kinds = {kind_of(name) for name in state.masters.by_name}
    rates = {kind: config.lr * scale for kind, scale in rate_scales(config).items()}
    shown_rates = ", ".join(f"{kind} {rates[kind]:.3g}" for kind in sorted(kinds))
    evaluations = "none"
    if trainer.eval_data or config.sample_prompts:
        often = f"each {config.eval_steps} steps and " if config.eval_steps else ""
        rows = trainer.eval_data.counts.summary() if trainer.eval_data else "no rows"
        evaluations = f"{often}at the end: {rows}; {len(config.sample_prompts)} sample prompts"
    resume = f"from {config.output if config.resume is True else config.resume}"
    return {
        "model": f"{model.name}, {'NF4' if model.is_quantized else 'dense'} on {model.device}",
        "kernel level": f"{model.level}: {model.level_reason}",
        "objective": _objective(trainer),
        "data": trainer.data.summary(),
        "steps": f"{plan.num_steps} of {plan.rows_per_step} rows ({config.batch_size} a pass, "
        f"{config.grad_accum} passes), {plan.epoch(plan.num_steps):.3g} epochs",
        "adapter": state.attached or ("as it is" if model.has_adapter else "none, full training"),
        "trained": _parameters(trainer),
        "optimizer": f"{config.optimizer}, {config.schedule} from {shown_rates}; "
        f"{trainer.timetable.warmup_steps} warm-up steps, decay {config.weight_decay:g}, "
        f"clip {config.clip}",
        "evaluation": evaluations,
        "checkpoints": f"each {config.save_steps or plan.num_steps} steps, "
        f"{state.checkpoint_bytes() / MIB:.1f} MiB each, in {config.output or 'a new runs/<time>'}",
        "resume": resume if config.resume else "no",
        "trackers": ", ".join(config.trackers) or "none",
        "warnings": "; ".join(_warnings(trainer)) or "none",
    }


def _warnings(trainer: Trainer) -> list[str]:
    """What is odd about the data, also for this model."""
    return warnings_of(trainer.data, trainer.model.network.config.max_position_embeddings)


def _objective(trainer: Trainer) -> str:
    config = trainer.config
    if not config.pairs:
        return config.objective
    reference = ""
    if trainer.objective.needs_adapter:
        reference = f"; the reference is {trainer.model.name} with its adapter off"
    return f"{config.objective}, beta {config.beta:g}{reference}"


def _parameters(trainer: Trainer) -> str:
    masters = trainer.state.masters
    count = sum(parameter.numel() for parameter in masters.by_name.values())
    held = num_bytes(masters.by_name) / MIB
    beside = f", with fp32 masters of {masters.count:,}" if masters.count else ""
    return f"{count:,} parameters ({held:.1f} MiB{beside})"
