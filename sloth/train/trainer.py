"""The training loop. `Trainer(model, data, config).run()` is all of training; `model.train` calls
it.

    step:  loss = sum of CE over the trained tokens of all micro-batches / their number
           backward; gradient norm; skip the update if anything is not finite, else clip and update
    then:  log; save; leave if a signal asked for it; evaluate, which may save again

Data order, learning rate and row split are pure functions of the step, and a checkpoint holds
parameters, optimizer and generator states, so a resumed run continues with the same losses, bit by
bit on a CPU. The global generators are seeded for the run and put back afterwards.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sloth.data.dataset import Batch, Dataset, Source, StepPlan, require_vocabulary
from sloth.data.held_out import load_both
from sloth.data.show import beginnings, named_rows
from sloth.errors import Interrupted, NonFiniteGradients
from sloth.quiet import say
from sloth.train.accumulate import Accumulated, Accumulator
from sloth.train.callbacks import Callback
from sloth.train.config import TrainConfig, with_overrides
from sloth.train.describe import announce, describe_plan
from sloth.train.evaluate import best_step, encode_prompts
from sloth.train.facts import RunFacts, Training
from sloth.train.held_out import HeldOut
from sloth.train.log import RunLog, memory_bytes
from sloth.train.neftune import noisy_embeddings
from sloth.train.objectives import objective_of
from sloth.train.optim import clip_gradients, gradient_norm, make_moments, set_learning_rate
from sloth.train.output import choose_output, claimed
from sloth.train.plot import plot_losses
from sloth.train.publish import publish_weights
from sloth.train.ranks import Ranks
from sloth.train.records import Progress, StepRecord, TrainReport
from sloth.train.run import check_settings, planned_within, seeded, write_settings
from sloth.train.run_folder import FACTS, METRICS, SETTINGS
from sloth.train.saving import Saver
from sloth.train.signals import StopRequest
from sloth.train.state import TrainState
from sloth.train.timetable import Timetable
from sloth.train.trackers import build_trackers
from sloth.train.trainable import Trainable

__all__ = ["Trainable", "TrainReport", "Trainer"]


class Trainer:
    """One training run of a model on data. callbacks: watch it, see `Callback`.

    Raises ValueError for settings that cannot take effect, BudgetTooSmall for a full training that
    cannot fit, DataError, TokenizerMissing.
    """

    def __init__(
        self,
        model: Trainable,
        data: Source,
        config: TrainConfig | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        **overrides: Any,
    ) -> None:
        self.model, self.callbacks = model, list(callbacks)
        self.config = with_overrides(config, overrides)
        self.ranks = Ranks.of_process(model.device)
        self.ranks.meet()
        try:
            self.ranks.together(lambda: self._prepare(data))
        except BaseException:
            self.ranks.leave()
            raise

    def _prepare(self, data: Source) -> None:
        """Check the settings, read the data, plan the steps."""
        config, model = self.config, self.model
        check_settings(model, config)
        self.objective = objective_of(model, config)
        tokenizer = model.tokenizer
        notice = say if self.ranks.is_first else None
        self.data, self.eval_data = load_both(config, data, tokenizer, notice)
        for held in filter(None, (self.data, self.eval_data)):
            require_vocabulary(held, model.network.config.vocab_size)
        self._plan_steps()
        encode_prompts(tokenizer, config.sample_prompts)
        self._pad_id = tokenizer.pad_id or 0

    def _plan_steps(self, *first: int) -> None:
        """first: step and row to go on from."""
        config = self.config
        sizes = self.data.num_rows, config.batch_size, config.grad_accum, config.seed
        self.plan = StepPlan.of(*sizes, config.max_steps, config.epochs, *first)
        self.timetable = Timetable(config, self.plan.num_steps, self.eval_data is not None)

    def run(self) -> TrainReport:
        """Train, and write the adapter (or the model), metrics and curve under the output folder.

        Raises OutputExists, NonFiniteGradients, CheckpointMismatch, OutOfMemory, SaveFailed;
        Interrupted after SIGINT or SIGTERM; ValueError when settings differ from those of the
        checkpoint to resume.
        """
        config, network = self.config, self.model.network
        was_training = network.training
        try:
            with (
                self.ranks,
                seeded(config, self.model.device),
                noisy_embeddings(network, config.neftune),
                claimed(config, self.model.name, self.ranks) as (output, source),
            ):
                self.state = self._new_state()
                changed = self.ranks.together(lambda: self._resumed(source))
                self.ranks.first(self._check_room, output, self.progress)
                with self._within_budget():  # the last that may refuse: from here on it writes
                    facts = self._train(output, source, changed)
                self.model.training = Training.of(facts, self.progress)
                return self._finish(output, source)
        finally:
            network.zero_grad(set_to_none=True)
            network.train(was_training)

    def dry_run(self) -> dict[str, str]:
        """What `run` would do, in words; settings that could not take effect raise as they would
        there. An adapter that the settings ask for is attached to the model.
        """
        with self.ranks, seeded(self.config, self.model.device):
            output, source = choose_output(self.config, self.model.name)
            self.state = self._new_state()
            progress = Progress()
            if source is not None:
                progress = self.state.try_resume(source)
                self._go_on(progress, source)
            self._check_room(output, progress)
            with (
                noisy_embeddings(self.model.network, self.config.neftune),
                self._within_budget(),
            ):
                return describe_plan(self)

    def _resumed(self, source: Path | None) -> list[str]:
        """What is allowed to differ from the checkpoint that was put back, if there is one."""
        if source is None:
            return []
        changed = self.state.resume(source)
        self._go_on(self.progress, source)
        return changed

    def _go_on(self, progress: Progress, source: Path) -> None:
        """Plan what is left. Raises ValueError for a run that went further than it now should."""
        if progress.rows_read is not None:
            self._plan_steps(progress.step, progress.rows_read)
        if progress.step > self.plan.num_steps:
            raise ValueError(
                f"{source} is finished beyond these settings: it has done {progress.step} steps, "
                f"and they end after {self.plan.num_steps}; raise max_steps or epochs, or start a "
                "new run"
            )

    def _check_room(self, output: Path, progress: Progress) -> None:
        state, timetable = self.state, self.timetable
        Saver(output, say, lambda *rest: None).require_room(
            state.checkpoint_bytes(),
            state.published_bytes(),
            timetable.num_saves(progress),
            timetable.keeps_best,
        )

    def _train(self, output: Path, source: Path | None, changed: Sequence[str]) -> RunFacts:
        """From the first file to the last step; what the run is about."""
        state, facts = self.state, RunFacts.of(self.state, self.config, self.data, self.eval_data)
        self.ranks.first(facts.write, output, source)  # first: a run's folder is told by it
        with (
            self._new_log(output) as log,
            StopRequest() as stop,
            state.masters.collecting_gradients(),
        ):
            self.saver = saver = Saver(output, log.notice, log.saved, source, log.sync)
            self.ranks.first(write_settings, self.config, output)
            self.ranks.first(log.start, self.config.plain())
            announce(log.notice, self, output, source, changed)
            with saver.explaining_out_of_memory():
                self.ranks.together(lambda: make_moments(state.optimizer, state.masters.by_name))
                self._loop(log, saver, stop)
            log.curve(self.progress.losses)
        return facts

    def _within_budget(self) -> AbstractContextManager[None]:
        """Inside, plans keep to memory_gib; the budget holds a pass of one row at the least."""
        return planned_within(self.model, self.config.memory_gib, *self.data.pass_shape(1))

    def _loop(self, log: RunLog, saver: Saver, stop: StopRequest) -> None:
        config, progress, masters = self.config, self.progress, self.state.masters
        timetable = self.timetable
        accumulator, parameters = self._accumulator(log), masters.by_name.values()
        held_out = self._held_out()

        def evaluate(is_saved: bool) -> signal.Signals | None:
            """Evaluate the model, and keep it; the signal that came meanwhile, if any."""
            improved = held_out.evaluate(progress, log, accumulator, stop)
            self._note_passes(accumulator)
            stopping = stop.agreed(self.ranks)
            if is_saved:
                self.state.save_evaluation(saver)
            elif improved or stopping or timetable.is_finished(progress):
                self.state.save(saver)
            return stopping

        self.model.network.train()
        masters.drop_gradients()
        progress.is_eval_due = progress.is_eval_due and timetable.is_eval_due(progress.step)
        if progress.is_eval_due:  # the run that is resumed ended before it
            is_own = saver.newest is not None and saver.newest.parent == saver.output
            if stopping := evaluate(is_own):
                self._leave(stopping, log, saver)
        while not timetable.is_finished(progress):
            began, step = time.monotonic(), progress.step
            lr = timetable.learning_rate(step)
            added = accumulator.step(self.plan.rows(step))
            self.ranks.add_gradients(parameters)
            norm = gradient_norm(parameters)
            loss_value, norm_value = torch.stack((added.loss, norm.to(added.loss.dtype))).tolist()
            is_good = math.isfinite(loss_value) and math.isfinite(norm_value)
            if is_good:
                self.ranks.agree(partial(self._update, norm, lr))
            masters.drop_gradients()

            seconds = time.monotonic() - began
            record = self._record(step, added, loss_value, norm_value, lr, seconds, is_good)
            self.ranks.first(log.step, record)
            if progress.bad_in_a_row >= config.max_bad_steps:
                raise NonFiniteGradients(self._why_stopped(saver))
            self._note_passes(accumulator)
            progress.is_eval_due = timetable.is_eval_due(progress.step)
            stopping = stop.agreed(self.ranks)
            is_saved = stopping is not None or timetable.is_save_due(progress.step)
            if is_saved:  # first: whatever happens in an evaluation costs no step
                self.state.save(saver)
            if progress.is_eval_due and stopping is None:
                stopping = evaluate(is_saved)
            if stopping is not None:
                self._leave(stopping, log, saver)

    def _leave(self, stopping: signal.Signals, log: RunLog, saver: Saver) -> NoReturn:
        said = f"stopped by {stopping.name} after step {self.progress.step}"
        log.notice(f"{said}; {saver.last_words()}, continue with resume")
        raise Interrupted(stopping, f"{said}; {saver.last_words()}")

    def _note_passes(self, accumulator: Accumulator) -> None:
        if accumulator.rows_per_pass < self.config.batch_size:
            self.progress.rows_per_pass = accumulator.rows_per_pass

    def _update(self, norm: Tensor, lr: float) -> list[float]:
        """Move the weights along the gradients; no number to add up over ranks."""
        masters, optimizer = self.state.masters, self.state.optimizer
        clip_gradients(masters.by_name.values(), norm, self.config.clip)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        masters.write_back()
        return []

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.state.progress

    def _new_state(self) -> TrainState:
        eval_data = self.eval_data.fingerprint if self.eval_data else None
        data = self.data.fingerprint, eval_data
        state = self.ranks.together(
            lambda: TrainState(self.model, self.config, self.plan.num_steps, *data, self.ranks)
        )
        state.start_equal()
        return state

    def _new_log(self, output: Path) -> RunLog:
        metrics = output / METRICS if self.ranks.is_first else None
        step, num_steps = self.progress.step, self.plan.num_steps
        log = RunLog(metrics, step, num_steps, before=self.progress)
        if not self.ranks.is_first:
            return log
        trackers = build_trackers(self.config.trackers, self.config.project, log.notice)
        log.callbacks = [*self.callbacks, *trackers]
        return log

    def _accumulator(self, log: RunLog) -> Accumulator:
        batch_size = self.config.batch_size
        return Accumulator(
            ranks=self.ranks,
            batch_of=lambda rows: self._batch(self.data, rows),
            objective=self.objective,
            forget=self.state.masters.drop_gradients,
            notice=log.notice,
            rows_per_pass=min(self.progress.rows_per_pass or batch_size, batch_size),
            eval_rows_per_pass=self.config.eval_batch_size,
        )

    def _held_out(self) -> HeldOut:
        return HeldOut(
            objective=self.objective,
            config=self.config,
            ranks=self.ranks,
            data=self.eval_data,
            longest=max(self.data.row_lengths()),
            batch_of=self._batch,
        )

    def _batch(self, data: Dataset, rows: list[int]) -> Batch:
        return data.batch(rows, self._pad_id, padding_free=self.model.device.type == "cuda")

    def _record(
        self,
        step: int,
        added: Accumulated,
        loss: float,
        norm: float,
        lr: float,
        seconds: float,
        is_good: bool,
    ) -> StepRecord:
        """Count a step into the progress."""
        self.progress.rows_read = self.plan.rows_before(step + 1)
        self.progress.add(loss, added.num_tokens, added.num_trained, seconds, is_good)
        return StepRecord(
            step=step + 1,
            epoch=self.plan.epoch(step + 1),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=added.num_tokens,
            trained_tokens=added.num_trained,
            seconds=seconds,
            memory_bytes=memory_bytes(self.model.device),
            skipped=not is_good,
            rows=None if is_good else self.plan.rows(step),
            begins=None if is_good else self._beginnings(step),
            metrics=self.objective.named(added.metrics),
        )

    def _beginnings(self, step: int) -> list[str]:
        return beginnings(self.data, self.plan.rows(step), self.model.tokenizer)

    def _why_stopped(self, saver: Saver) -> str:
        progress = self.progress
        last = progress.step - 1
        rows = named_rows(self.plan.rows(last), self._beginnings(last))
        return (
            f"{progress.bad_in_a_row} steps in a row had a gradient or loss that is not finite, "
            f"the last one step {progress.step}, {rows}; "
            f"{saver.last_words()}. Weights were not updated in these steps. A lower lr, a "
            "warm-up, or a look at those rows may help"
        )

    def _publish(self, output: Path, paths: dict[str, Path]) -> None:
        """The weights, then the pictures."""
        progress, saver = self.progress, self.saver
        holder = paths.get("best") or saver.holder_of(progress.step)
        paths |= publish_weights(self.model, output, holder)
        paths |= plot_losses(output, progress.losses, progress.eval_losses_by_step, saver.notice)

    def _finish(self, output: Path, source: Path | None) -> TrainReport:
        progress, saver = self.progress, self.saver
        paths = {
            "output": output,
            "config": output / SETTINGS,
            "facts": output / FACTS,
            "metrics": output / METRICS,
        }
        if self.config.load_best:
            places = [output, *([source.parent] if source else [])]
            loaded = self.state.load_best(places, saver.notice)
            paths |= {"best": loaded} if loaded is not None else {}
        if saver.newest is not None:
            paths["checkpoint"] = saver.newest

        self.ranks.first(self._publish, output, paths)
        self.ranks.first(saver.finish)
        return TrainReport(
            losses=progress.losses,
            tokens=progress.tokens,
            seconds=progress.seconds,
            paths=paths,
            trained_tokens=progress.trained_tokens,
            data=self.data.counts,
            skipped=progress.skipped,
            eval_losses=progress.eval_losses_by_step,
            best_step=best_step(progress.eval_losses_by_step),
            stopped_early=progress.step < self.plan.num_steps,
        )
