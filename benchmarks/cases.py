"""Kernel cases: one operation of a real model's size, computed by several programs.

    python -m benchmarks.cases --op rms_norm --model llama-3.1-8b --tokens 2048,8192

A case names its contenders, the bytes or operations that the mathematics needs (not those that a
contender spends), and how to compute the truth in fp32. A contender is checked before it is timed:
its error against that truth must stay within FACTOR times the error of the first contender that
runs, which is the framework's own 16-bit path. One that is wrong, or cannot run here, becomes a row
that says so.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import DEVICE, emit
from benchmarks.roofline import ModelShape
from benchmarks.timing import REPEATS, median_us
from tools.shapes import SHAPES, hf_config

OPS = (
    *("nf4", "rms_norm", "rope", "glu", "linear_cross_entropy", "attention", "lora_linear"),
    *("folded_products", "fp8"),
)
FACTOR = 2.0
# Relative errors below the rounding of a bf16 result itself are no evidence of anything.
ERROR_FLOOR = 2.0**-9

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]
# Imports what it needs and returns the function, so that a missing package costs one row.
Provider = Callable[[], Function]


@dataclass(frozen=True)
class KernelCase:
    """One operation at one size. Each contender builds its inputs and returns what is timed.

    num_bytes, num_flops: what the operation has to move or compute; one of them, the other None.
    """

    name: str
    truth: Callable[[], Outputs]
    contenders: dict[str, Callable[[], Callable[[], Outputs]]]
    num_bytes: float | None = None
    num_flops: float | None = None


def compiled(function: Function) -> Provider:
    """`torch.compile` of an eager formula."""

    def provide() -> Function:
        # Backward is run again and again over what one forward saved.
        settings: Any = importlib.import_module("torch._functorch.config")
        settings.donated_buffer = False
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return provide


def ready(function: Function) -> Provider:
    """A function that needs no import."""
    return lambda: function


def copies(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Fresh leaves with the values and strides of `inputs`; some peers write over theirs."""
    return [
        torch.empty_like(x).copy_(x).requires_grad_(wants)
        for x, wants in zip(inputs, wanted, strict=True)
    ]


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Float tensors in fp32, the others as they are."""
    return [x.float() if x.is_floating_point() else x for x in inputs]


def differentiable(
    name: str,
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    douts: Sequence[Tensor],
    functions: dict[str, Provider],
    truth: Function,
    forward: dict[str, float],
    backward: dict[str, float],
) -> Iterator[KernelCase]:
    """The forward and the backward of an operation as two cases.

    wanted: which inputs get a gradient. douts: gradients of the outputs. truth: the formula, run
    on fp32 inputs. forward, backward: `num_bytes` or `num_flops` of each.
    """

    def build_forward(provider: Provider) -> Callable[[], Outputs]:
        function, own = provider(), copies(inputs, wanted)
        return lambda: function(*own)

    def gradients(function: Function, leaves: list[Tensor], of: list[Tensor]) -> Any:
        outputs = function(*leaves)
        targets = [leaf for leaf, wants in zip(leaves, wanted, strict=True) if wants]
        return lambda: torch.autograd.grad(outputs, targets, of, retain_graph=True)

    def build_backward(provider: Provider) -> Callable[[], Outputs]:
        return gradients(provider(), copies(inputs, wanted), copies(douts, [False] * len(douts)))

    def true_gradients() -> Outputs:
        result: Outputs = gradients(truth, copies(widened(inputs), wanted), widened(douts))()
        return result

    for part, build, true_outputs, work in (
        ("forward", build_forward, lambda: truth(*widened(inputs)), forward),
        ("backward", build_backward, true_gradients, backward),
    ):
        contenders = {who: _bound(build, provider) for who, provider in functions.items()}
        yield KernelCase(f"{name} {part}", true_outputs, contenders, **work)


def whole_step(
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    dout: Tensor,
    functions: dict[str, Provider],
) -> dict[str, Callable[[], Callable[[], Outputs]]]:
    """Contenders whose forward and backward are timed as one: some form gradients early.

    They return their one output and the gradients of the wanted inputs.
    """

    def build(provider: Provider) -> Callable[[], Outputs]:
        function, leaves = provider(), copies(inputs, wanted)
        targets = [leaf for leaf, wants in zip(leaves, wanted, strict=True) if wants]

        def run() -> Outputs:
            (output,) = function(*leaves)
            return output.detach(), *torch.autograd.grad(output, targets, dout.to(output.dtype))

        return run

    return {who: _bound(build, provider) for who, provider in functions.items()}


def _bound(build: Callable[[Provider], Any], provider: Provider) -> Callable[[], Any]:
    return lambda: build(provider)


def relative_error(outputs: Outputs, truth: Outputs) -> list[float]:
    """||output - truth|| / ||truth|| of every output."""
    assert len(outputs) == len(truth), f"{len(outputs)} outputs, {len(truth)} expected"
    errors = []
    for output, true in zip(outputs, truth, strict=True):
        assert output.shape == true.shape, f"shape {list(output.shape)}, not {list(true.shape)}"
        scale = torch.linalg.vector_norm(true.float()).clamp(min=1e-30)
        errors.append((torch.linalg.vector_norm(output.float() - true.float()) / scale).item())
    return errors


def within(errors: list[float], baseline: list[float]) -> bool:
    """Whether each error is at most FACTOR times the baseline's; false for nan."""
    allowed = [max(FACTOR * error, ERROR_FLOOR) for error in baseline]
    return all(error <= limit for error, limit in zip(errors, allowed, strict=True))


def run_case(case: KernelCase, repeats: int = REPEATS) -> Iterator[dict[str, Any]]:
    """One row per contender: checked, then timed."""
    truth = tuple(output.detach() for output in case.truth())
    baseline: list[float] | None = None
    for who, build in case.contenders.items():
        row: dict[str, Any] = {"case": case.name, "who": who}
        run: Callable[[], Outputs] | None = None
        try:
            run = build()
            errors = relative_error(run(), truth)
            row["error_vs_fp32"] = max(errors)
            baseline = baseline or errors
            if not within(errors, baseline):
                raise ArithmeticError(f"errors {errors}, baseline {baseline}: not timed")
            row["us"] = round(median_us(run, repeats), 2)
            if case.num_bytes is not None:
                row["tb_s"] = round(case.num_bytes / row["us"] / 1e6, 3)
            if case.num_flops is not None:
                row["tflops"] = round(case.num_flops / row["us"] / 1e6, 2)
        except Exception as error:  # a peer may fail in any way; the others are still measured
            row["failed"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        run = None  # what it holds is given back before the next one builds its own
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def cases_of(op: str, shape: ModelShape, num_tokens: int) -> Iterator[KernelCase]:
    """The cases of `benchmarks/kernels/<op>.py`."""
    module = importlib.import_module(f"benchmarks.kernels.{op}")
    yield from module.cases(shape, num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=OPS, required=True)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", default="2048,8192", help="numbers of rows, by commas")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = ModelShape.from_hf(hf_config(args.model))
    for num_tokens in map(int, args.tokens.split(",")):
        for case in cases_of(args.op, shape, num_tokens):
            for row in run_case(case, args.repeats):
                emit({"op": args.op, "model": args.model, "num_tokens": num_tokens, **row})


if __name__ == "__main__":
    main()
