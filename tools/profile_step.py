"""Where the time of one training step goes: kernels of the device, functions of the host.

    python -m tools.profile_step FOLDER --batch 4 --length 2048          # a table of kernels
    python -m tools.profile_step FOLDER --batch 1 --length 2048 --host   # and of Python functions

FOLDER: a checkpoint, such as `tools/random_checkpoint.py` writes. The step is the public one:
`model.loss(...).backward()` and a stock optimizer. Kernels are measured by torch's profiler on
steps of their own, after the wall time was taken without it. The host is profiled on 16 tokens,
which leave the device idle, with the launches that the full shape makes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import sloth

_WARM_UP_STEPS, _TIMED_STEPS, _PROFILED_STEPS = 3, 8, 2
_HOST_STEPS, _HOST_TOKENS = 5, 16


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces, template arguments and signature."""
    kernel = re.sub(r"^void ", "", kernel)
    while "<" in kernel and (shorter := re.sub(r"<[^<>]*>", "", kernel)) != kernel:
        kernel = shorter
    return kernel.split("(")[0].split("::")[-1] or kernel


def kernel_table(events: Any, num_steps: int) -> dict[str, tuple[float, float]]:
    """Kernel -> (ms a step, launches a step), from a profile's events."""
    table: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            row = table[short_name(event.name)]
            row[0] += event.device_time_total / 1e3 / num_steps
            row[1] += 1 / num_steps
    ordered = sorted(table.items(), key=lambda item: -item[1][0])
    return {name: (ms, launches) for name, (ms, launches) in ordered}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--base-compute", choices=("fp8",))
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--rows", type=int, default=40, help="of the tables")
    parser.add_argument("--host", action="store_true", help="profile the host's functions too")
    args = parser.parse_args()
    model = sloth.load(args.folder, dtype=torch.bfloat16, base_compute=args.base_compute)
    model.add_lora(sloth.LoraConfig(r=args.rank, alpha=16, use_dora=args.dora))
    chosen = model.plan(batch=args.batch, seq=args.length, memory_gib=args.memory_gib)
    print(chosen)
    model.network.planner = lambda batch, seq: chosen.keeps  # also on the host's few tokens
    model.network.head_chunk_bytes = chosen.head_chunk_bytes
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(1000, (args.batch, args.length), device=model.device)

    def step(tokens: torch.Tensor = tokens) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(tokens, tokens).backward()
        optimizer.step()

    for _ in range(_WARM_UP_STEPS):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        step()
    torch.cuda.synchronize()
    wall_ms = (time.perf_counter() - start) / _TIMED_STEPS * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(_PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    table = kernel_table(recorded.events(), _PROFILED_STEPS)
    busy_ms = sum(ms for ms, _ in table.values())
    num_tokens = args.batch * args.length
    print(
        f"{torch.cuda.get_device_name()}: {wall_ms:.1f} ms a step, "
        f"{num_tokens / wall_ms * 1e3:.0f} tok/s, kernels {busy_ms:.1f} ms, "
        f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    )
    for name, (ms, launches) in list(table.items())[: args.rows]:
        print(f"{ms:9.2f} ms {launches:7.0f} x {ms / launches * 1e3:8.0f} us  {name}")
    if args.host:
        profile_host(lambda: step(tokens.flatten()[None, :_HOST_TOKENS]), args.rows)


def profile_host(step: Any, rows: int) -> None:
    """Python functions by their own time, of steps that leave the device idle."""
    times_ms = []
    profiler = cProfile.Profile()
    for profiled in [False] * _HOST_STEPS + [True]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        if profiled:
            profiler.runcall(step)
        else:
            step()
            times_ms.append((time.perf_counter() - start) * 1e3)
    print(f"host: {sorted(times_ms)[len(times_ms) // 2]:.1f} ms a step of {_HOST_TOKENS} tokens")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(rows)


if __name__ == "__main__":
    main()
