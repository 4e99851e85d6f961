"""`sloth train --gpus N`: the same command once more in N processes, under torchrun.

torchrun's agent runs here, in the process that was started; it starts the ranks, and where one ends
badly it asks the others to stop (SIGTERM, and SIGKILL for those that do not: a rank that waits in a
collective for a dead one cannot listen). A signal to this process is passed on, so that the ranks
save before they leave.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from sloth.errors import KernelUnavailable, RankFailed
from sloth.quiet import tell

# Between SIGTERM and SIGKILL: time to finish a step and save, and all is over within a minute.
SHUTDOWN_SECONDS = 45
# Exit codes of ranks that were asked to stop, and did after saving.
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_TALKATIVE = ("run", "elastic.agent.server.api", "elastic.multiprocessing.api")


def is_rank() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def check_size(count: int) -> None:
    """Raise ValueError where torchrun was given another number of processes than --gpus."""
    size = os.environ["WORLD_SIZE"]
    if count != int(size):
        raise ValueError(
            f"--gpus {count}, and torchrun started {size} processes; leave --gpus or torchrun out"
        )


def take_device(device: str) -> None:
    """Make the GPU of this rank the one that "cuda" means in this process. Raises ValueError where
    nothing says which.
    """
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several "
                "processes, and LOCAL_RANK not which GPU is its own; start them with torchrun, or "
                "unset WORLD_SIZE"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def run_ranks(count: int, device: str, arguments: Sequence[str]) -> int:
    """`sloth train ARGUMENTS` in `count` processes; the exit code, that of a signal included.

    Raises KernelUnavailable where there are too few GPUs, RankFailed where a process ends badly.
    """
    _require_devices(count, device)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in _TALKATIVE:  # of the agent; what failed is said below, once
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    given = ["--standalone", "--nproc-per-node", str(count), "-m", "sloth.cli", "train", *arguments]
    try:
        torchrun.run(torchrun.parse_args(given))
    except SignalException as error:
        tell(f"stopped by {error.sigval.name}, and all processes with it", sys.stderr)
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code in _INTERRUPTED:
            return code
        ended = f"exit code {code}" if code >= 0 else f"signal {failure.signal_name()}"
        raise RankFailed(
            f"rank {rank} of {count} ended with {ended}, so the others were stopped; what it said "
            "is above"
        ) from error
    return 0


def _require_devices(count: int, device: str) -> None:
    from sloth.machine import resolve_device

    kind = resolve_device(device)
    if kind.type == "cpu" and device == "auto":
        raise KernelUnavailable(
            f"--gpus {count}: torch sees no GPU here; `sloth doctor` tells more. With --device cpu "
            f"{count} processes share the CPU"
        )
    if kind.type == "cuda":
        import torch

        if kind.index is not None:
            raise ValueError(f"--gpus {count} takes the first {count} GPUs; leave --device out")
        if torch.cuda.device_count() < count:
            raise KernelUnavailable(
                f"--gpus {count}: torch sees {torch.cuda.device_count()} of them"
            )
