"""The folder of a run: which may be one, and that it is this run's alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sloth.errors import OutputExists
from sloth.train.checkpoint import checkpoints, newer_than, newest_good, remove_unfinished
from sloth.train.config import TrainConfig
from sloth.train.lock import locked
from sloth.train.publish import refuse_foreign, refuse_replacing
from sloth.train.ranks import Ranks
from sloth.train.run_folder import FACTS

RUNS = Path("runs")
GLANCE_S = 0.1  # `sloth runs` has the lock for less, while it looks whether a run has it


def choose_output(config: TrainConfig, model_name: str) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to resume from or None. Writes nothing.

    resume=True with no checkpoint yet starts from the beginning. Raises OutputExists for a folder
    that holds other things than a run to continue, and for one whose results would replace the
    model that is trained or somebody's files; ValueError for a resume without a place;
    CheckpointMismatch for damaged checkpoints.
    """
    output, source = config.output, None
    if config.resume is True:
        if output is None:
            raise ValueError("resume=True needs output, the folder of the run to continue")
        source = newest_good(output)
    elif config.resume:
        place = Path(config.resume)
        source = newest_good(place)
        if source is None:
            raise ValueError(f"resume={str(place)!r}: no checkpoint there (a step-000123 folder)")
        output = output or source.parent
    output = output or _new_folder()
    _refuse_branching(source, output)
    _refuse_strangers(config, source, output)
    refuse_replacing(model_name, output)
    refuse_foreign(output)
    return output, source


@contextmanager
def claimed(
    config: TrainConfig, model_name: str, ranks: Ranks
) -> Iterator[tuple[Path, Path | None]]:
    """`choose_output` in the first rank, its answer in all. Inside, the folder is there, free of
    what a dead process left half written, and this run's alone. Raises OutputExists while another
    process trains there.
    """
    chosen: list[Path | None] = []
    with ExitStack() as held:

        def claim() -> None:
            output, source = choose_output(config, model_name)
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(_alone(output))
            remove_unfinished(output)
            chosen.extend((output, source))

        ranks.first(claim)
        told = json.loads(ranks.tell(json.dumps([str(path or "") for path in chosen])))
        yield Path(told[0]), Path(told[1]) if told[1] else None


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """With the folder's lock. Raises OutputExists while another process has it."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(output))
        except BlockingIOError:
            time.sleep(GLANCE_S)
            try:
                held.enter_context(locked(output))
            except BlockingIOError as error:
                raise OutputExists(
                    f"another process trains in {output}; choose another output, or wait for its "
                    "end"
                ) from error
        yield


def _refuse_strangers(config: TrainConfig, source: Path | None, output: Path) -> None:
    """Raise OutputExists unless the folder is new or empty, or holds the run to continue."""
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file; choose another output")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if config.resume is True and not (checkpoints(output) or (output / FACTS).is_file()):
        raise OutputExists(
            f"{output} is not empty, and holds neither checkpoints nor the {FACTS} of a run to "
            "continue; choose another output"
        )
    if config.resume is not True and (source is None or source.parent != output):
        raise OutputExists(
            f"{output} exists and is not empty; choose another, or continue it with resume=True"
        )


def _refuse_branching(source: Path | None, output: Path) -> None:
    """Raise ValueError for a continuation that newer checkpoints of its own folder would overrule
    the next time.
    """
    if source is None or source.parent != output:
        return
    newer = [name for name, damage in newer_than(source).items() if damage is None]
    if newer:
        raise ValueError(
            f"{output} holds newer checkpoints than {source.name} ({', '.join(newer)}), and the "
            "newest one is resumed from; give another output, or delete them"
        )


def _new_folder() -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = RUNS / f"{stem}{suffix}"
        if not folder.exists():
            return folder
    raise OutputExists(f"{RUNS} holds too many runs of this second; give output")
