"""NEFTune: uniform noise on the embeddings of training rows, which makes answers less of a copy.

    x <- x + alpha / sqrt(T D) u,   u uniform on [-1, 1]; T tokens of the (padded) row, D its width

Jain et al. 2023, https://arxiv.org/abs/2310.05914, with alpha 5 to 15. Evaluation sees no noise.
Drawn from the run's generator, so a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(network: nn.Module, alpha: float | None) -> Iterator[None]:
    """Inside, the network's embedding adds noise while in training mode. No effect for None.

    Raises ValueError for a network without a module named embed_tokens.
    """
    if alpha is None:
        yield
        return
    found = [m for name, m in network.named_modules() if name.split(".")[-1] == "embed_tokens"]
    if len(found) != 1:
        raise ValueError(f"neftune={alpha:g} needs one embed_tokens, the model has {len(found)}")

    def add_noise(module: nn.Module, inputs: Any, embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        size = alpha / math.sqrt(embedded_BTD.shape[-2] * embedded_BTD.shape[-1])
        return embedded_BTD + torch.empty_like(embedded_BTD).uniform_(-size, size)

    handle = found[0].register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
