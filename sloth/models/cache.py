"""Keys and values of the tokens already read, so that decoding costs one token a step.

Layout: keys and values [B, K, S, E], grown in place inside buffers of the planned length; one
document index per key [B, S] tells left padding (0) from text (1), because padded rows share one
batch.

A cache grows by slices until `fix` is called. From then on the count of tokens lives on the device
and whole buffers are handed out with the `Spans` of them that are seen, so that every step is the
same launches on the same memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sloth.kernels.ops.attention_layout import Spans


class LayerCache:
    """Keys and values of one layer. `append` writes T new positions and returns all so far."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.slot: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """New keys, values [B, K, T, E] -> all of them [B, K, S, E], views of the buffer."""
        batch, heads, new, dim = k_BKTE.shape
        if self.slot is not None:
            assert self._keys is not None and self._values is not None
            self._keys.index_copy_(2, self.slot, k_BKTE)
            self._values.index_copy_(2, self.slot, v_BKTE)
            return self._keys, self._values
        if self._keys is None or self._values is None:
            self._keys = k_BKTE.new_empty(batch, heads, self.capacity, dim)
            self._values = torch.empty_like(self._keys)
        end = self.length + new
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} were written")
        self._keys[:, :, self.length : end] = k_BKTE
        self._values[:, :, self.length : end] = v_BKTE
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def fix(self, slot: Tensor) -> None:
        """Write one token a step from now on, at `slot` [1] int64, and return whole buffers."""
        assert self._keys is not None and self._values is not None, "a prompt comes first"
        # Slots that are not written yet count for nothing, and nothing times NaN is NaN.
        self._keys[:, :, self.length :] = 0
        self._values[:, :, self.length :] = 0
        self.slot = slot


class KVCache:
    """One `LayerCache` per layer and the document index of every key.

    capacity: tokens that fit, prompt and answer together.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]
        self.documents: Tensor | None = None
        self.spans: Spans | None = None

    @property
    def length(self) -> int:
        """Tokens written so far."""
        return self.layers[0].length

    def extend_documents(self, documents_BT: Tensor) -> Tensor:
        """Append the document indices of T new tokens; returns those of all keys [B, S]."""
        parts = [documents_BT] if self.documents is None else [self.documents, documents_BT]
        self.documents = torch.cat(parts, dim=1)
        return self.documents

    def fix(self, first_B: Tensor) -> Spans:
        """From here on, one token a step, at the slot that `spans.last` names: the caller counts.

        first_B: int32, the slot where each row's text begins.
        """
        last = torch.tensor([self.length], dtype=torch.long, device=first_B.device)
        self.spans = Spans(first_B, last)
        for layer in self.layers:
            layer.fix(last)
        return self.spans
