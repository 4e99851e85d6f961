"""What every end-to-end case shares: data, settings, timing, checks before a speed is printed."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

RANK, ALPHA, LEARNING_RATE = 16, 16, 2e-4
WARM_UP_STEPS = 3


def arguments(description: str) -> argparse.Namespace:
    """Command line of one measured process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--variant", default="", help="a setting of the peer, by its own name")
    return parser.parse_args()


def random_batch(vocabulary: int, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, length), generator=generator).cuda()


def measure(
    name: str, args: argparse.Namespace, step: Callable[[], Tensor], trainable: list[Tensor]
) -> None:
    """Run `step` (forward, backward, optimizer; returns the loss), print one JSON line.

    Asserts a finite loss and non-zero gradients before any speed is printed. `trainable` is looked
    at after the first step, which must leave gradients in place.
    """
    start = time.perf_counter()
    first_loss = step().item()
    first_step_s = time.perf_counter() - start
    gradients = [p.grad for p in trainable if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients])).item()
    assert norm > 0 and first_loss == first_loss, (norm, first_loss)
    for _ in range(WARM_UP_STEPS - 1):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times_ms: list[float] = []
    host_ms: list[float] = []
    for _ in range(args.steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        host = time.perf_counter()
        begin.record()
        step()
        end.record()
        host_ms.append((time.perf_counter() - host) * 1e3)
        torch.cuda.synchronize()
        times_ms.append(begin.elapsed_time(end))
    median_ms = statistics.median(times_ms)
    result = {
        "name": name,
        "gpu": torch.cuda.get_device_name(),
        "batch": args.batch,
        "length": args.length,
        "first_loss": round(first_loss, 4),
        "gradient_norm": norm,
        "ms": round(median_ms, 1),
        "tokens_per_s": round(args.batch * args.length / median_ms * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "host_ms": round(statistics.median(host_ms), 1),
        "first_step_s": round(first_step_s, 1),
    }
    print(json.dumps(result), flush=True)
