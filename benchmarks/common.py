"""What every end-to-end process shares: options, data, the optimizer, timing, the printed result.

A process measures one program on one case and prints one line of JSON. It asserts, before any
speed, that the loss is finite, that every trained parameter got a gradient, that these are not all
zero, and that the adapter has the size it should have. B starts at zero everywhere, so the first
loss is the base model's and has to agree between programs; `benchmarks.run` checks that.

How a step is timed: events on the stream at every step's start, nothing waited for in between, so
that the host runs ahead as it does in training. What the host itself takes is measured afterwards
on a batch of 16 tokens, which launches the same kernels: at full length the queue of launches fills
up (about 1024), and the host would be seen waiting for the device. On a machine without a GPU
everything runs on the CPU, which tests the plumbing; the speeds then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import Batch, cycle, packed_batch, random_batch
from benchmarks.roofline import ModelShape, step_flops

ALPHA, LEARNING_RATE = 16, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP_STEPS, NUM_BATCHES = 3, 4
HOST_STEPS, HOST_TOKENS = 7, 16
GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What a result line starts with, so that it is found among a peer's own messages.
RESULT_MARK = '{"result": '


def arguments(description: str, variants: Sequence[str]) -> argparse.Namespace:
    """Command line of one measured process; seeds torch and applies the memory cap."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--packed", action="store_true", help="rows packed with short documents")
    parser.add_argument("--steps", type=int, default=20, help="0: the first one alone")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("nf4", "bf16"), default="nf4", help="of the base")
    parser.add_argument("--memory-gib", type=float, help="allocating beyond this fails")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    if ("quantization_config" in config) != (args.dtype == "nf4"):
        parser.error(f"--dtype {args.dtype}, but {args.folder} holds the other kind of weights")
    torch.manual_seed(0)  # LoRA's A; programs draw it in different orders, so losses drift later
    if args.memory_gib and DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gib * GIB / total))
    return args


def batches_of(args: argparse.Namespace, vocabulary: int) -> list[Batch]:
    """The batches of a case, the same in every process, on the CPU."""
    make = packed_batch if args.packed else random_batch
    return [make(vocabulary, args.batch, args.length, seed) for seed in range(NUM_BATCHES)]


class Clock:
    """Seconds since it was made, with the device's work done."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self._start


def measure(
    name: str,
    args: argparse.Namespace,
    loss_of: Callable[[Batch], Tensor],
    trainable: list[torch.nn.Parameter],
    load_s: float,
    setting: str = "",
) -> None:
    """Train on the case's batches and print one JSON line.

    loss_of: batch on the device -> mean loss over its trained tokens, with a graph. load_s: from
    the call that loads the model to the adapter being attached. setting: what the program chose by
    itself, for the table.
    """
    shape = ModelShape.from_folder(args.folder)
    # DoRA's lengths are vectors beside LoRA's factors; the latter are what programs compare by.
    factors = [p for p in trainable if p.dim() == 2]
    num_lengths = sum(p.numel() for p in trainable if p.dim() == 1)
    num_parameters = sum(p.numel() for p in trainable)
    expected = shape.lora_parameters(args.rank) + (shape.dora_lengths if num_lengths else 0)
    assert num_parameters == expected, f"{num_parameters} trained parameters, {expected} expected"
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    batches = [batch.to(DEVICE) for batch in batches_of(args, shape.vocabulary)]
    following = cycle(batches)

    def step(batch: Batch | None = None) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch or following())
        loss.backward()
        optimizer.step()
        return loss.detach()

    clock = Clock()
    first_loss = step().item()
    first_step_s = clock.seconds()
    norm = _gradient_norm(factors)
    assert _gradient_norm(trainable) >= norm
    assert math.isfinite(first_loss), f"the first loss is {first_loss}"
    assert math.isfinite(norm) and norm > 0, f"the norm of the first gradient is {norm}"
    if args.steps:
        for _ in range(WARM_UP_STEPS - 1):
            step()
        times_ms, peak_gib, reserved_gib = _time(step, args.steps)
        last_loss = step().item()
        host_ms = _host_ms(step, random_batch(shape.vocabulary, 1, HOST_TOKENS, seed=0).to(DEVICE))
    else:  # whether it runs at all, in one step of minutes
        times_ms, last_loss, host_ms = [first_step_s * 1e3], first_loss, math.nan
        peak_gib, reserved_gib = _peak_gib()
    tokens = statistics.mean(batch.num_tokens for batch in batches)
    trained = statistics.mean(batch.num_trained for batch in batches)
    flops = statistics.mean(step_flops(shape, b.lengths, b.num_trained) for b in batches)
    ms = statistics.median(times_ms)
    result = {
        "name": name,
        "setting": setting,
        "gpu": device_name(),
        "dtype": args.dtype,
        "rank": args.rank,
        "batch": args.batch,
        "length": args.length,
        "packed": args.packed,
        "memory_cap_gib": args.memory_gib,
        "steps": args.steps,
        "trained_parameters": num_parameters,
        "first_loss": round(first_loss, 5),
        "last_loss": round(last_loss, 5),
        "gradient_norm": norm,
        "ms": round(ms, 2),
        "ms_p95": round(percentile(times_ms, 0.95), 2),
        "tokens_per_s": round(tokens / ms * 1e3, 1),
        "trained_tokens_per_s": round(trained / ms * 1e3, 1),
        "step_tflop": flops / 1e12,
        "peak_gib": round(peak_gib, 2),
        "reserved_gib": round(reserved_gib, 2),
        "load_s": round(load_s, 1),
        "first_step_s": round(first_step_s, 1),
    }
    emit(result if math.isnan(host_ms) else result | {"host_ms": round(host_ms, 1)})


def device_name() -> str:
    """The GPU's name, "CPU" without one."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least this share of all at or below it."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def emit(result: dict[str, Any]) -> None:
    """Print a result line; the process that started this one finds it with `find_results`."""
    print(f"\n{RESULT_MARK}{json.dumps(result)}}}", flush=True)


def find_results(output: str) -> list[dict[str, Any]]:
    """The result lines in a process's standard output."""
    lines = output.splitlines()
    return [json.loads(line)["result"] for line in lines if line.startswith(RESULT_MARK)]


def _gradient_norm(trainable: Sequence[torch.nn.Parameter]) -> float:
    gradients = [p.grad for p in trainable if p.grad is not None]
    missing = len(trainable) - len(gradients)
    assert missing == 0, f"{missing} of {len(trainable)} trained parameters have no gradient"
    return torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients])).item()


def _time(step: Callable[[], Tensor], num_steps: int) -> tuple[list[float], float, float]:
    """(ms of every step, peak GiB allocated, peak GiB reserved)."""
    if DEVICE.type == "cpu":
        times_ms = []
        for _ in range(num_steps):
            clock = Clock()
            step()
            times_ms.append(clock.seconds() * 1e3)
        return times_ms, 0.0, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times_ms = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return times_ms, *_peak_gib()


def _peak_gib() -> tuple[float, float]:
    """GiB allocated and reserved at most since the last reset."""
    if DEVICE.type == "cpu":
        return 0.0, 0.0
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return peak / GIB, reserved / GIB


def _host_ms(step: Callable[[Batch], Tensor], batch: Batch) -> float:
    """The host's median ms to launch one step and its optimizer; `batch` keeps the device idle."""
    for _ in range(WARM_UP_STEPS):  # kernels for another shape, and a recording of it
        step(batch)
    times_ms = []
    for _ in range(HOST_STEPS):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(batch)
        times_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times_ms)
