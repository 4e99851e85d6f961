"""How near is a gradient in 8 bits? Cosines of LoRA's gradients, bf16 and fp8, to those in fp32.

    python -m benchmarks.quality.gradients WORK --steps 20 --batches 4

WORK is the folder that a quality run prepared. An adapter is trained for some steps first, in the
dtype of a quality run, since at its beginning B is zero and with it the gradient of A. Then every
setting computes the gradient of the same batches, which follow, at the same adapter. bf16 stands
beside fp8 to show what an ordinary rounding does to this model's gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sloth
from benchmarks.common import DEVICE, emit
from benchmarks.quality.work import ALPHA, DTYPE, LEARNING_RATE, RANK, read_batches

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp8": {"dtype": DTYPE, "base_compute": "fp8"},
}
Gradients = Mapping[str, Tensor]


def cosines(actual: Gradients, expected: Gradients) -> dict[str, float]:
    """Of all gradients as one vector; of the median and of the worst tensor that is not zero."""
    names = [name for name, value in expected.items() if value.norm() > 0]
    single = sorted(_cosine(actual[name].flatten(), expected[name].flatten()) for name in names)
    whole = (torch.cat([side[name].flatten() for name in names]) for side in (actual, expected))
    return {"all": _cosine(*whole), "median": single[len(single) // 2], "worst": single[0]}


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def _model(work: Path, **settings: Any) -> sloth.Model:
    model = sloth.load(work / "model", device=str(DEVICE), **settings)
    return model.add_lora(r=RANK, alpha=ALPHA)


def _adapter(model: sloth.Model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.network.named_parameters() if p.requires_grad}


def trained(work: Path, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The adapter after a step on each batch."""
    torch.manual_seed(0)
    model = _model(work, dtype=DTYPE)
    adapter = _adapter(model)
    optimizer = torch.optim.AdamW(list(adapter.values()), lr=LEARNING_RATE, weight_decay=0.0)
    for tokens, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        model.loss(tokens, labels).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in adapter.items()}


def gradients(
    work: Path,
    values: Mapping[str, Tensor],
    batches: list[tuple[Tensor, Tensor]],
    **settings: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the batches, and the gradients' sum, at an adapter."""
    model = _model(work, **settings)
    adapter = _adapter(model)
    with torch.no_grad():
        for name, parameter in adapter.items():
            parameter.copy_(values[name])
    total = 0.0
    for tokens, labels in batches:
        loss = model.loss(tokens, labels)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.float() for name, p in adapter.items() if p.grad is not None}
    return total / len(batches), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="trained before the comparison")
    parser.add_argument("--batches", type=int, default=4, help="that the gradients are taken on")
    args = parser.parse_args()
    source = read_batches(args.work / f"seed-{args.seed}.safetensors")
    values = trained(args.work, islice(source, args.steps))
    batches = list(islice(source, args.batches))
    assert len(batches) == args.batches, "the work folder has fewer batches"
    expected: tuple[float, dict[str, Tensor]] | None = None
    for name, settings in SETTINGS.items():
        found = gradients(args.work, values, batches, **settings)
        expected = expected or found
        emit({"name": name, "loss": found[0], **cosines(found[1], expected[1])})
        print(f"{name}: loss {found[0]:.4f}, cosines {cosines(found[1], expected[1])}", flush=True)


if __name__ == "__main__":
    main()
