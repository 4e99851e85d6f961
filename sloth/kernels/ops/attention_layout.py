"""Who sees whom in attention, beyond causal order: packed documents, sliding windows, and which
slots of a cache are written.

Shapes: B batch, T queries, S keys (the last T of S positions are the queries'), H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Alignment of an attention bias's rows for the memory-efficient kernel, in elements.
_BIAS_ALIGNMENT = 16


@dataclass(frozen=True)
class DocumentBounds:
    """Where the documents of a packed batch [B, T] begin and end.

    cumulative: int32 [documents + 1], first tokens in the flattened batch, B T last. longest: the
    most tokens of a document. first, last: int32 [B, T], of each token's document, in its row.
    """

    cumulative: Tensor
    longest: int
    first: Tensor
    last: Tensor


def document_bounds(positions_BT: Tensor, device: torch.device) -> DocumentBounds | None:
    """Bounds of documents that begin where positions are 0; None if no row holds more than one.

    Read on the host, so that kernels know their sizes: positions on a GPU are waited for.
    """
    return _bounds(positions_BT.cpu() == 0, device)


def index_bounds(documents_BT: Tensor, device: torch.device) -> DocumentBounds | None:
    """The same of documents that are told by an index, such as left padding and the text behind."""
    documents = documents_BT.cpu()
    return _bounds(documents != documents.roll(1, 1), device)


def _bounds(starts: Tensor, device: torch.device) -> DocumentBounds | None:
    """starts: bool [B, T] on the host, True where a document begins; the first column is one."""
    starts[:, 0] = True
    if int(starts.sum()) == len(starts):
        return None
    length = starts.shape[1]
    at = torch.arange(length).expand_as(starts)
    first = torch.where(starts, at, 0).cummax(1).values
    ends = torch.cat((starts[:, 1:], torch.ones_like(starts[:, :1])), 1)
    last = torch.where(ends, at, length).flip(1).cummin(1).values.flip(1)
    flat = starts.flatten().nonzero()[:, 0]
    cumulative = torch.cat((flat, torch.tensor([starts.numel()]))).int()
    longest = int(cumulative.diff().max())
    return DocumentBounds(
        *(cumulative.to(device, non_blocking=True), longest),
        *(first.int().to(device), last.int().to(device)),
    )


@dataclass(frozen=True)
class Spans:
    """Which slots of a cache each row sees. first [B] int32; last [1] int64, the newest slot."""

    first: Tensor
    last: Tensor

    def mask(self, num_slots: int, window: int | None) -> Tensor:
        """bool [B, 1, 1, S], True where seen."""
        slots = torch.arange(num_slots, device=self.last.device)
        seen = slots <= self.last
        if window is not None:
            seen = seen & (self.last - slots < window)
        return (seen & (slots >= self.first[:, None]))[:, None, None]


@dataclass(frozen=True)
class AttentionLayout:
    """Who sees whom beyond causal order.

    query_documents [B, T], key_documents [B, S]: document index of each token, both None for one
    document a row. window: keys a query sees, itself included; None for all. bounds: of the
    documents, where T == S. spans: the keys are a cache of S slots that these bound, T is 1.
    """

    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    window: int | None = None
    bounds: DocumentBounds | None = None
    spans: Spans | None = None
    _masks: dict[Any, Tensor | None] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError(
                "AttentionLayout: give the documents of queries and of keys, or neither"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"AttentionLayout: window {self.window} would hide a token from itself"
            )

    @classmethod
    def of(cls, bounds: DocumentBounds | None, window: int | None) -> AttentionLayout:
        """The layout of packed rows, T == S."""
        if bounds is None:
            return cls(window=window)
        return cls(bounds.first, bounds.first, window, bounds)

    def is_plain(self, num_queries: int, num_keys: int) -> bool:
        """Whether top-left causal order (T == S), or no mask at all (T == 1), says it all."""
        one_document = self.query_documents is None and self.spans is None
        window_is_wide = self.window is None or self.window >= num_keys
        return one_document and window_is_wide and num_queries in (1, num_keys)

    def dense_mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """bool [B or 1, 1, T, S], True where seen; None where `is_plain`.

        Made once per layout and shared by its layers.
        """
        key = (num_queries, num_keys)
        if key not in self._masks:
            plain = self.is_plain(*key)
            self._masks[key] = None if plain else self._build_mask(num_queries, num_keys, device)
        return self._masks[key]

    def bias(self, q_BHTE: Tensor, k_BKSE: Tensor) -> Tensor | None:
        """`dense_mask` as an additive bias, 0 or -inf, [B, H, T, S] in q's dtype; cached like it.

        Rows lie a multiple of 16 elements apart, which the memory-efficient CUDA kernel asks for.
        """
        (batch, heads, num_queries, _), num_keys = q_BHTE.shape, k_BKSE.shape[2]
        key = (num_queries, num_keys, q_BHTE.dtype)
        if key not in self._masks:
            mask = self.dense_mask(num_queries, num_keys, q_BHTE.device)
            self._masks[key] = None if mask is None else _additive(mask, q_BHTE.dtype)
        bias = self._masks[key]
        return None if bias is None else bias.expand(batch, heads, -1, -1)

    def _build_mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        if self.spans is not None:
            return self.spans.mask(num_keys, self.window)
        queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        keys = torch.arange(num_keys, device=device)[None]
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (queries - keys < self.window)
        seen = seen[None, None]
        if self.query_documents is not None and self.key_documents is not None:
            same = self.query_documents[:, :, None] == self.key_documents[:, None, :]
            seen = seen & same[:, None]
        return seen


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    num_keys = mask.shape[-1]
    padded = -(-num_keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    bias = torch.full((*mask.shape[:-1], padded), -torch.inf, dtype=dtype, device=mask.device)
    bias[..., :num_keys].masked_fill_(mask, 0.0)
    return bias[..., :num_keys]
