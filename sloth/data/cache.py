"""Tokenised data on disk, found again by what it was made of.

    <cache>/data/<key>/  00000.safetensors ...  index.json   {counts, fingerprint, files + sha256}

The key is a hash over everything that decides the result: the files' content and kind, the
tokenizer, the template, the settings, the versions of what reads and encodes. Change one, and the
data are prepared anew; change none, and they are not. The folder appears whole, by one rename, and
an entry whose files do not match their hashes is made again. Nothing but safetensors and JSON is
read.

<cache> is what SLOTH_CACHE names, ~/.cache/sloth by default; SLOTH_CACHE= (empty) turns it off.
Files under 1 MiB are not worth a copy and not kept. Once entries take more than SLOTH_CACHE_GIB
(20), those go that were read longest ago; one in use is locked (flock, shared) and stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import sentencepiece
import tokenizers

from sloth import __version__
from sloth.constants import GIB
from sloth.data.examples import Examples, map_shard
from sloth.errors import CheckpointMismatch
from sloth.machine import cache_root

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

MIN_CACHED_BYTES = 2**20
ENCODING_VERSION = 6  # raise it when the same rows and settings come to other tokens or labels

DEFAULT_GIB = 20.0

_READ_BYTES = 1 << 20
_INDEX, _LOCK = "index.json", ".lock"
_UNFINISHED_SECONDS = 24 * 3600  # no preparing takes that long: its process is dead


@dataclass(frozen=True)
class Content:
    """What files hold. digest: sha256 over all of them; num_lines: newlines, for progress."""

    digest: str
    num_lines: int


def read_content(files: Sequence[Path]) -> Content:
    """Hash files, counting lines on the way."""
    digest, num_lines = hashlib.sha256(), 0
    for file in files:
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_READ_BYTES):
                own.update(chunk)
                num_lines += chunk.count(b"\n")
        digest.update(f"{file.suffix.lower()} {own.hexdigest()}\n".encode())
    return Content(digest.hexdigest(), num_lines)


def cache_key(content: Content, tokenizer: Tokenizer, settings: dict[str, Any]) -> str:
    """The name of an entry."""
    chat = tokenizer.chat
    template = [chat.source, chat.named, chat.special_tokens] if chat is not None else None
    parts = {
        "encoding": ENCODING_VERSION,
        "versions": [__version__, tokenizers.__version__, sentencepiece.__version__],
        "content": content.digest,
        "tokenizer": tokenizer.fingerprint(),
        "template": template,
        "settings": settings,
        # A template that writes today's date makes other text tomorrow.
        "date": date.today().isoformat() if "strftime_now" in json.dumps(template) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def default_folder() -> Path | None:
    """Where entries go; None where the user turned that off."""
    root = cache_root()
    return root / "data" if root else None


def read_entry(folder: Path) -> tuple[Examples, dict[str, Any]] | None:
    """Examples and the rest of the index; None where there is no whole entry."""
    try:
        in_use = hold(folder)
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        for file in index["files"]:
            _check(folder / file["name"], file)
        shards = [map_shard(folder / file["name"]) for file in index["files"]]
        with suppress(OSError):  # of another user
            os.utime(folder / _INDEX)
        return Examples(shards, in_use), index
    except (OSError, ValueError, KeyError, TypeError, CheckpointMismatch):
        return None


def _check(path: Path, file: dict[str, Any]) -> None:
    if path.name != file["name"] or path.stat().st_size != file["bytes"]:
        raise CheckpointMismatch(f"{path} is not the file that was written")
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
            raise CheckpointMismatch(f"{path} is damaged")


@contextmanager
def alone(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Inside, no other process prepares this entry, where systems have locks; on_wait is called
    before one is waited for. The processes of a run need the same data, and one can make them for
    all. Raises OSError.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f"{folder.name}{_LOCK}")
    with place.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # some network drives have no locks
            pass
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


class NewEntry:
    """A folder being filled, which becomes the entry when published; used as a context, it leaves
    nothing behind otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")

    def __enter__(self) -> NewEntry:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def publish(self, index: dict[str, Any]) -> None:
        """Write the index, and put the folder in place of what is there."""
        text = json.dumps(index, indent=1)
        (self.partial / _INDEX).write_text(text, encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        # Another process may have published the same in between; its entry serves as well.
        with suppress(OSError):
            os.rename(self.partial, self.folder)


# -- room ----------------------------------------------------------------------------------------


def hold(folder: Path) -> IO[bytes]:
    """Mark an entry as in use, for as long as the returned file is open. Raises OSError."""
    index = (folder / _INDEX).open("rb")
    if sys.platform != "win32":  # there, an open file cannot be deleted anyway
        import fcntl

        with suppress(OSError):  # some network drives have no locks
            fcntl.flock(index, fcntl.LOCK_SH)
    return index


def limit_bytes() -> int:
    """How much entries may take. Raises ValueError for a SLOTH_CACHE_GIB that is no size."""
    given = os.environ.get("SLOTH_CACHE_GIB", "")
    try:
        limit_gib = float(given or DEFAULT_GIB)
    except ValueError:
        limit_gib = -1.0
    if not 0 <= limit_gib < float("inf"):
        raise ValueError(f"SLOTH_CACHE_GIB={given!r}: expected a number of GiB, such as 20")
    return int(limit_gib * GIB)


def prune(cache: Path, most_bytes: int) -> tuple[int, int]:
    """Delete entries read longest ago until the others fit, and leftovers of dead processes;
    (entries deleted, their bytes). Entries in use count, and stay.
    """
    sizes = {}
    for folder in cache.iterdir():
        with suppress(OSError):  # another process may be pruning, too
            if folder.name.endswith(_LOCK):  # of a dead process, or of one that prepares
                if time.time() - folder.stat().st_mtime > _UNFINISHED_SECONDS:
                    folder.unlink()
            elif ".tmp-" not in folder.name:
                used = (folder / _INDEX).stat().st_mtime
                held_bytes = sum(file.stat().st_size for file in folder.iterdir())
                sizes[folder] = (used, held_bytes)
            elif time.time() - folder.stat().st_mtime > _UNFINISHED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    total_bytes = sum(held_bytes for _, held_bytes in sizes.values())
    gone, gone_bytes = 0, 0
    for folder in sorted(sizes, key=lambda folder: sizes[folder]):
        if total_bytes - gone_bytes <= most_bytes:
            break
        if _delete_unused(folder):
            gone += 1
            gone_bytes += sizes[folder][1]
    return gone, gone_bytes


def _delete_unused(folder: Path) -> bool:
    """Whether the entry was free, and is gone."""
    try:
        with (folder / _INDEX).open("rb") as index:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=sys.platform == "win32")
    except OSError:  # in use, or not ours to delete
        return False
    return not folder.exists()
