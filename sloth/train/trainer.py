"""The training loop. `Trainer(model, data, config).run()` is all of training; `model.train` calls
it.

    step:  loss = sum of CE over the trained tokens of all micro-batches / their number
           backward; gradient norm; skip the update if anything is not finite, else clip and update

Data order, learning rate and row split are pure functions of the step, and a checkpoint holds
parameters, optimizer and generator states, so a resumed run continues with the same losses, bit by
bit on a CPU. The global generators are seeded for the run and put back afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sloth.errors import NonFiniteGradients
from sloth.lora_config import LoraConfig
from sloth.train import checkpoint
from sloth.train.config import TrainConfig, with_overrides
from sloth.train.data import Batch, Dataset, Source, StepPlan, collate, describe_row, load_data
from sloth.train.log import RunLog, StepRecord, memory_bytes
from sloth.train.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable,
)
from sloth.train.plot import plot_losses
from sloth.train.run import (
    Identity,
    base_fingerprint,
    check_device,
    check_model,
    claim_output,
    publish_weights,
    refuse_changes,
    seeded,
    write_settings,
)
from sloth.train.schedule import learning_rate

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer


class Trainable(Protocol):
    """What the trainer asks of a model; `sloth.Model` has it."""

    network: Any
    name: str
    revision: str | None
    is_quantized: bool
    lora_config: LoraConfig | None

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
    def add_lora(self, config: LoraConfig | None = None) -> Any: ...
    def save_adapter(self, folder: Path) -> Any: ...
    def save_merged(self, folder: Path) -> Any: ...


@dataclass(frozen=True)
class TrainReport:
    """What a run did, from its first step even when it was resumed.

    losses: one per optimizer step (NaN where it was not finite). eval_losses: by step. tokens:
    read by the model; trained_tokens: of those, in the loss. skipped: steps without an update.
    paths: output, config, metrics, loss_svg, loss_png (with matplotlib), adapter or model,
    checkpoint.
    """

    losses: list[float]
    tokens: int
    seconds: float
    paths: dict[str, Path]
    trained_tokens: int = 0
    skipped: int = 0
    eval_losses: dict[int, float] = field(default_factory=dict)


@dataclass
class Progress:
    """What a checkpoint's state.json holds of the run so far."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)
    eval_losses: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One training run of a model on data.

    Raises ValueError for settings that cannot take effect, DataError, TokenizerMissing.
    """

    def __init__(
        self, model: Trainable, data: Source, config: TrainConfig | None = None, **overrides: Any
    ) -> None:
        self.model = model
        self.config = config = with_overrides(config, overrides)
        check_model(model, config)
        check_device(config, model.device)
        tokenizer = model.tokenizer
        self.data = load_data(data, tokenizer, config.max_length)
        self.eval_data: Dataset | None = None
        if config.eval_data is not None:
            self.eval_data = load_data(config.eval_data, tokenizer, config.max_length, "eval_data")
        self.plan = StepPlan.of(
            len(self.data.examples),
            config.batch_size,
            config.grad_accum,
            config.seed,
            config.max_steps,
            config.epochs,
        )
        self._pad_id = tokenizer.pad_id or 0

    def run(self) -> TrainReport:
        """Train, and write the adapter (or the model), metrics and curve under the output folder.

        Raises OutputExists, NonFiniteGradients, CheckpointMismatch; ValueError when settings
        differ from those of the checkpoint to resume.
        """
        output, source = claim_output(self.config)
        was_training = self.model.network.training
        try:
            with seeded(self.config, self.model.device):
                attached = self._attach_adapter()
                self.parameters = trainable(self.model.network)
                if not self.parameters:
                    raise ValueError("no parameter of the model requires a gradient; call add_lora")
                self.optimizer = build_optimizer(
                    self.parameters, self.config.lr, self.config.weight_decay
                )
                self.progress = Progress() if source is None else self._resume(source)
                write_settings(self.config, output)
                first_step = self.progress.step
                with RunLog(output / "metrics.jsonl", first_step, self.plan.num_steps) as log:
                    self._announce(log, output, source, attached)
                    saved = self._loop(output, log, source)
                return self._finish(output, saved)
        finally:
            self.model.network.zero_grad(set_to_none=True)
            self.model.network.train(was_training)

    def _loop(self, output: Path, log: RunLog, saved: Path | None) -> Path | None:
        config, progress, parameters = self.config, self.progress, self.parameters.values()
        self.model.network.train()
        self.model.network.zero_grad(set_to_none=True)
        for step in range(progress.step, self.plan.num_steps):
            began = time.monotonic()
            lr = self._learning_rate(step)
            batches = [self._batch(self.data, rows) for rows in self.plan.micro_batches(step)]
            num_trained = sum(batch.num_trained for batch in batches)
            parts = []
            for batch in batches:
                loss = self.model.loss(batch.tokens, batch.labels, num_trained=num_trained)
                loss.backward()
                parts.append(loss.detach())
            norm = gradient_norm(parameters)
            loss_value, norm_value = torch.stack(
                (torch.stack(parts).sum(), norm.to(loss.dtype))
            ).tolist()
            is_good = math.isfinite(loss_value) and math.isfinite(norm_value)
            if is_good:
                clip_gradients(parameters, norm, config.clip)
                set_learning_rate(self.optimizer, lr)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

            seconds = time.monotonic() - began
            log.step(self._record(step, batches, loss_value, norm_value, lr, seconds, is_good))
            if progress.bad_in_a_row >= config.max_bad_steps:
                raise NonFiniteGradients(self._why_stopped(saved))
            is_last = progress.step == self.plan.num_steps
            if self.eval_data and (is_last or _is_due(progress.step, config.eval_steps)):
                loss_value = progress.eval_losses[str(progress.step)] = self._evaluate()
                log.evaluation(progress.step, loss_value)
            if is_last or _is_due(progress.step, config.save_steps):
                saved = self._save(output)
        return saved

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            config.schedule, config.lr, step, self.plan.num_steps, config.warmup_steps
        )

    def _batch(self, data: Dataset, rows: list[int]) -> Batch:
        return collate([data.examples[row] for row in rows], self._pad_id)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss over the trained tokens of all held-out rows, dropout off."""
        assert self.eval_data is not None
        rows, size = range(len(self.eval_data.examples)), self.config.batch_size
        num_trained = self.eval_data.counts.trained_tokens
        self.model.network.eval()
        total = 0.0
        for first in range(0, len(rows), size):
            batch = self._batch(self.eval_data, list(rows[first : first + size]))
            total += self.model.loss(batch.tokens, batch.labels, num_trained=num_trained).item()
        self.model.network.train()
        return total

    def _record(
        self,
        step: int,
        batches: list[Batch],
        loss: float,
        norm: float,
        lr: float,
        seconds: float,
        is_good: bool,
    ) -> StepRecord:
        """Count a step into the progress."""
        progress = self.progress
        tokens = sum(batch.num_tokens for batch in batches)
        trained = sum(batch.num_trained for batch in batches)
        progress.step = step + 1
        progress.tokens += tokens
        progress.trained_tokens += trained
        progress.seconds += seconds
        progress.skipped += not is_good
        progress.bad_in_a_row = 0 if is_good else progress.bad_in_a_row + 1
        progress.losses.append(loss)
        return StepRecord(
            step=step + 1,
            epoch=self.plan.epoch(step + 1),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            trained_tokens=trained,
            seconds=seconds,
            memory_bytes=memory_bytes(self.model.device),
            skipped=not is_good,
            rows=None if is_good else self.plan.rows(step),
        )

    def _why_stopped(self, saved: Path | None) -> str:
        progress = self.progress
        kept = f"the last checkpoint, {saved}, is good" if saved else "no checkpoint was due yet"
        return (
            f"{progress.bad_in_a_row} steps in a row had a gradient or loss that is not finite, "
            f"the last one step {progress.step}, rows {self.plan.rows(progress.step - 1)}; {kept}. "
            "Weights were not updated in these steps. A lower lr, a warm-up, or a look at those "
            "rows may help"
        )

    # -- before and after ------------------------------------------------------------------------

    def _attach_adapter(self) -> str | None:
        """Attach what the settings ask for; an NF4 base is frozen, so it always needs one."""
        model, wanted = self.model, self.config.lora
        if model.has_adapter or (wanted is None and not model.is_quantized):
            return None
        model.add_lora(wanted or LoraConfig())
        used = wanted or LoraConfig()
        why = "" if wanted else " (an NF4 model trains through an adapter; these are the defaults)"
        return f"attached LoRA r={used.r} alpha={used.alpha:g} targets={used.targets}{why}"

    def _announce(
        self, log: RunLog, output: Path, source: Path | None, attached: str | None
    ) -> None:
        if attached:
            log.notice(attached)
        log.notice(f"data: {self.data.counts.summary()}")
        if self.eval_data:
            log.notice(f"eval data: {self.eval_data.counts.summary()}")
        log.notice("first row, trained parts in [+ +]:")
        log.notice(describe_row(self.data.examples[0], self.model.tokenizer))
        count = sum(parameter.numel() for parameter in self.parameters.values())
        log.notice(
            f"training {count:,} parameters for {self.plan.num_steps} steps; output in {output}"
        )
        if source is not None:
            log.notice(f"resumed from {source} after step {self.progress.step}")

    def _identity(self) -> Identity:
        lora = self.model.lora_config
        return Identity(
            settings=self.config.plain(),
            num_steps=self.plan.num_steps,
            data=self.data.fingerprint,
            base=base_fingerprint(self.model.network),
            lora=lora.model_dump(mode="json") if lora else None,
        )

    def _save(self, output: Path) -> Path:
        state = {
            "progress": asdict(self.progress),
            "identity": asdict(self._identity()),
            "model": {"name": self.model.name, "revision": self.model.revision},
            "torch": torch.__version__,
        }
        tensors: dict[str, Mapping[str, Tensor]] = {
            "trainable": self.parameters,
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            "rng": checkpoint.rng_tensors(self.model.device),
        }
        return checkpoint.write_checkpoint(output, self.progress.step, tensors, state)

    def _resume(self, source: Path) -> Progress:
        state = checkpoint.read_state(source)
        refuse_changes(Identity(**state["identity"]), self._identity(), source)
        stored = checkpoint.read_tensors(source, "trainable")
        checkpoint.copy_parameters(self.parameters, stored, source)
        load_optimizer_tensors(
            self.optimizer, self.parameters, checkpoint.read_tensors(source, "optimizer")
        )
        checkpoint.set_rng(checkpoint.read_tensors(source, "rng"), self.model.device)
        return Progress(**state["progress"])

    def _finish(self, output: Path, saved: Path | None) -> TrainReport:
        progress = self.progress
        eval_losses = {int(step): loss for step, loss in progress.eval_losses.items()}
        paths = {
            "output": output,
            "config": output / "config.yaml",
            "metrics": output / "metrics.jsonl",
            **plot_losses(output, progress.losses, eval_losses),
            **publish_weights(self.model, output),
        }
        if saved is not None:
            paths["checkpoint"] = saved
        return TrainReport(
            losses=progress.losses,
            tokens=progress.tokens,
            seconds=progress.seconds,
            paths=paths,
            trained_tokens=progress.trained_tokens,
            skipped=progress.skipped,
            eval_losses=eval_losses,
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
