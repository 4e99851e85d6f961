"""Checkpoints that survive a kill: written aside, synced, published by one rename, verified on
reading.

    run/step-000120/    trainable.safetensors   parameters with a gradient, by the network's names
                        optimizer.safetensors   its state, flattened
                        rng.safetensors         states of the random generators
                        state.json              step, counts, losses, settings, data fingerprint
                        config.yaml, tokenizer  so that the folder explains itself
                        manifest.json           size and sha256 of each file, written last
                        looked.json             progress after the evaluation that followed

A folder counts when its manifest verifies; the newest that does is resumed from, so there is no
pointer file to tear. A folder named `*.tmp-*` is an unfinished write and is removed at the next
start. Only JSON and safetensors are read, never a pickle. What survives a power cut, too: files
and folder are synced before the rename, the parent after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sloth.errors import CheckpointMismatch
from sloth.formats.tensor_file import write_tensors
from sloth.train import publish
from sloth.train.run_folder import (
    checkpoint_name,
    is_checkpoint,
    is_unfinished,
    is_weights,
    step_of,
    weights_name,
)

KEEP = 2

TensorFiles = Mapping[str, Mapping[str, Tensor]]

_MANIFEST, _STATE, _EVALUATED = "manifest.json", "state.json", "looked.json"


def write_checkpoint(
    run: Path,
    step: int,
    tensors: TensorFiles,
    state: dict[str, Any],
    add_files: Callable[[Path], None] | None = None,
    best_step: int | None = None,
) -> Path:
    """Write run/step-<step> whole or not at all; then drop all but the newest good two and the
    best.

    tensors: {"trainable": {name: tensor}, ...}, one file each. add_files puts more files into the
    folder it is given. Raises OSError (disk full, no permission), leaving earlier checkpoints as
    they were.
    """
    final = run / checkpoint_name(step)
    _publish(final, tensors, state, add_files)
    for rescued in _folders(run, is_weights):
        shutil.rmtree(rescued, ignore_errors=True)
    _prune(run, newest=final, best_step=best_step)
    return final


def write_weights_only(run: Path, step: int, tensors: TensorFiles, state: dict[str, Any]) -> Path:
    """run/weights-<step> in place of those of an earlier step: smaller than a checkpoint, and no
    place to resume from.
    """
    final = run / weights_name(step)
    _publish(final, tensors, state, None)
    for path in _folders(run, is_weights):
        if path != final:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _publish(
    final: Path,
    tensors: TensorFiles,
    state: dict[str, Any],
    add_files: Callable[[Path], None] | None,
) -> None:
    """Everything into a folder aside, the manifest last; sync; one rename; sync the parent."""
    partial = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if add_files is not None:
            add_files(partial)
        (partial / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        manifest = {
            str(file.relative_to(partial).as_posix()): _identity(file) for file in _files(partial)
        }
        for name, group in tensors.items():
            file = partial / f"{name}.safetensors"
            manifest[file.name] = write_tensors(file, group)
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        if final.exists():  # a damaged one: a good one would have been resumed from
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def is_good(folder: Path) -> bool:
    """Whether every file of the manifest is there, with its size and sha256."""
    return damage(folder) is None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, its first bad file by name; None for a good one."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if _STATE not in manifest:
            return f"{_MANIFEST} does not list {_STATE}"
        for name, identity in manifest.items():
            if not _stays_inside(name):
                return f"{_MANIFEST} names {name!r}"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _identity(folder / name) != identity:
                return f"{name} has another size or sha256 than {_MANIFEST} says"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    return None


def newer_than(source: Path) -> dict[str, str | None]:
    """Name -> damage of the checkpoints in its folder that are newer than this one."""
    newer = [folder for folder in checkpoints(source.parent) if step_of(folder) > step_of(source)]
    return {folder.name: damage(folder) for folder in newer}


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, good or not."""
    if not run.is_dir():
        return []
    return sorted(_folders(run, is_checkpoint), key=step_of, reverse=True)


def newest_good(place: Path) -> Path | None:
    """The checkpoint to resume from: `place` itself, or the newest good one in it. None without
    any.

    Raises CheckpointMismatch when there are checkpoints and none verifies.
    """
    candidates = [place] if is_checkpoint(place) else checkpoints(place)
    for folder in candidates:
        if is_good(folder):
            return folder
    if candidates:
        raise CheckpointMismatch(
            f"no checkpoint in {place} verifies: "
            + "; ".join(f"{folder.name}: {damage(folder)}" for folder in candidates)
            + ". Put one back from a copy, or begin anew in another output"
        )
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a good checkpoint, with the progress of after the evaluation that followed."""
    state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    with suppress(OSError, ValueError, TypeError, KeyError):
        progress = json.loads((folder / _EVALUATED).read_text(encoding="utf-8"))
        if progress["step"] == step_of(folder):
            state["progress"] = progress
    return state


def write_evaluation(folder: Path, progress: dict[str, Any]) -> None:
    """Add the progress after the evaluation that followed, whole or not at all: without it, a
    resumed run evaluates again. Raises OSError.
    """
    partial = folder / f"{_EVALUATED}.tmp"
    partial.write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
    _sync(partial)
    os.replace(partial, folder / _EVALUATED)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """One file of tensors, on the CPU."""
    return load_file(folder / f"{name}.safetensors")


def remove_unfinished(run: Path) -> None:
    """Delete what an earlier process left half written."""
    for path in _folders(run, is_unfinished):
        shutil.rmtree(path, ignore_errors=True)
    publish.remove_unfinished(run)


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of the generators a run draws from: the CPU's, and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo `rng_tensors`; a run that moved to another kind of device keeps its own state there."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def copy_parameters(
    parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: Path
) -> None:
    """Fill parameters from a checkpoint. Raises CheckpointMismatch, naming the first misfits."""
    check_parameters(parameters, stored, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


def check_parameters(
    parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: Path
) -> None:
    """Raise CheckpointMismatch where these are not those of a checkpoint."""
    wrong = [f"missing {name}" for name in parameters if name not in stored]
    wrong += [f"unexpected {name}" for name in stored if name not in parameters]
    wrong += [
        f"{name} is {list(stored[name].shape)} {stored[name].dtype}, the model has "
        f"{list(parameter.shape)} {parameter.dtype}"
        for name, parameter in parameters.items()
        if name in stored
        and (stored[name].shape != parameter.shape or stored[name].dtype != parameter.dtype)
    ]
    if wrong:
        raise CheckpointMismatch(f"{source} is of another model: {'; '.join(wrong[:6])}")


def _prune(run: Path, newest: Path, best_step: int | None) -> None:
    """`newest` was hashed while it was written; an older one is read again before it counts."""
    good = 0
    for folder in checkpoints(run):
        if good >= KEEP and step_of(folder) != best_step:
            shutil.rmtree(folder, ignore_errors=True)
        elif good < KEEP and (folder == newest or is_good(folder)):
            good += 1


def _folders(run: Path, is_one: Callable[[Path], bool]) -> list[Path]:
    return [path for path in run.iterdir() if path.is_dir() and is_one(path)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _stays_inside(name: str) -> bool:
    """Whether a manifest's name is a plain relative path."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, nor files synced read-only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
