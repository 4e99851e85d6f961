"""Which rows are held out: a set of their own, the valid split that came with the data, or some of
the data themselves.

The last are drawn by row, not by example: what a row became (pieces, turns, the halves of a pair)
stays on one side. Which rows they are is a function of the seed and the number of rows alone.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sloth.data.counts import DataCounts
from sloth.data.dataset import Dataset, Notice, load_for
from sloth.data.packing import pack
from sloth.data.rows import MissingColumn
from sloth.data.settings import RunSettings
from sloth.data.sources import Source, has_split
from sloth.errors import DataError

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer


def load_both(
    settings: RunSettings, source: Source, tokenizer: Tokenizer, notice: Notice | None = None
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those held out, None without any, under a run's settings.

    Raises DataError, also for a val_set_size that leaves nothing on one side; ValueError where the
    data have a valid split already, and for a setting without effect, as there are no held-out
    rows.
    """
    has_valid = has_split(source, "valid")
    if not has_valid and settings.eval_data is None and settings.val_set_size is None:
        _refuse_idle(settings)
    if settings.val_set_size is not None and has_valid:
        raise ValueError(
            f"val_set_size={settings.val_set_size:g} takes held-out rows out of the data, which "
            "have a valid split already; leave it out, or give the train split alone"
        )
    data = load_for(settings, source, tokenizer, notice=notice)
    if settings.val_set_size is not None:
        packed_to = settings.max_length if settings.packing else None
        return divide(data, settings.val_set_size, settings.seed, packed_to)
    given = source if settings.eval_data is None and has_valid else settings.eval_data
    if given is None:
        return data, None
    try:
        return data, load_for(settings, given, tokenizer, "valid", notice)
    except MissingColumn as error:
        raise DataError(
            f"held-out rows (eval_data, or the valid split): {error}; columns apply to them as "
            "well as to the data, so give both the same columns"
        ) from error


def _refuse_idle(settings: RunSettings) -> None:
    """Raise ValueError for a setting that is about held-out rows. Answers need none."""
    names = ["eval_batch_size", "patience", "load_best"]
    names += [] if settings.sample_prompts else ["eval_steps"]
    for name in names:
        if getattr(settings, name):
            prompts = ", or sample_prompts" if name == "eval_steps" else ""
            raise ValueError(
                f"{name}={getattr(settings, name)} has no effect without held-out rows: "
                f"eval_data, val_set_size, or a valid split of the data{prompts}"
            )


def divide(
    data: Dataset, size: float, seed: int, packed_to: int | None = None
) -> tuple[Dataset, Dataset]:
    """(rows to train on, rows held out): `size` of them, or that share where it is below 1.

    packed_to: tokens of a packed row; held-out rows are never packed. Raises DataError.
    """
    rows = data.examples.rows
    num_rows = int(rows[-1]) + 1
    count = int(size) if size >= 1 else max(1, round(size * num_rows))
    if count >= num_rows:
        raise DataError(
            f"{data.name}: val_set_size={size:g} of {num_rows} rows leaves none to train on"
        )
    drawn = random.Random(f"sloth held out {seed}").sample(range(num_rows), count)
    is_held_out = torch.isin(rows, torch.tensor(drawn))
    held_out = _part(data, is_held_out, "held out")
    sizes = _sizes(held_out)
    counts = replace(DataCounts(rows=count, kinds={"held out of the data": count}), **sizes)
    held_out = replace(held_out, name=f"{data.name} (held out)", counts=counts)
    trained = _part(data, ~is_held_out, "trained")
    left = {name: getattr(data.counts, name) - size for name, size in sizes.items()}
    trained = replace(trained, counts=replace(data.counts, held_out=count, **left))
    if packed_to is not None:
        packing = pack(trained.examples.lengths.tolist(), packed_to)
        trained = replace(trained, packing=packing)
    return trained, held_out


def _part(data: Dataset, wanted: Tensor, side: str) -> Dataset:
    places = wanted.nonzero().flatten()
    digest = hashlib.sha256(f"{data.fingerprint} {side}".encode())
    digest.update(bytes(wanted.to(torch.uint8).tolist()))
    examples = data.examples.part(places)
    return replace(data, examples=examples, fingerprint=digest.hexdigest(), packing=None)


def _sizes(data: Dataset) -> dict[str, Any]:
    return {
        "examples": len(data.examples),
        "tokens": int(data.examples.lengths.sum()),
        "trained_tokens": sum(example.num_trained for example in data.examples),
    }
