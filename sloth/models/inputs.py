"""What a forward pass is given, checked before it runs: a GPU answers an id outside the vocabulary
with an assertion that ends the process, and a CPU an empty batch with an error deep inside.

Shapes: B batch, T tokens. What lies on a GPU is checked in shape alone: to look at its values would
wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sloth.constants import IGNORE_INDEX

ID_DTYPES = (torch.int32, torch.int64)


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `tokens` are int32 or int64 [B, T], B, T > 0, in the vocabulary."""
    _require_tensor("tokens", tokens)
    if tokens.dim() != 2 or tokens.dtype not in ID_DTYPES or not tokens.numel():
        raise ValueError(
            f"tokens must be int32 or int64 of shape [batch, length], neither of them 0, got "
            f"{_name(tokens.dtype)} {list(tokens.shape)}"
        )
    _check_ids("tokens", tokens, vocab_size)


def check_labels(labels: Tensor, tokens: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `labels` [B, T] fit `tokens` and are token ids, or -100, as int32 or
    int64."""
    _require_tensor("labels", labels)
    if labels.dtype not in ID_DTYPES:
        raise ValueError(f"labels must be int32 or int64, got {_name(labels.dtype)}")
    if labels.shape != tokens.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, not the {list(tokens.shape)} of tokens"
        )
    if labels.device.type == "cpu":
        _check_ids("labels", labels[labels != IGNORE_INDEX], vocab_size)


def check_positions(positions: Tensor | None, tokens: Tensor) -> None:
    """Raise ValueError unless `positions` are [T], [1, T] or [B, T], if there are any."""
    if positions is None:
        return
    batch, length = tokens.shape
    shape = list(torch.as_tensor(positions).shape)
    if shape not in ([length], [1, length], [batch, length]):
        raise ValueError(
            f"positions have shape {shape}; expected [{length}] or {[batch, length]}, one for each "
            "of the tokens"
        )


def checked_divisor(num_trained: int | Tensor | None) -> int | Tensor | None:
    """`num_trained` as a loss divides by it: a tensor of one element without dimensions.

    Raises ValueError for tensors of more and for numbers that are not above 0; a tensor's value is
    not looked at, which would wait for its device.
    """
    if isinstance(num_trained, Tensor):
        if num_trained.numel() != 1:
            raise ValueError(
                f"num_trained must be one number, got a tensor of shape {list(num_trained.shape)}"
            )
        return num_trained.reshape(())
    if num_trained is not None and num_trained <= 0:
        raise ValueError(f"num_trained must be above 0, got {num_trained}")
    return num_trained


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor [batch, length], got a {type(value).__name__}; "
            "torch.tensor(...) makes one of lists of equal length"
        )


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.device.type != "cpu" or not ids.numel():
        return
    least, largest = (int(end) for end in ids.aminmax())
    if least < 0 or largest >= vocab_size:
        outside = least if least < 0 else largest
        raise ValueError(
            f"{name} hold {outside}; the vocabulary has ids from 0 to {vocab_size - 1}"
        )
