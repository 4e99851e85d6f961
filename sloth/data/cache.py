"""Tokenised data on disk, found again by what it was made of.

    <cache>/data/<key>/  00000.safetensors ...  index.json   {counts, fingerprint, files + sha256}

The key is a hash over everything that decides the result: the files' content and kind, the
tokenizer, the template, the settings, the versions of what reads and encodes. Change one, and the
data are prepared anew; change none, and they are not. The folder appears whole, by one rename, and
an entry whose files do not match their hashes is made again. Nothing but safetensors and JSON is
read.

<cache> is what SLOTH_CACHE names, ~/.cache/sloth by default; SLOTH_CACHE= (empty) turns it off.
Files under 1 MiB are not worth a copy and not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
import tokenizers

from sloth import __version__
from sloth.data.examples import Examples, map_shard
from sloth.errors import CheckpointMismatch

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

MIN_CACHED_BYTES = 2**20
ENCODING_VERSION = 1  # raise it when the same rows and settings come to other tokens or labels

_READ_BYTES = 1 << 20


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
    named = os.environ.get("SLOTH_CACHE")
    if named == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return (Path(named) if named else Path(home) / "sloth") / "data"


def read_entry(folder: Path) -> tuple[Examples, dict[str, Any]] | None:
    """Examples and the rest of the index; None where there is no whole entry."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for file in index["files"]:
            _check(folder / file["name"], file)
        shards = [map_shard(folder / file["name"]) for file in index["files"]]
        return Examples(shards), index
    except (OSError, ValueError, KeyError, TypeError, CheckpointMismatch):
        return None


def _check(path: Path, file: dict[str, Any]) -> None:
    if path.name != file["name"] or path.stat().st_size != file["bytes"]:
        raise CheckpointMismatch(f"{path} is not the file that was written")
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
            raise CheckpointMismatch(f"{path} is damaged")


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
        (self.partial / "index.json").write_text(text, encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        # Another process may have published the same in between; its entry serves as well.
        with suppress(OSError):
            os.rename(self.partial, self.folder)
