"""Timing of one operation on a GPU: cold caches, a busy queue, the median of many runs.

Before every run a buffer of 1 GiB is overwritten. That does two things: nothing of the inputs is
left in the L2 cache (50 MB on an H100, 60 on an H200), as in a training step, where gigabytes pass
between two uses; and the quarter of a millisecond it takes lets the host queue the whole operation,
so the events around it see the device's time and no launch gaps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.common import DEVICE

REPEATS, WARM_UP_RUNS = 30, 5
_FLUSH_BYTES = 2**30


def median_us(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Microseconds of one run: the median of `repeats` after warming up."""
    for _ in range(WARM_UP_RUNS):
        run()
    if DEVICE.type == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)
