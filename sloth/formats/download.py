"""Files of a hub repository, whole: transfers are retried, and bytes compared with the hub's hash.

huggingface-hub resumes a transfer that was cut or stalls, and compares sizes. It does not try again
after a server's error, and does not look at the bytes: a damaged file of the right size would train
in silence. Large files are named by their sha256 in its cache; each is hashed once (a mark in
sloth's cache says so, with size and time of what was hashed), thrown away and fetched anew where it
differs.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sloth.errors import CheckpointMismatch
from sloth.machine import cache_root

ATTEMPTS = 4
PAUSE_S = 1.0  # before the second attempt; doubled before each further one

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(
    repo_id: str,
    revision: str | None,
    patterns: Sequence[str],
    repo_type: str | None = None,
    leave_out: Sequence[str] = (),
) -> Path:
    """The folder of a repository's files, from the cache where they are there.

    patterns: of the files wanted; leave_out: of those of them that are not.
    Raises CheckpointMismatch for a file that comes damaged each time; else what huggingface-hub
    raises for a last attempt.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    damaged: list[Path] = []
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            folder = Path(
                snapshot_download(
                    repo_id,
                    repo_type=repo_type,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(leave_out),
                )
            )
        except (HTTPError, OSError) as error:
            if attempt + 1 == ATTEMPTS or not _may_pass(error):
                raise
            continue
        damaged = [file for file in sorted(folder.rglob("*")) if _is_damaged(file)]
        if not damaged:
            return folder
        for file in damaged:
            file.resolve().unlink(missing_ok=True)
            file.unlink(missing_ok=True)
    raise CheckpointMismatch(
        f"{repo_id}: {damaged[0].name} came {ATTEMPTS} times with other bytes than the hub says "
        "(sha256 differs); something on the way, a proxy or the disk, changes them"
    )


def _may_pass(error: Exception) -> bool:
    """Whether it may go better the next time: the server's fault, or the connection's."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return False
    if isinstance(error, LocalEntryNotFoundError):  # raised from what went wrong
        cause = error.__cause__
        return isinstance(cause, HfHubHTTPError) and _may_pass(cause)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, (PermissionError, FileExistsError)) and not _is_disk(error)


def _is_disk(error: Exception) -> bool:
    """The system's own errors have a number, the library's for a wrong size has none."""
    return isinstance(error, OSError) and error.errno is not None


def _is_damaged(file: Path) -> bool:
    """Whether a file of the hub's cache is not the bytes that its blob is named after."""
    if not file.is_symlink():  # a folder, or a system without links, where no name tells
        return False
    blob = file.resolve()
    if not _SHA256.fullmatch(blob.name):
        return False
    root = cache_root()
    mark = root / "verified" / blob.name if root else None
    # What the file system says of the bytes that were hashed: written anew, they are others.
    held = blob.stat()
    identity = f"{held.st_size} {held.st_mtime_ns} {held.st_ino}\n"
    if mark is not None:
        with suppress(OSError, UnicodeError):
            if mark.read_text(encoding="utf-8") == identity:
                return False
    with blob.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != blob.name:
            return True
    if mark is not None:
        with suppress(OSError):  # no permission: it is hashed again the next time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(identity, encoding="utf-8")
    return False
