"""A network's mode: what training adds to it, dropout and noise, off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, dropout and noise are off; afterwards, and after an error, as before."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
