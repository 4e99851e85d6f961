"""The first case of every op under pytest-benchmark, checked against fp32 before it is timed.

    python -m pytest benchmarks/test_kernels.py --benchmark-compare

For comparing two revisions on one machine. Outside the default test paths; needs a GPU. The suite's
own figures come from `benchmarks.run`, which also keeps caches cold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import OPS, cases_of, relative_error, within
from benchmarks.roofline import ModelShape
from tools.shapes import hf_config

pytest.importorskip("pytest_benchmark")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_TOKENS = 8192


@pytest.mark.parametrize("who", ["eager", "torch.compile", "Liger", "bitsandbytes", "sloth"])
@pytest.mark.parametrize("op", OPS)
def test_kernel(op: str, who: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    shape = ModelShape.from_hf(hf_config("llama-3.1-8b"))
    # Of lora_linear the first case is the limit alone; the next one has the contenders.
    cases = (case for case in cases_of(op, shape, NUM_TOKENS) if "sloth" in case.contenders)
    case = next(cases)
    if who not in case.contenders:
        pytest.skip(f"{who} does not take part in {case.name}")
    try:
        run = case.contenders[who]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    truth = case.truth()
    baseline = relative_error(next(iter(case.contenders.values()))()(), truth)
    assert within(relative_error(run(), truth), baseline)

    def timed() -> None:
        run()
        torch.cuda.synchronize()

    benchmark.extra_info.update(case=case.name, num_bytes=case.num_bytes, num_flops=case.num_flops)
    benchmark(timed)
