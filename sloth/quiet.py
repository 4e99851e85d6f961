"""Saying something although nobody may be there to hear it: a full disk behind stdout, a pipe whose
reader has left, a terminal that was closed.

What a run says is for convenience, and a run is worth a week. So its words are written until a
write fails; from then on it is silent and goes on.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from sloth.redact import Redactor

# A stream that was closed raises ValueError; sys.stdout is None where a program has none.
BROKEN = (OSError, ValueError)


class QuietStream:
    """A text stream that never raises: it writes until that fails, and then no more.

    Characters that the stream's encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.is_silent = stream is None

    @property
    def encoding(self) -> str:
        """As of the stream."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        """Whether a person looks on."""
        with suppress(*BROKEN):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Of the stream. Raises OSError where it has none."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, or be silent."""
        if self._stream is not None and not self.is_silent:
            try:
                self._written(self._stream, text)
            except BROKEN:
                self.is_silent = True
        return len(text)

    def flush(self) -> None:
        """The same."""
        if self._stream is not None and not self.is_silent:
            try:
                self._stream.flush()
            except BROKEN:
                self.is_silent = True

    def _written(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))


def tell(text: str, stream: TextIO | None) -> None:
    """Some lines without secrets, if they can be said."""
    quiet: Any = QuietStream(stream)
    print(Redactor().text(text), file=quiet, flush=True)


def give_up_on_broken(*streams: TextIO | None) -> None:
    """Send what these streams could not write to nowhere: Python would try again when the process
    ends, and make an exit code of its failure.
    """
    for stream in streams:
        if stream is None:
            continue
        try:
            stream.flush()
        except BROKEN:
            with suppress(*BROKEN):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def say(text: str) -> None:
    """A notice before there is a run to log it."""
    tell(text, sys.stderr)
