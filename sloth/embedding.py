"""The rows of a vocabulary: looked up, adapted by LoRA, single ones trained, new ones added.

Shapes: B batch, T tokens, D model, V vocabulary, R rank, k trained rows.

    e(t) = c (E[t] + s B A[:, t])            E [V, D], A [R, V], B [D, R], c the family's scale

`TokenRows` replaces k rows of E, or of an output head, by trained ones [k, D], fp32, and leaves the
others frozen: what a few new tokens need, for k rows in place of V. Names are PEFT's:
`lora_embedding_A`, `lora_embedding_B`, `token_adapter.trainable_tokens_delta` (whole rows, whatever
the name says).
Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; the mean of all rows as a new one's start:
Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sloth.kernels.rows import compute_dtype
from sloth.linear import OpModule


class TokenRows(OpModule):
    """Trained rows in place of some of a frozen matrix [V, D]; they start as those were.

    trainable_tokens_delta: [k, D]. indices: token ids [k], each once, in the order of the rows.
    """

    indices: Tensor

    def __init__(self, weight: Tensor, indices: Sequence[int]) -> None:
        super().__init__()
        ids = torch.tensor(indices, dtype=torch.long, device=weight.device)
        rows = weight.detach()[ids].to(compute_dtype(weight.dtype))
        self.trainable_tokens_delta = nn.Parameter(rows.clone())
        self.register_buffer("indices", ids, persistent=False)

    def lookup(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """rows [..., D] of `tokens` [...], the trained ones put in their places."""
        order = self.indices.argsort()
        ranked = self.indices[order]
        slots = torch.searchsorted(ranked, tokens.to(ranked.dtype))
        slots = order[slots.clamp(max=len(order) - 1)]
        trained = F.embedding(slots, self.trainable_tokens_delta).to(rows.dtype)
        return torch.where((self.indices[slots] == tokens)[..., None], trained, rows)

    def merged(self, weight: Tensor) -> Tensor:
        """The matrix [V, D] with the trained rows in it, in its dtype."""
        return weight.index_copy(0, self.indices, self.trainable_tokens_delta.to(weight.dtype))

    def logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """logits [..., V] of a head without its trained rows -> with them."""
        trained = self.trainable_tokens_delta.to(hidden.dtype)
        own = self.ops.lora_linear(hidden, trained, None, None)
        return logits.index_copy(-1, self.indices, own)


class Embedding(OpModule):
    """Rows of `weight` [V, D] picked by token id, times `scale` rounded to the weight's dtype.

    Gemma was trained with the rounded factor: sqrt(3072) = 55.4 is 55.5 in bf16.
    token_adapter, lora_embedding_A and lora_embedding_B are None without an adapter there.
    """

    token_adapter: TokenRows | None
    lora_embedding_A: nn.Parameter | None
    lora_embedding_B: nn.Parameter | None

    def __init__(self, num_embeddings: int, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_embeddings, dim))
        self.scale = scale
        self.register_module("token_adapter", None)
        self.register_parameter("lora_embedding_A", None)
        self.register_parameter("lora_embedding_B", None)
        self.lora_scale = 1.0
        self.lora_enabled = True

    @property
    def has_lora(self) -> bool:
        """Whether LoRA is attached, switched on or off."""
        return self.lora_embedding_A is not None

    @property
    def lora_factors(self) -> tuple[Tensor, ...]:
        """A and B, none without an adapter."""
        if self.lora_embedding_A is None or self.lora_embedding_B is None:
            return ()
        return self.lora_embedding_A, self.lora_embedding_B

    @property
    def trained_rows(self) -> TokenRows | None:
        """The trained rows, None without any or while the adapter is switched off."""
        return self.token_adapter if self.lora_enabled else None

    def attach_lora(self, rank: int, scale: float) -> None:
        """fp32 A [rank, V] and B [D, rank], zeros until `draw_lora`."""
        vocabulary, dim = self.weight.shape
        device = self.weight.device
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, vocabulary, device=device))
        self.lora_embedding_B = nn.Parameter(torch.zeros(dim, rank, device=device))
        self.lora_scale = scale

    @torch.no_grad()
    def draw_lora(self, generator: torch.Generator) -> None:
        """A zero, B normal, as PEFT starts them."""
        assert self.lora_embedding_A is not None and self.lora_embedding_B is not None
        self.lora_embedding_A.zero_()
        self.lora_embedding_B.normal_(generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.weight)
        A, B = self.lora_embedding_A, self.lora_embedding_B
        if A is not None and B is not None and self.lora_enabled:
            low = self.ops.lora_linear(F.embedding(tokens, A.T), B, None, None)
            rows = (rows + self.lora_scale * low).to(rows.dtype)
        if self.trained_rows is not None:
            rows = self.trained_rows.lookup(tokens, rows)
        if self.scale == 1.0:
            return rows
        scale = torch.tensor(self.scale, dtype=torch.float32, device="cpu")
        return rows * scale.to(rows.dtype).item()

    def merged_weight(self) -> Tensor:
        """The matrix [V, D] with its adapter in it, in fp32 or wider."""
        weight = self.weight.detach().to(compute_dtype(self.weight.dtype))
        A, B = self.lora_embedding_A, self.lora_embedding_B
        if A is not None and B is not None and self.lora_enabled:
            delta = self.lora_scale * (B.detach() @ A.detach()).T
            weight = weight + delta.to(weight.dtype)
        rows = self.trained_rows
        return weight if rows is None else rows.merged(weight).detach()


def with_new_rows(weight: Tensor, num_rows: int, init: str) -> Tensor:
    """The matrix [V, D] with rows up to `num_rows`; those there are kept bit for bit.

    init: "mean" of all rows, in fp32; "normal": with the mean and the deviations of its columns,
    drawn from torch's generator; "zeros".
    """
    grown = weight.new_zeros(num_rows, weight.shape[1])
    grown[: len(weight)] = weight
    fill_rows(grown, range(len(weight), num_rows), len(weight), init)
    return grown


def fill_rows(weight: Tensor, rows: Sequence[int], num_known: int, init: str) -> None:
    """Start `rows` of a matrix from its first `num_known` ones, in place; see `with_new_rows`."""
    known = weight[:num_known]
    mean = known.mean(0, keepdim=True, dtype=torch.float32)
    values = torch.zeros_like(mean) if init == "zeros" else mean
    values = values.expand(len(rows), -1)
    if init == "normal":
        values = values + known.float().std(0) * torch.randn_like(values)
    weight[list(rows)] = values.to(weight.dtype)
