"""What a run leaves at its end: output/adapter, or output/model after full training.

A folder is written aside and takes its name by a rename. What stood there before is deleted only if
a run of this folder wrote it and it still is as it was: published.json lists its files with their
sizes, of the old folder and of the new one while they change places, so that a kill in between
leaves both known, and the names of those that are in the making. Anything else is somebody's, and
stays.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sloth.errors import OutputExists, SaveFailed
from sloth.train.run_folder import ADAPTER, MODEL, PUBLISHED, PUBLISHED_RECORD
from sloth.train.trainable import Trainable

# In the record: folders that are written or put aside, by name.
_UNFINISHED = "unfinished"
_UNFINISHED_NAME = re.compile(rf"({'|'.join(PUBLISHED)})\.(new|old)-\d+")

Files = dict[str, int]


def publish_weights(model: Trainable, output: Path, holder: Path | None) -> dict[str, Path]:
    """Save what was trained; the folder under its name. A resumed run replaces its own.

    holder: a checkpoint with these weights. Raises SaveFailed, naming it, where the disk does not
    take them.
    """
    name = ADAPTER if model.has_adapter else MODEL
    try:
        return {name: _publish(model, output, name)}
    except (OSError, SafetensorError) as error:
        there = f"{holder} holds them; resume=True publishes again" if holder else "they are lost"
        raise SaveFailed(
            f"the trained weights could not be written to {output / name}: {error}; {there}"
        ) from error


def remove_unfinished(output: Path) -> None:
    """Delete what a run that was killed while it published left behind."""
    for name in _record(output).get(_UNFINISHED, []):
        if isinstance(name, str) and _UNFINISHED_NAME.fullmatch(name):
            shutil.rmtree(output / name, ignore_errors=True)


def refuse_foreign(output: Path) -> None:
    """Raise OutputExists for a folder of a name that a run publishes under, and that none wrote."""
    for name in PUBLISHED:
        folder = output / name
        strange = _strange_files(folder, _record(output).get(name, []))
        if strange:
            raise OutputExists(
                f"{folder} holds what no run of {output} wrote ({', '.join(strange[:3])}), and "
                f"this one would publish there; move it away, or choose another output"
            )


def refuse_replacing(model_name: str, output: Path) -> None:
    """Raise OutputExists for an output whose published folder would take the place of the model
    that is trained, or of a folder around it.
    """
    loaded = Path(model_name).expanduser().resolve()
    for name in PUBLISHED:
        folder = (output / name).resolve()
        if loaded.exists() and (loaded == folder or folder in loaded.parents):
            raise OutputExists(
                f"the model was loaded from {model_name}, and a run in {output} publishes in its "
                "place; choose another output"
            )


def _publish(model: Trainable, output: Path, name: str) -> Path:
    folder = output / name
    fresh, aside = _free_names(folder)
    save: Callable[[Path], object] = model.save_adapter if name == ADAPTER else model.save_merged
    known = {key: held for key, held in _record(output).items() if key in PUBLISHED}
    in_work = {_UNFINISHED: [fresh.name, aside.name]}
    try:
        _write_record(output, {**known, **in_work})
        save(fresh)
        now, before = _files(fresh), known.get(name, [])
        is_own = not _strange_files(folder, before)
        _write_record(output, {**known, **in_work, name: [now, *before]})
        if os.path.lexists(folder):
            os.rename(folder, aside if is_own else _free_name(folder))
        os.rename(fresh, folder)
        shutil.rmtree(aside, ignore_errors=True)
        _write_record(output, {**known, name: [now]})
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _free_names(folder: Path) -> tuple[Path, Path]:
    """Names beside a folder: for the new one while it is written, for the old one while they change
    places.
    """
    for number in count(os.getpid()):
        fresh, aside = (folder.with_name(f"{folder.name}.{one}-{number}") for one in ("new", "old"))
        if not os.path.lexists(fresh) and not os.path.lexists(aside):
            break
    return fresh, aside


def _strange_files(folder: Path, known: list[Files]) -> list[str]:
    """Of a folder that is not as a run left it, what is strange; nothing where there is none."""
    if not os.path.lexists(folder):
        return []
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    held = _files(folder)
    if held in known:
        return []
    expected = known[0] if known else {}
    return [name for name, size in held.items() if expected.get(name) != size] or [folder.name]


def _files(folder: Path) -> Files:
    """Every file of a folder, by its path in there, with its size."""
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _free_name(folder: Path) -> Path:
    """A name beside a folder that was changed since, to keep it under."""
    return next(
        place
        for number in range(1, 10_000)
        if not os.path.lexists(place := folder.with_name(f"{folder.name}.kept-{number}"))
    )


def _record(output: Path) -> dict[str, Any]:
    try:
        told = json.loads((output / PUBLISHED_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _write_record(output: Path, record: dict[str, Any]) -> None:
    partial = output / f"{PUBLISHED_RECORD}.tmp"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output / PUBLISHED_RECORD)
