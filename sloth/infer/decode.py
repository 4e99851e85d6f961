"""A step of decoding on memory that stays where it is: replayed as one CUDA graph on a GPU.

A step of one token a row is a thousand small launches, and the host needs longer for them than the
device. All that changes from step to step lies on the device (the tokens, their positions, the
newest slot of the cache), so the launches can be recorded once and replayed as one.

Bytes of a step: every weight once and the written keys and values, so at 8 billion parameters in
bf16 16 GB, 5 ms on an H100.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sloth.models.cache import KVCache
from sloth.models.decoder import Decoder


class DecodeStep:
    """One token for every row of a cache that holds their prompts.

    positions_B1: of the tokens that come next. first_B: int32, the slot where each row begins.
    """

    def __init__(
        self, network: Decoder, cache: KVCache, positions_B1: Tensor, first_B: Tensor
    ) -> None:
        self.network, self.cache = network, cache
        self.tokens = torch.zeros_like(positions_B1)
        self.positions = positions_B1.clone()
        self.spans = cache.fix(first_B)
        self._next: Callable[[], Tensor] = self._run

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        """Token ids [B, 1] -> logits [B, V] of what follows them."""
        self.tokens.copy_(tokens_B1)
        return self._next()

    def _run(self) -> Tensor:
        hidden = self.network.hidden_states(self.tokens, self.positions, self.cache)
        logits = self.network.head(hidden)[:, 0]
        self.positions += 1
        self.spans.last.add_(1)
        return logits

    def record(self) -> None:
        """Replay the step as a CUDA graph from now on. Everything must lie on one GPU."""
        before = self.positions.clone(), self.spans.last.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, lets libraries take their memory
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._rewind(*before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()
        self._rewind(*before)

        def replay() -> Tensor:
            graph.replay()
            return logits

        self._next = replay

    def _rewind(self, positions: Tensor, last: Tensor) -> None:
        """Forget steps that were only tried; what they wrote will be written again."""
        self.positions.copy_(positions)
        self.spans.last.copy_(last)
