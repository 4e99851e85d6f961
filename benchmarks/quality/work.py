"""What both programs of a quality run share: the folder of inputs, the loop, the result.

A work folder holds everything that could differ between programs, made once by `prepare`:

    model/              the checkpoint, NF4 in bitsandbytes' format, so that the codes are the same
    seed-0.safetensors  "0.tokens", "0.labels", "1.tokens", ...: one batch a step, right-padded
    held-out.safetensors  the same for the rows that are never trained on

Rows, masks, order, optimizer, schedule and clipping are then equal by construction; the programs
differ in their arithmetic, and in the random numbers that LoRA's A starts from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sloth
from benchmarks.common import DEVICE, emit
from sloth.data.batches import Batch, StepPlan
from sloth.data.dataset import load_data

RANK, ALPHA = 16, 32
LEARNING_RATE, WARM_UP_STEPS, CLIP = 2e-4, 10, 1.0
BATCH_SIZE, MAX_LENGTH, HELD_OUT_ROWS, EVAL_STEPS = 8, 512, 200, 50
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

LossOf = Callable[[Tensor, Tensor], Tensor]


def prepare(model: str, gsm8k: Path, work: Path, steps: int, seeds: list[int]) -> None:
    """Fill a work folder. gsm8k: folder of gsm8k_train.jsonl and gsm8k_test.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    loaded = sloth.load(model, device="cpu", dtype="float32")
    loaded.save_base(work / "model", quant="nf4")
    train, held_out = (
        load_data(_as_chats(gsm8k / name, rows), loaded.tokenizer, MAX_LENGTH)
        for name, rows in (("gsm8k_train.jsonl", None), ("gsm8k_test.jsonl", HELD_OUT_ROWS))
    )
    for seed in seeds:
        plan = StepPlan.of(train.num_rows, BATCH_SIZE, 1, seed, steps, None)
        rows = [plan.rows(step) for step in range(steps)]
        _write(work / f"seed-{seed}.safetensors", [train.batch(r, 0) for r in rows])
    places = range(0, held_out.num_rows, BATCH_SIZE)
    rows = [list(range(at, min(at + BATCH_SIZE, held_out.num_rows))) for at in places]
    _write(work / "held-out.safetensors", [held_out.batch(r, 0) for r in rows])


def _as_chats(path: Path, limit: int | None) -> list[dict[str, list[dict[str, str]]]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]


def _write(path: Path, batches: list[Batch]) -> None:
    tensors = {}
    for index, batch in enumerate(batches):
        tensors[f"{index}.tokens"], tensors[f"{index}.labels"] = batch.tokens, batch.labels
    save_file(tensors, path)


def read_batches(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, labels) [B, T] of each batch, on the device."""
    tensors = load_file(path)
    for index in range(len(tensors) // 2):
        yield tensors[f"{index}.tokens"].to(DEVICE), tensors[f"{index}.labels"].to(DEVICE)


def arguments(description: str) -> argparse.Namespace:
    """Command line of one program's run; seeds torch."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


def train(
    name: str,
    args: argparse.Namespace,
    loss_of: LossOf,
    trainable: list[torch.nn.Parameter],
    as_stored: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Train over the seed's batches and print one JSON line.

    loss_of: (tokens, labels), labels unshifted -> mean loss over the trained tokens. as_stored:
    inside, it is that of the model as files hold it: what the held-out loss is taken of.
    """
    batches = list(read_batches(args.work / f"seed-{args.seed}.safetensors"))
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP_STEPS, (len(batches) - step) / len(batches)),
    )
    losses, norms, held_out = [], [], {}
    with as_stored():
        held_out[0] = evaluate(args.work, loss_of)
    for step, (tokens, labels) in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens, labels)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, CLIP).item())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % EVAL_STEPS == 0 or step == len(batches):
            with as_stored():
                held_out[step] = evaluate(args.work, loss_of)
    found_as_trained = evaluate(args.work, loss_of)
    found = {"losses": losses, "gradient_norms": norms, "held_out": held_out}
    found["held_out_as_trained"] = found_as_trained
    emit({"name": name, "seed": args.seed, **found})


@torch.no_grad()
def evaluate(work: Path, loss_of: LossOf) -> float:
    """Mean loss over the trained tokens of the held-out rows."""
    total, count = 0.0, 0
    for tokens, labels in read_batches(work / "held-out.safetensors"):
        trained = int((labels[:, 1:] != -100).sum())
        total += loss_of(tokens, labels).item() * trained
        count += trained
    return total / count
