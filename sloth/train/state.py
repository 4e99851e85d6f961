"""What changes while a run goes on, in one place: masters, optimizer, generators, progress. Saved
whole, and put back whole.

`TrainState` is what a checkpoint holds. Identity, beside it, is what must not change.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sloth import __version__
from sloth.formats.tensor_file import num_bytes
from sloth.lora import redraw_lora
from sloth.lora_config import LoraConfig
from sloth.redact import Redactor
from sloth.train import checkpoint
from sloth.train.config import TrainConfig
from sloth.train.evaluate import best_step
from sloth.train.identity import Identity, base_fingerprint, refuse_changes
from sloth.train.masters import Masters
from sloth.train.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    state_bytes,
    trainable,
)
from sloth.train.ranks import Ranks
from sloth.train.records import Progress
from sloth.train.run import write_settings
from sloth.train.run_folder import checkpoint_name, step_of
from sloth.train.saving import Saver
from sloth.train.trainable import Trainable


class TrainState:
    """Attaches the adapter that the settings ask for and builds the optimizer. An adapter that was
    never trained starts from the run's seed, whoever attached it.

    attached: what was attached, in words. Raises ValueError for a model or a rate without a
    parameter to train, AdapterMismatch, NoTargets.
    """

    def __init__(
        self,
        model: Trainable,
        config: TrainConfig,
        num_steps: int,
        data: str,
        eval_data: str | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.attached = _attach_adapter(model, config)
        if model.has_adapter:
            redraw_lora(model.network, config.seed)
        if ranks.rank:  # weights are the same everywhere, dropout from here on is not
            torch.manual_seed(config.seed + ranks.rank)
        parameters = trainable(model.network)
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient; call add_lora")
        self.masters = Masters(parameters)
        self.optimizer = build_optimizer(self.masters.by_name, config)
        self.progress = Progress()
        lora = model.lora_config
        self.identity = Identity(
            settings=Redactor().value(config.plain()),
            num_steps=num_steps,
            data=data,
            base=base_fingerprint(model.network),
            lora=lora.model_dump(mode="json") if lora else None,
            ranks=ranks.size,
            level=model.level,
            base_compute=model.network.base_compute,
            eval_data=eval_data,
        )

    def start_equal(self) -> None:
        """The same run in every rank, by what identifies it, and the weights of the first."""
        identity = asdict(self.identity)
        self.ranks.require_same({**identity.pop("settings"), **identity})
        self.ranks.take_first(self.masters.by_name.values())
        self.masters.write_back()

    def checkpoint_bytes(self) -> int:
        """What a checkpoint will take, once the optimizer has moments."""
        tensors = self.masters.by_name
        return num_bytes(tensors) + state_bytes(tensors, self.config)

    def published_bytes(self) -> int:
        """What the results will take: an adapter, or all weights as the network holds them."""
        if self.model.has_adapter:
            return num_bytes(self.masters.parameters)
        return num_bytes(dict(self.model.network.named_parameters()))

    def save(self, saver: Saver) -> None:
        """A checkpoint of this moment, if the disk takes it."""
        state = {
            "progress": asdict(self.progress),
            "identity": asdict(self.identity),
            "model": {
                "name": Redactor().text(self.model.name),
                "revision": self.model.revision,
            },
            "versions": {"sloth": __version__, "torch": torch.__version__},
        }
        tensors: checkpoint.TensorFiles = {
            "trainable": self.masters.by_name,
            "optimizer": optimizer_tensors(self.optimizer, self.masters.by_name),
            "rng": self.ranks.gather(checkpoint.rng_tensors(self.model.device)),
        }
        best = best_step(self.progress.eval_losses_by_step)
        step = self.progress.step
        self.ranks.first(saver.save, step, tensors, state, self._add_files, best)

    def save_evaluation(self, saver: Saver) -> None:
        """The progress after this moment's model was evaluated, into its checkpoint."""
        self.ranks.first(saver.save_evaluation, self.progress.step, asdict(self.progress))

    def check_resume(self, source: Path) -> tuple[dict[str, Any], list[str]]:
        """A checkpoint's state, and the allowed changes in words. Raises ValueError for others."""
        state = checkpoint.read_state(source)
        before = Identity(**state["identity"])
        progress = state["progress"]
        if "is_look_due" in progress:  # as older versions call it
            progress["is_eval_due"] = progress.pop("is_look_due")
        if "rows_read" not in progress:  # of an older version
            sizes = [
                settings["batch_size"] * settings["grad_accum"]
                for settings in (before.settings, self.identity.settings)
            ]
            read = progress["step"] * sizes[0]
            progress["rows_read"] = read if sizes[0] != sizes[1] else None
        return state, refuse_changes(before, self.identity, source, self.config.allow_change)

    def try_resume(self, source: Path) -> Progress:
        """Raise what `resume` would, and change nothing; how far the run was."""
        state, _ = self.check_resume(source)
        stored = checkpoint.read_tensors(source, "trainable")
        checkpoint.check_parameters(self.masters.by_name, stored, source)
        return Progress(**state["progress"])

    def resume(self, source: Path) -> list[str]:
        """Continue from a checkpoint; the allowed changes, in words.

        Raises ValueError for changes that are not allowed, CheckpointMismatch.
        """
        state, changed = self.check_resume(source)
        self._load_weights(source)
        was = Identity(**state["identity"])
        if was.settings.get("optimizer", "adamw") == self.config.optimizer:
            moments = checkpoint.read_tensors(source, "optimizer")
            load_optimizer_tensors(self.optimizer, self.masters.by_name, moments)
        else:
            changed.append("the optimizer's moments, which begin anew")
        self.progress = Progress(**state["progress"])
        generators = self.ranks.pick(checkpoint.read_tensors(source, "rng"))
        if generators:
            checkpoint.set_rng(generators, self.model.device)
        else:  # the run had fewer processes
            place = f"{self.config.seed} {self.ranks.rank} {self.progress.step}"
            torch.manual_seed(random.Random(f"sloth rank {place}").getrandbits(63))
        before, now = was.eval_data, self.identity.eval_data
        if self.progress.eval_losses and None not in (before, now) and before != now:
            self.progress.eval_losses = {}
            changed.append("held-out rows, so the best loss and patience begin anew")
        return changed

    def load_best(self, places: Sequence[Path], notice: Callable[[str], None]) -> Path | None:
        """Go back to the weights of the lowest evaluation loss: its checkpoint, in the first place
        that has it whole. Where none has, to those of the next lowest, or none: with a warning, as
        a run is worth more than its best weights.
        """
        best = best_step(self.progress.eval_losses_by_step)
        found = self.ranks.tell(str(self._find_best(places) if self.ranks.is_first else ""))
        if not found:
            lost = "no evaluation loss of this run was finite"
            if best is not None:
                lost = f"no checkpoint with an evaluation loss is whole in {_named(places)}"
            notice(f"WARNING: load_best: {lost}; the weights of the last step are published")
            return None
        folder = Path(found)
        if best is not None and step_of(folder) != best:
            notice(
                f"WARNING: load_best: {checkpoint_name(best)}, with the lowest evaluation "
                f"loss, is not whole in {_named(places)}; the best of the others, {folder.name}, "
                "is published"
            )
        self.ranks.together(lambda: self._load_weights(folder))
        return folder

    def _find_best(self, places: Sequence[Path]) -> Path | str:
        """The whole checkpoint with the lowest finite evaluation loss; "" without any."""
        losses = dict(self.progress.eval_losses_by_step)
        while (step := best_step(losses)) is not None:
            del losses[step]
            for place in places:
                if checkpoint.is_good(place / checkpoint_name(step)):
                    return place / checkpoint_name(step)
        return ""

    def _load_weights(self, source: Path) -> None:
        stored = checkpoint.read_tensors(source, "trainable")
        checkpoint.copy_parameters(self.masters.by_name, stored, source)
        self.masters.write_back()

    def _add_files(self, folder: Path) -> None:
        self.model.tokenizer.save(folder)
        write_settings(self.config, folder)


def _named(places: Sequence[Path]) -> str:
    return " or ".join(map(str, places))


def _attach_adapter(model: Trainable, config: TrainConfig) -> str | None:
    """Attach what the settings ask for; an NF4 base is frozen, so it always needs one."""
    wanted = config.lora
    if model.has_adapter or (wanted is None and not model.is_quantized):
        return None
    used = wanted or LoraConfig()
    model.add_lora(used)
    why = "" if wanted else " (an NF4 model trains through an adapter; these are the defaults)"
    return f"attached LoRA r={used.r} alpha={used.alpha:g} targets={used.targets}{why}"
