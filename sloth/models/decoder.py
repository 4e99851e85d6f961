"""The shell all decoder-only models share: embed, block loop, final norm, head, loss.

The architecture's own file builds the blocks and says what differs per layer (`LayerSpec`); this
one prepares what a block needs beside its input (rotary tables, who sees whom) once per forward
pass, and runs the loop through one seam, `run_block`, where a fused twin, recompute or offload
plugs in. Shapes: B batch, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sloth.constants import IGNORE_INDEX
from sloth.embedding import Embedding, TokenRows
from sloth.kernels.ahead import compile_ahead
from sloth.kernels.context import BlockContext, Keep
from sloth.kernels.dispatch import Level, ops_of, twin_of, wiring_of
from sloth.kernels.engine import engine_for
from sloth.kernels.fp8 import BaseCompute
from sloth.kernels.layer import Workspace
from sloth.kernels.ops.attention_layout import AttentionLayout, document_bounds, index_bounds
from sloth.kernels.ops.linear_cross_entropy import CHUNK_BYTES, TrainedRows
from sloth.kernels.ops.lora_linear import row_gains
from sloth.kernels.recording import Recorder
from sloth.linear import Linear, OpModule, Projection
from sloth.models.cache import KVCache
from sloth.models.config import LayerSpec
from sloth.models.own_dtype import in_own_dtype
from sloth.models.rope import Rope

RunBlock = Callable[[nn.Module, Tensor, BlockContext], Tensor]
# (rows B, tokens T) -> what each fused layer keeps for its backward.
ChooseKeeps = Callable[[int, int], Sequence[Keep]]


class RMSNorm(OpModule):
    """y = x / rms(x) * weight; `offset` 1 stores the weight less one."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + delta), residual + delta)."""
        return self.ops.add_rms_norm(delta, residual, self.weight, self.eps, self.offset)


class DecoderStack(nn.Module):
    """Holds `embed_tokens`, `layers` and `norm` under Hugging Face's prefix `model.`."""

    def __init__(self, embed_tokens: Embedding, layers: list[nn.Module], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class Decoder(OpModule):
    """A causal language model. Subclasses fill `model`, `lm_head` (None when tied) and `specs`.

    model_type: config.json's; it names the fused twin. final_softcap: c, for logits bent to
    c tanh(logits / c); None for plain ones. base_compute: what the fused level's products with
    frozen matrices run on, read by `set_level`. head_chunk_bytes: of logits that `loss` holds at a
    time, a plan's choice; None for the least that is quick.
    """

    model_type: str
    lm_head: Projection | None
    final_softcap: float | None = None
    base_compute: BaseCompute = None
    head_chunk_bytes: int | None = None

    def __init__(
        self, config: Any, model: DecoderStack, lm_head: Projection | None, specs: list[LayerSpec]
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.register_module("lm_head", lm_head)
        self.specs = specs
        self._ropes = {spec.rope: Rope(spec.rope) for spec in specs if spec.rope}
        self.run_block: RunBlock = run_plain
        self.planner: ChooseKeeps | None = None
        self._head_is_shared = False
        self._use(Workspace())

    def _use(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.recorder = Recorder(self._run_layers, list(self.model.layers), workspace)

    def release(self) -> None:
        """Give back what fused layers prepared: scratch, layers that stay unpacked, recordings."""
        self.workspace.clear()
        self.recorder.forget()

    @property
    def device(self) -> torch.device:
        """Where the layers compute; the embedding alone may wait in host memory."""
        return self.model.norm.weight.device

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding matrix."""
        return self.lm_head is None

    @property
    def shares_embedding(self) -> bool:
        """Whether the head computes from the embedding's memory; known on the meta device, too."""
        if self.lm_head is None:
            return True
        head: Any = self.lm_head.base
        same = head.is_meta or head.data_ptr() == self.model.embed_tokens.weight.data_ptr()
        return self._head_is_shared and same

    def untie(self, share: bool = False) -> None:
        """Give the head a matrix of its own, equal to the embedding's; for training one apart.

        share: in the same memory, where neither is trained but by an adapter.
        """
        if self.lm_head is not None:
            return
        vocabulary, dim = self.model.embed_tokens.weight.shape
        with torch.device("meta"):
            head = Linear(dim, vocabulary)
        weight = self.model.embed_tokens.weight
        values = weight.detach() if share else weight.detach().clone()
        head.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        head.ops = self.ops
        head.train(self.training)
        self.lm_head, self._head_is_shared = head, share

    def set_level(self, level: Level) -> None:
        """Run at a kernel level: op table for every module, fused twin in the block loop."""
        for module in self.modules():
            if isinstance(module, OpModule):
                module.ops = ops_of(level)
        self._use(Workspace(self.base_compute))
        self.run_block = run_plain
        if level == "fused":
            self.run_block = run_fused(self.model_type, self.workspace)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Inside, nothing is computed with `base_compute`: blocks run as their model file writes
        them where it is set."""
        before = self.run_block
        if self.base_compute is not None:
            self.run_block = run_plain
        try:
            yield
        finally:
            self.run_block = before

    @in_own_dtype
    def hidden_states(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D] after the final norm.

        positions: [T] or [B, T]; where they restart at 0 a new document begins, unseen by and blind
        to the others. On the host as a rule: kernels are sized by the documents, so positions on a
        GPU are waited for. Default: 0.., after what the cache holds.
        """
        tokens = tokens.to(self.model.embed_tokens.weight.device)
        hidden = self.model.embed_tokens(tokens).to(self.device)
        contexts = self.contexts(hidden, positions, cache)
        fused = self.run_block is not run_plain  # what is recorded are the twins
        run = self.recorder if fused else self._run_layers
        return self.model.norm(run(hidden, contexts))

    def _run_layers(self, hidden: Tensor, contexts: Sequence[BlockContext]) -> Tensor:
        for block, context in zip(self.model.layers, contexts, strict=True):
            hidden = self.run_block(block, hidden, context)
        return hidden

    @in_own_dtype
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        if self.lm_head is None:
            tied = self.model.embed_tokens.weight
            logits = self.ops.lora_linear(hidden, tied, None, None)
        else:
            logits = self.lm_head(hidden)
        if self._trained_rows is not None:
            logits = self._trained_rows.logits(hidden, logits)
        if self.final_softcap is None:
            return logits
        return torch.tanh(logits / self.final_softcap) * self.final_softcap

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V] in the compute dtype."""
        return self.head(self.hidden_states(tokens, positions, cache))

    @in_own_dtype
    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        num_trained: int | Tensor | None = None,
    ) -> Tensor:
        """Summed next-token cross-entropy over labels that are not -100, over their number, fp32.

        The shift happens here: position t predicts labels[t + 1]. With positions, the first token
        of a document is never a target, so packed documents give the loss they give apart.
        num_trained: the divisor, when a step spans several calls.
        """
        targets = self._targets(labels, positions)
        rows = TrainedRows(targets)
        hidden, weight = self._head_operands(self.hidden_states(tokens, positions))
        return self.ops.linear_cross_entropy(
            *(hidden.flatten(0, 1), weight, targets, num_trained, self.final_softcap, rows),
            self.head_chunk_bytes or CHUNK_BYTES,
        )

    @in_own_dtype
    def logprobs(
        self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """log p(labels[t + 1] | tokens up to t), fp32 [B, T - 1]; labels: the tokens themselves.

        0 where a label is -100, and at the first token of a document: there nothing is computed.
        """
        targets = self._targets(tokens if labels is None else labels, positions)
        rows = TrainedRows(targets)
        hidden, weight = self._head_operands(self.hidden_states(tokens, positions))
        log_probs = self.ops.linear_log_probs(
            hidden.flatten(0, 1), weight, targets, self.final_softcap, rows
        )
        return log_probs.view(tokens.shape)[:, :-1]

    def _targets(self, labels: Tensor, positions: Tensor | None) -> Tensor:
        """What each of the B T positions predicts; -100 for nothing."""
        labels = labels.to(self.device)
        if labels.dtype == torch.int32:  # torch's own cross-entropy takes int64 alone
            labels = labels.long()
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if positions is not None:
            starts = torch.as_tensor(positions, device=self.device).expand_as(labels) == 0
            targets[:, :-1].masked_fill_(starts[:, 1:], IGNORE_INDEX)
        return targets.flatten()

    def _head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and matrix whose product is the logits.

        A head with LoRA is one wider product: h W^T + s (h A^T) B^T = [h, s h A^T] [W, B]^T; DoRA
        multiplies the rows of [W, B].
        """
        rows = self._trained_rows
        if self.lm_head is None:
            tied = self.model.embed_tokens.weight
            return hidden, tied if rows is None else rows.merged(tied)
        weight, lora = self.lm_head.base, self.lm_head.lora
        assert isinstance(weight, Tensor), "the head is never quantized"
        if lora is None:
            return hidden, weight if rows is None else rows.merged(weight)
        dropped = nn.functional.dropout(hidden, lora.dropout, self.lm_head.training)
        low = lora.scale * self.ops.lora_linear(dropped, lora.A.to(hidden.dtype), None, None)
        wide = torch.cat((weight, lora.B.to(weight.dtype)), -1)
        gains = row_gains(weight, lora, weight.dtype)
        if gains is not None:  # of the magnitudes autograd takes the gradient
            wide = (wide * gains[:, None]).to(wide.dtype)
        return torch.cat((hidden, low), -1), wide

    @property
    def _trained_rows(self) -> TokenRows | None:
        """Rows of the head that are trained in place of its matrix's: a tied one's embedding's."""
        if self.lm_head is None:
            return self.model.embed_tokens.trained_rows
        return self.lm_head.token_adapter if self.lm_head.lora_enabled else None

    def contexts(
        self, hidden: Tensor, positions: Tensor | None, cache: KVCache | None
    ) -> list[BlockContext]:
        """One context per layer; layers with equal specs share tables and layout."""
        batch, length, _ = hidden.shape
        past = cache.length if cache else 0
        windows = {spec.window for spec in self.specs}
        layouts = {window: AttentionLayout(window=window) for window in windows}
        are_standard = positions is None
        if positions is None:
            positions = torch.arange(past, past + length, device=hidden.device)[None]
        else:
            positions = torch.as_tensor(positions)
            positions = positions[None] if positions.dim() == 1 else positions
            if cache is None:
                bounds = document_bounds(positions.expand(batch, length), hidden.device)
                layouts = {window: AttentionLayout.of(bounds, window) for window in windows}
            positions = positions.to(hidden.device)
        if cache is not None and cache.documents is not None:
            keys = cache.documents
            if past:
                queries = keys[:, past : past + length]
                layouts = {window: AttentionLayout(queries, keys, window) for window in windows}
            else:  # a whole prompt, of which kernels may know the bounds instead of a mask
                bounds = index_bounds(keys, hidden.device)
                layouts = {window: AttentionLayout.of(bounds, window) for window in windows}
        if cache is not None and cache.spans is not None:
            layouts = {w: AttentionLayout(window=w, spans=cache.spans) for w in windows}
        tables = {
            # with a cache rows are prompts, which do not depend on their neighbours
            parameters: rope.tables(positions, hidden.dtype, alone=cache is not None)
            for parameters, rope in self._ropes.items()
        }
        scales = {
            spec.query_scale: spec.query_scale.table(positions, hidden.dtype)
            for spec in self.specs
            if spec.query_scale
        }
        keeps = self.planner(batch, length) if self.planner and not cache else None
        if keeps and keeps[0].recorded and not are_standard:  # a replay reads tables of its own
            keeps = [replace(keep, recorded=False) for keep in keeps]
        contexts = []
        for index, spec in enumerate(self.specs):
            cos, sin = tables[spec.rope] if spec.rope else (None, None)
            layer_cache = cache.layers[index] if cache else None
            keep = keeps[index] if keeps else Keep()
            scale = scales[spec.query_scale] if spec.query_scale else None
            layout = layouts[spec.window]
            contexts.append(BlockContext(cos, sin, layout, layer_cache, keep, scale))
        return contexts


def run_plain(block: nn.Module, hidden: Tensor, context: BlockContext) -> Tensor:
    """The block as its model file writes it."""
    return block(hidden, context)


def run_fused(model_type: str, workspace: Workspace) -> RunBlock:
    """The family's fused twin, in a workspace.

    Decoding keeps its cache in the plain block: one token a step has nothing to fuse for.
    """
    twin, wiring = twin_of(model_type), wiring_of(model_type)
    is_compiled = False

    def run(block: nn.Module, hidden: Tensor, context: BlockContext) -> Tensor:
        nonlocal is_compiled
        if context.cache is not None:
            return block(hidden, context)
        ours = hidden.is_cuda and engine_for(hidden) == "triton"
        if ours and not is_compiled and torch.is_grad_enabled():
            is_compiled = True
            compile_ahead(twin, block, hidden, context, workspace, wiring)
        return twin(block, hidden, context, workspace)

    return run
