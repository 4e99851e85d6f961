"""The machine's own limits, measured anew by every run, and the versions it was measured with.

    python -m benchmarks.ceilings

A step is held against the rate of a large bf16 product on random data (zeros would run faster, the
chip clocks by the power that switching bits take) and a memory-bound kernel against a copy, which
is what a kernel could reach; the data sheet's figures are not.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

from benchmarks.common import DEVICE, device_name, emit
from benchmarks.timing import median_us

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("liger_kernel", "unsloth", "unsloth_zoo", "xformers"),
)


def ceilings(product_size: int = 8192, copy_bytes: int = 2**31) -> dict[str, float]:
    """Rates of a bf16 product (TFLOP/s), a copy on the device (TB/s, read and written bytes
    counted), and pinned copies to and from it (GB/s)."""
    left, right = (
        torch.randn(product_size, product_size, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(2)
    )
    out = torch.empty_like(left)
    product_us = median_us(lambda: torch.mm(left, right, out=out), repeats=50)
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source))
    rates = {
        "product_tflops": 2 * product_size**3 / product_us / 1e6,
        "copy_tb_s": 2 * copy_bytes / copy_us / 1e6,
    }
    if DEVICE.type == "cuda":
        host = torch.empty(copy_bytes // 2, dtype=torch.uint8, pin_memory=True)
        piece = source[: len(host)]
        to_device_us = median_us(lambda: piece.copy_(host, non_blocking=True), repeats=10)
        to_host_us = median_us(lambda: host.copy_(piece, non_blocking=True), repeats=10)
        rates["host_to_device_gb_s"] = len(host) / to_device_us / 1e3
        rates["device_to_host_gb_s"] = len(host) / to_host_us / 1e3
    return {name: round(rate, 3) for name, rate in rates.items()}


def versions() -> dict[str, str]:
    """What takes part in the measurement, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version())
    if DEVICE.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        found["driver"] = driver[0] if driver else "unknown"
    return found


def main() -> None:
    small: dict[str, Any] = {"product_size": 256, "copy_bytes": 2**20}
    rates = ceilings() if DEVICE.type == "cuda" else ceilings(**small)
    emit({"gpu": device_name(), "ceilings": rates, "versions": versions()})


if __name__ == "__main__":
    main()
