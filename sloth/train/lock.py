"""The lock of a run's folder: taken while a process trains there, gone with the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock on the folder itself; nothing where systems have none. Raises BlockingIOError while
    another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network drives have no locks
            pass
        yield
    finally:
        os.close(held)


def is_locked(folder: Path) -> bool | None:
    """Whether a process has the lock; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        # The one that a run takes: a shared one may be had where that cannot.
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(held)
    return False
