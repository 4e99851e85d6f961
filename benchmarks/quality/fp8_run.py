"""The same run of sloth with the frozen products in 8-bit floats: base_compute="fp8"."""

from __future__ import annotations

from benchmarks.quality.sloth_run import run

if __name__ == "__main__":
    run("fp8", __doc__ or "", base_compute="fp8")
