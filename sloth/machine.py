"""What `sloth doctor` finds on this machine: GPU, driver, torch, triton; and where sloth may keep
files.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from sloth import __version__
from sloth.constants import GIB
from sloth.errors import KernelUnavailable


def describe_machine() -> dict[str, str]:
    """Names and findings, in the order to show them."""
    has_triton = importlib.util.find_spec("triton") is not None
    rows: dict[str, str] = {
        "sloth": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if has_triton else "not installed",
        "CUDA in torch": torch.version.cuda or "no (a CPU build)",
        "driver": _driver(),
    }
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = (
            f"{found.name}, {found.total_memory / GIB:.0f} GiB, sm_{found.major}{found.minor}"
        )
    if not torch.cuda.is_available():
        rows["GPU"] = "none that torch can use; sloth runs on the CPU"
    rows["engine"] = "triton" if torch.cuda.is_available() and has_triton else "torch"
    return rows


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is CUDA when there is one.

    Raises KernelUnavailable, ValueError for a name that torch does not know.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; known: auto, cpu, cuda, cuda:0") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise KernelUnavailable(
            f"device {str(device)!r} was asked for, but torch sees no CUDA device "
            f"(torch {torch.__version__}); `sloth doctor` tells more"
        )
    return chosen


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi found"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    return " ".join(sorted(set(done.stdout.split()))) or f"nvidia-smi fails: {done.stderr.strip()}"


def cache_root() -> Path | None:
    """SLOTH_CACHE, or ~/.cache/sloth; None where the user turned it off (SLOTH_CACHE=)."""
    named = os.environ.get("SLOTH_CACHE")
    if named == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(home) / "sloth"


def free_host_gib() -> float | None:
    """Host memory that this process may still take, None where the system does not say."""
    free = [value for value in (_available_bytes(), _group_bytes()) if value is not None]
    return min(free) / GIB if free else None


def processes_here() -> int:
    """How many processes of this run share the machine: torchrun says so, one without it."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _group_bytes() -> int | None:
    """What a container's limit leaves (cgroup v2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / f"memory.{name}").read_text().strip() for name in ("max", "current")
        )
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdigit() else None
