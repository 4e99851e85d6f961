"""Saving that never costs the run: room is checked first, and a full disk is a warning.

    before the run   free space must hold what will be there at once, or the run does not start
    at each save     enough room?  -> write_checkpoint
                     no, or OSError on the way -> warn, keep the older ones, and try the weights
                     alone (a third of an AdamW checkpoint; a rescue, not a place to resume from)
    at the end       if the last save failed, `SaveFailed` after everything else is done

The estimate before the run counts what will exist: the parameters and two moments of each in a
checkpoint, the checkpoints that are kept and the next one beside them, the results at the end. What
a resumed run has there already is not needed twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sloth.constants import MIB
from sloth.errors import NonFiniteGradients, OutOfMemory, SaveFailed
from sloth.formats.tensor_file import are_finite, num_bytes
from sloth.train import checkpoint
from sloth.train.run_folder import step_of, weights_name

# Settings, counts and manifest beside the tensors. A tokenizer may take more; should that be what
# does not fit, the save says so.
EXTRAS_BYTES = MIB // 4


class Saver:
    """Writes a run's checkpoints. `newest` is the last good one, `failure` why the last try
    failed. before_saving: is called before what a run resumes from is written.
    """

    def __init__(
        self,
        output: Path,
        notice: Callable[[str], None],
        on_saved: Callable[[int, Path], None],
        newest: Path | None = None,
        before_saving: Callable[[], None] = lambda: None,
    ) -> None:
        self.output, self.notice, self._on_saved = output, notice, on_saved
        self._before_saving = before_saving
        self.newest = newest
        self.failure: str | None = None

    def require_room(
        self, checkpoint_bytes: int, published_bytes: int, num_saves: int, keeps_best: bool
    ) -> None:
        """Raise SaveFailed unless the checkpoints to come and the results fit. A new checkpoint is
        written before an old one goes. num_saves: still to come; without any, nothing is needed.
        """
        if not num_saves:
            return
        there = checkpoint.checkpoints(self.output)
        there_bytes = sum(f.stat().st_size for one in there for f in one.rglob("*") if f.is_file())
        each, num_all = checkpoint_bytes + EXTRAS_BYTES, len(there) + num_saves
        num_kept = min(num_all, checkpoint.KEEP + keeps_best)
        is_one_more = num_all > num_kept
        most = num_kept * each + max(is_one_more * each, published_bytes)
        needed, free = most - there_bytes, self._free_bytes()
        if free < needed:
            raise SaveFailed(
                f"{self.output} has {_mib(free)} free, and this run needs {_mib(needed)}: up to "
                f"{num_kept + is_one_more} checkpoints of {_mib(each)} at once, of which "
                f"{_mib(there_bytes)} are there, and {_mib(published_bytes)} of results; free some "
                "space or choose another output"
            )

    def save(
        self,
        step: int,
        tensors: checkpoint.TensorFiles,
        state: dict[str, Any],
        add_files: Callable[[Path], None] | None = None,
        best_step: int | None = None,
    ) -> Path | None:
        """The new checkpoint, or None after a warning when the disk did not take it.

        Raises NonFiniteGradients rather than write weights that are not finite.
        """
        if not are_finite(tensors["trainable"]):
            raise NonFiniteGradients(
                f"the weights hold NaN or infinity after step {step}, so they are not saved; "
                f"{self.last_words()}. A lower lr or a warm-up may help"
            )
        try:
            self._expect_room(sum(num_bytes(group) for group in tensors.values()))
            self._before_saving()
            self.newest = checkpoint.write_checkpoint(
                self.output, step, tensors, state, add_files, best_step
            )
        except OSError as error:
            self.failure = f"step {step} could not be saved: {_why(error)}"
            self.notice(f"WARNING: {self.failure}; training goes on, {self.last_words()}")
            self._save_weights_only(step, tensors, state)
            return None
        self.failure = None
        self._on_saved(step, self.newest)
        return self.newest

    def save_evaluation(self, step: int, progress: dict[str, Any]) -> None:
        """The progress after a step was evaluated, into its checkpoint if the disk took that."""
        if self.newest is None or step_of(self.newest) != step:
            return
        try:
            self._before_saving()
            checkpoint.write_evaluation(self.newest, progress)
        except OSError as error:
            self.notice(f"WARNING: the evaluation of step {step} is not saved: {_why(error)}")

    def last_words(self) -> str:
        """What there is to go back to."""
        if self.newest is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint, {self.newest}, is good"

    def holder_of(self, step: int) -> Path | None:
        """The checkpoint or the rescue that has the weights of a step, if there is one."""
        if self.newest is not None and step_of(self.newest) == step:
            return self.newest
        rescued = self.output / weights_name(step)
        return rescued if checkpoint.is_good(rescued) else None

    @contextmanager
    def explaining_out_of_memory(self) -> Iterator[None]:
        """Inside, memory that runs out ends in OutOfMemory, which says what there is to go back to.

        Where it runs out in forward and backward, smaller passes are tried first (accumulate.py).
        """
        try:
            yield
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; {self.last_words()}") from error
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "memory ran out outside of forward and backward, where smaller passes would not "
                f"help: {str(error).split('. ')[0]}. Weights in memory may be half updated and "
                "are not saved. An adapter instead of full training, optimizer='adamw_8bit' or "
                f"quant='nf4' needs less; {self.last_words()}"
            ) from error

    def finish(self) -> None:
        """Raise SaveFailed when the last save did not succeed."""
        if self.failure is not None:
            raise SaveFailed(f"{self.failure}; {self.last_words()}")

    def _save_weights_only(
        self, step: int, tensors: checkpoint.TensorFiles, state: dict[str, Any]
    ) -> None:
        weights = {"trainable": tensors["trainable"]}
        try:
            self._expect_room(num_bytes(weights["trainable"]))
            folder = checkpoint.write_weights_only(self.output, step, weights, state)
        except OSError:
            return
        self.notice(f"the weights alone did fit: {folder} (nothing resumes from them)")

    def _expect_room(self, wanted_bytes: int) -> None:
        """Do not fill the disk to its last byte only to throw the half away."""
        free = self._free_bytes()
        if free < wanted_bytes:
            raise OSError(f"it takes {_mib(wanted_bytes)} and {_mib(free)} are free")

    def _free_bytes(self) -> int:
        there = self.output  # of a dry run, not made yet
        while not there.exists() and there != there.parent:
            there = there.parent
        return shutil.disk_usage(there).free


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


def _why(error: OSError) -> str:
    return error.strerror or str(error)
