"""The steps of decoding after the prompt: one token for every row, by one of two ways.

`GrowingStep` appends to the cache and attends over slices of it: the least work for a CPU.

`FixedStep` works on memory that stays where it is, so that a GPU replays it as one CUDA graph. A
step of one token a row is a thousand small launches, for which the host needs longer than the
device does for the work. All that changes from step to step lies on the device (the tokens, their
positions, the newest slot of the cache), so the launches are recorded once and replayed as one.

Bytes of a step: every weight once and the written keys and values; at 8 billion parameters 16 GB
of copies in bf16, 5 ms on an H100, or for one row 4.7 GB in NF4 (`ops/nf4_matvec.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for
from sloth.models.cache import KVCache
from sloth.models.decoder import Decoder

PAD_DOCUMENT, TEXT_DOCUMENT = 0, 1

# Token ids [B, 1] -> logits [B, V] of what follows them.
Step = Callable[[Tensor], Tensor]


def start_decoding(network: Decoder, cache: KVCache, positions_B1: Tensor) -> Step:
    """The step for this network and a cache that holds the prompts, padded on the left.

    positions_B1: of the tokens that come next.
    """
    weight = network.model.embed_tokens.weight
    if engine_for(weight) != "triton" or weight.device != network.device:
        return GrowingStep(network, cache, positions_B1)
    step = FixedStep(network, cache, positions_B1)
    step.record()
    return step


class GrowingStep:
    """One token for every row, the cache growing with each."""

    def __init__(self, network: Decoder, cache: KVCache, positions_B1: Tensor) -> None:
        self.network, self.cache, self.positions = network, cache, positions_B1

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        if self.cache.documents is not None:
            self.cache.extend_documents(torch.full_like(tokens_B1, TEXT_DOCUMENT))
        hidden = self.network.hidden_states(tokens_B1, self.positions, self.cache)
        self.positions = self.positions + 1
        return self.network.head(hidden)[:, 0]


class FixedStep:
    """One token for every row, on a cache whose buffers stay as they are."""

    def __init__(self, network: Decoder, cache: KVCache, positions_B1: Tensor) -> None:
        self.network, self.cache = network, cache
        self.tokens = torch.zeros_like(positions_B1)
        self.positions = positions_B1.clone()
        self.spans = cache.fix(_text_starts(cache, positions_B1))
        self._next: Callable[[], Tensor] = self._run

    def __call__(self, tokens_B1: Tensor) -> Tensor:
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


def _text_starts(cache: KVCache, positions_B1: Tensor) -> Tensor:
    """int32 [B]: the slot where each row's text begins."""
    if cache.documents is None:
        return positions_B1.new_zeros(len(positions_B1), dtype=torch.int32)
    return (cache.documents == PAD_DOCUMENT).sum(1).int()
