"""The Triton source of every op, run by Triton's interpreter on a CPU, equals the torch engine.

All cases of interpreter_cases.py run in one subprocess with TRITON_INTERPRET=1; each is one test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.interpreter_cases import CASES, DTYPES  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def results() -> dict[str, str]:
    """Case and dtype -> "" or the traceback, from the one interpreting process."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreter_cases"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_triton_source_equals_torch_engine(results: dict[str, str], name: str, dtype: str) -> None:
    assert results[f"{name}-{dtype}"] == "", results[f"{name}-{dtype}"]
