"""Settings of every test run: GPU tests skip without a GPU, and CPU tests share the machine."""

from __future__ import annotations

import os

import pytest
import torch

MAX_THREADS = 2


def pytest_configure(config: pytest.Config) -> None:
    wanted = int(os.environ.get("OMP_NUM_THREADS", MAX_THREADS))  # a busy machine asks for fewer
    torch.set_num_threads(min(wanted, MAX_THREADS, os.cpu_count() or 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
