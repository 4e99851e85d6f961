"""Stopping on request: the first SIGINT or SIGTERM is noted and the step finished, a second SIGINT
leaves at once.

A handler that raised in the middle of a step would leave gradients half added; one that only notes
lets the loop save a checkpoint to resume from. Who presses Ctrl-C twice does not want to wait for
that: KeyboardInterrupt rises where the program stands, and the last published checkpoint is whole,
because publishing is one rename. Only the main thread may set handlers; elsewhere nothing changes.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType

from sloth.train.ranks import Ranks

STOPPING = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
_ADVICE = "finishing the step and saving; Ctrl-C again leaves at once"


class StopRequest:
    """Use as a context manager around the loop. `received` is the signal, once there was one."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python, which cannot be put back from here
            if handler is not None:
                signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any rank has received, so that all leave after the same step."""
        own = self.received
        number, count = ranks.agree(lambda: [float(own or 0), float(own is not None)], 2)
        return signal.Signals(round(float(number / count))) if count else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            # Not print: the signal may have come in the middle of one, which holds a lock.
            with suppress(OSError):  # nobody may be there to read it
                os.write(STDERR, f"\n{self.received.name}: {_ADVICE}\n".encode())
