"""How much memory a training step of a fused network takes, tensor by tensor.

The peak of a step is the largest of a few moments: while a layer runs forward, while the head
computes the loss, while a layer runs backward. Each adds what is always there (weights, LoRA with
gradients and moments, scratch), what the layers so far keep, and what the layer at work holds
beside it; the lists below follow `kernels/llama.py` and `gemma2.py` line by line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from sloth.kernels.context import Keep
from sloth.kernels.ops.dora_gains import SPAN as GAINS_SPAN
from sloth.kernels.ops.glu_lora import MAX_RANK as FUSED_RANK
from sloth.kernels.ops.glu_lora import MIN_RANK, SPAN
from sloth.kernels.ops.linear_cross_entropy import CHUNK_BYTES
from sloth.kernels.ops.thin_products import MAX_RANK
from sloth.kernels.rows import next_power_of_2
from sloth.kernels.stack_shape import padded
from sloth.train.network_sizes import NetworkSizes

# What the vendor's products set aside: a workspace in the forward's thread and in the backward's.
WORKSPACES = 2 * 32 * 2**20
# Sizes of a chunk of logits that a head may work with, where they cost no memory, or, beside a
# recording, this share of its tensors.
_HEAD_CHUNKS = (2**30, 2**29, 2**28)
_BESIDE_RECORDING = 1 / 32
# Of what is handed out, what the allocator reserves beyond it: 2 to 4.9% measured (8B, 8 to 36 GiB,
# H100 and H200); and of the largest tensor, which free memory in pieces cannot hold, once where it
# comes once a layer, and more often where tiles of the MLP leave holes between what is kept (1.6
# times seen at 1 x 32768 in 14.2 GiB).
FRAGMENTATION = 0.045
_HOLES, _HOLES_BETWEEN_TILES = 1.0, 1.75
# Offloaded layers that may still be on their way out.
_LEAVING = 2


class StepMemory:
    """Predicted bytes of a step on `batch` rows of `seq` tokens.

    host_bytes: what may wait in host memory; more of it counts as not fitting. None: no limit.
    """

    def __init__(
        self, sizes: NetworkSizes, batch: int, seq: int, host_bytes: float | None = None
    ) -> None:
        self.sizes, self.batch, self.seq = sizes, batch, seq
        self.rows, self.host_bytes = batch * seq, host_bytes
        self._known: dict[Keep, tuple[int, int, int]] = {}

    # -- what is there all the time --------------------------------------------------------------

    def static_parts(self, keeps: Sequence[Keep], embedding_on_host: bool) -> dict[str, int]:
        """Name -> bytes that do not depend on the batch.

        The gradients are those of the whole adapter: a step of several passes, as one becomes when
        memory runs out, holds them from its second pass on. In a step of one pass they come when
        the peak is over, and it is up to 4 bytes a trained element lower: 5% at r = 256.
        """
        s = self.sizes
        num_resident = sum(keep.resident for keep in keeps)
        parts = {
            "weights": s.weights + (0 if embedding_on_host else s.embedding),
            "gradients and moments": 12 * s.trainable,
            "scratch": self._scratch_bytes(),
            "unpacked layers": num_resident * s.layer_scratch,
            "workspaces": WORKSPACES,
        }
        return parts | ({"copies in 8 bits": s.num_layers * s.fp8_copies} if s.fp8 else {})

    def _scratch_bytes(self) -> int:
        """Of matrices unpacked, or copied for DoRA's gains, into what all layers share; other dense
        ones live in scratch of their own, whose padding alone is new. DoRA: three numbers and a
        squared norm a row, and what taking them holds. With copies in 8 bits, of A and B alone."""
        s, total = self.sizes, 0
        parts = zip(s.stack_sizes, s.ranks, s.stack_scratch, s.dora, s.shapes, strict=True)
        for (outputs, inputs), rank, scratch, is_dora, shapes in parts:
            if s.fp8:
                total += shapes * (outputs + inputs) * rank * s.element
            elif s.quantized or is_dora:
                total += shapes * scratch
            else:
                total += s.num_layers * (scratch - outputs * inputs * s.element)
            if is_dora:
                total += 4 * outputs * (4 * s.num_layers + max(3, -(-inputs // GAINS_SPAN)) * rank)
        return total

    # -- what a layer keeps ----------------------------------------------------------------------

    def kept_bytes(self, keep: Keep) -> int:
        """Bytes a layer keeps on the device from its forward to its backward."""
        s, rows = self.sizes, self.rows
        width = 0 if keep.offload else self.movable_width(keep)
        width += sum(s.ranks) + (keep.gate + keep.up) * s.ffn
        return rows * (width * s.element + keep.attention * self._lse_bytes() + self._rstd_bytes)

    def movable_width(self, keep: Keep) -> int:
        """Elements a token of what may wait in host memory."""
        s = self.sizes
        width = s.hidden + self._keeps_down * s.hidden  # the input; the output of down_proj
        return width + keep.qkv * s.qkv + keep.attention * s.queries + keep.hidden * s.hidden

    @property
    def _keeps_down(self) -> bool:
        return self.sizes.post_norms or self.sizes.dora[3]

    @property
    def _turned_width(self) -> int:
        """q and k after RoPE beside those before it, which norms of them or DoRA want again."""
        s = self.sizes
        return (s.dora[0] or s.qk_norms) * (s.queries + (s.qkv - s.queries) // 2)

    @property
    def _input_tails(self) -> tuple[int, ...]:
        """Columns behind the inputs of the stacks, for LoRA's part of one wide product."""
        return tuple(0 if self.sizes.fp8 else rank for rank in self.sizes.ranks)

    @property
    def _copied_o(self) -> int:
        """Of attention's output with room for a tail, where o_proj has one."""
        s = self.sizes
        return padded(s.queries + self._input_tails[1]) if s.ranks[1] or s.fp8 else 0

    @property
    def _rstd_bytes(self) -> int:
        """What each norm divides a token by, fp32."""
        return 4 * (4 if self.sizes.post_norms else 2)

    @property
    def _attention_sums(self) -> int:
        """Elements a token that a flash kernel's backward works in: dq in fp32, and dk and dv of
        every query head where several share one."""
        s = self.sizes
        grouped = s.qkv < 3 * s.queries
        return s.queries * (4 // s.element + 2 * grouped)

    def _lse_bytes(self) -> int:
        return 4 * self.sizes.heads

    # -- what a layer holds while it works -------------------------------------------------------

    def forward_bytes(self, keep: Keep) -> int:
        """The most a layer's forward holds beside its input and what earlier layers keep."""
        s, rows = self.sizes, self.rows
        q, o, g, d = s.ranks
        q_in, o_in, g_in, d_in = self._input_tails
        tile = min(keep.tile_tokens or rows, rows)
        kept = keep.qkv * s.qkv + keep.attention * s.queries + q + o
        moments = (
            rows * (padded(s.hidden + q_in) + s.qkv + q),
            rows * (s.qkv + self._turned_width + s.queries + q),
            rows * (s.qkv + s.queries + self._copied_o + s.hidden + q + o),
            rows * (kept + 2 * s.hidden + padded(s.hidden + g_in)),
            rows * (kept + (2 + s.post_norms * keep.hidden) * s.hidden + g + d)
            + tile * (padded(s.hidden + g_in) + 2 * s.ffn + padded(s.ffn + d_in))
            + (tile * s.hidden if tile < rows else 0)
            + (rows * s.hidden if s.dora[1] or s.dora[3] else 0),
        )
        casts = (rows * s.hidden, 0, rows * s.queries, 0, tile * s.ffn)
        held = [m * s.element + s.fp8 * c for m, c in zip(moments, casts, strict=True)]
        return max(*held, s.fp8_casting) + rows * self._lse_bytes()

    def backward_bytes(self, keep: Keep) -> int:
        """The most a layer's backward holds beside what it and earlier layers keep."""
        s, rows = self.sizes, self.rows
        q, o, g, d = s.ranks
        _, o_in, g_in, _ = self._input_tails
        tile = min(keep.tile_tokens or rows, rows)
        arriving = rows * s.hidden  # dy
        # Products that are made again come with their X A^T, beside the one that was kept.
        remade = (not keep.qkv) * (s.qkv + q) + (not keep.attention) * s.queries
        remade_h = (not keep.hidden) * (s.hidden + o)
        into_h = mlp_h = rows * padded(s.hidden + o)  # dh
        if s.post_norms:  # its room comes apart, when h is gone, which is always made again
            into_h, mlp_h = rows * s.hidden, rows * 2 * s.hidden
        to_h = rows * (remade + self._copied_o + s.hidden)
        mlp_tile = padded(s.hidden + d) + padded(2 * s.ffn + g)
        # The MLP's input is made again where gate or up is, or, once the gradient of gate times up
        # is gone, where its sum with V is not formed on the way (`ops/thin_products.py`).
        n2, n2_late = padded(s.hidden + g_in), 0
        sums_apart = g > MAX_RANK or s.element > 2
        if not keep.up:
            mlp_tile += n2
        elif sums_apart:
            n2_late = n2 * s.element
        # DoRA reads gate and up beside their gradients, where its dots do not come along with sums
        # (`ops/glu_lora.py`), and P_o's output beside h.
        apart = s.dora[2] * (not keep.up) * (sums_apart or d > MAX_RANK) * 2 * s.ffn
        remade_h += s.dora[1] * s.hidden
        mlp = rows * (remade + remade_h) + mlp_h + tile * (mlp_tile + apart)
        # The gradient of gate times up; in 8 bits, or what is made again before it finds its place,
        # or the MLP's input's gradient beside the cast one of gate and up.
        mlp_works = [s.ffn * s.element + s.fp8 * s.hidden, n2_late + s.hidden * s.element]
        if s.fp8:
            again = ((not keep.gate) + (not keep.up)) * s.ffn
            mlp_works += [again * s.element + s.hidden]
            mlp_works += [n2_late + s.hidden * s.element + 2 * s.ffn]
        # Attention: do and dq, dk, dv; with what its kernel sums in, then with the stacked dqkv.
        turned = self._turned_width + s.queries + s.qkv
        turned += max(self._attention_sums, s.qkv + padded(s.qkv + q))
        attention = rows * (remade + turned) + into_h
        end = rows * (padded(s.qkv + q) + 3 * s.hidden) + into_h
        held = max(
            to_h * s.element + s.fp8 * rows * s.queries,
            mlp * s.element + tile * max(mlp_works) + self._mlp_sums(tile),
            end * s.element + s.fp8 * rows * s.qkv,
            attention * s.element,
        )
        # What comes back for this layer, and for the next one ahead.
        offloaded = 2 * rows * self.movable_width(keep) if keep.offload else 0
        return held + (arriving + offloaded) * s.element + rows * self._lse_bytes()

    def _mlp_sums(self, tile: int) -> int:
        """Sums over rows of the MLP's adapters, fp32, before they are gradients: in parts where
        they are formed on the way (`ops/glu_lora.py`), with B's of gate and up added up; those
        alone where they are not. With DoRA the dots of gate and up come along."""
        s = self.sizes
        rank = s.mlp_rank
        if rank > FUSED_RANK or s.element > 2:
            return 4 * 2 * rank * s.ffn
        columns = max(next_power_of_2(rank), MIN_RANK) if rank else 0
        dots = 2 * s.dora[2]
        return 4 * (-(-tile // SPAN) * (3 * columns + dots) + 2 * columns + dots) * s.ffn

    def head_bytes(self, chunk_bytes: int = CHUNK_BYTES) -> int:
        """Final norm, gathered rows, their gradient, a chunk of logits, the head's gradient."""
        s = self.sizes
        chunk = max(chunk_bytes, s.vocab * s.element)
        logits = min(chunk, self.rows * s.vocab * s.element)
        return 4 * self.rows * s.hidden * s.element + logits + s.head_gradient

    # -- the peak --------------------------------------------------------------------------------

    def parts(self, keeps: Sequence[Keep], embedding_on_host: bool) -> dict[str, int]:
        """Name -> bytes at the moment of the peak."""
        parts = self.static_parts(keeps, embedding_on_host)
        kept, working = self._worst_moment(keeps)
        return parts | {"kept by layers": kept, "working set": working}

    def peak(self, keeps: Sequence[Keep], embedding_on_host: bool) -> float:
        """Bytes at the worst moment of a step; infinite where the host cannot hold its share."""
        if self.host_bytes is not None and self.host_share(keeps) > self.host_bytes:
            return math.inf
        return sum(self.parts(keeps, embedding_on_host).values())

    def claimed(self, keeps: Sequence[Keep], embedding_on_host: bool) -> float:
        """The peak, and what holes between large tensors cost beyond the usual share of it."""
        peak = self.peak(keeps, embedding_on_host)
        tiles = [keep.tile_tokens for keep in keeps if keep.tile_tokens is not None]
        rows = min(max(tiles, default=self.rows), self.rows)
        element = self.sizes.element
        tile = rows * padded(2 * self.sizes.ffn + self.sizes.ranks[2]) * element
        holes = tile * (_HOLES_BETWEEN_TILES if rows < self.rows else _HOLES)
        holes = max(holes, self.rows * self._attention_sums * element * _HOLES)
        return peak + max(holes - FRAGMENTATION * peak, 0)

    def head_chunk(self, keeps: Sequence[Keep]) -> int:
        """Bytes of logits the head may hold while the peak stays that of a layer; a recording's
        memory is not the head's to use."""
        room: float = sum(self._worst_of_layers(keeps))
        if keeps[0].recorded:
            room *= _BESIDE_RECORDING
        else:
            room -= sum(self._head_moment(keeps, 0))
        return next((chunk for chunk in _HEAD_CHUNKS if chunk <= room), CHUNK_BYTES)

    def host_share(self, keeps: Sequence[Keep]) -> int:
        """Bytes that wait in host memory."""
        away = ((keep, count) for keep, count in _runs(keeps) if keep.offload)
        width = sum(count * self.movable_width(keep) for keep, count in away)
        return self.rows * width * self.sizes.element

    def _worst_moment(self, keeps: Sequence[Keep]) -> tuple[int, int]:
        """(kept, working) bytes where their sum is largest."""
        kept, working = self._worst_of_layers(keeps)
        if keeps[0].recorded:
            return kept, working + self._beside_recording(self.head_chunk(keeps))
        return max((kept, working), self._head_moment(keeps, CHUNK_BYTES), key=sum)

    def _worst_of_layers(self, keeps: Sequence[Keep]) -> tuple[int, int]:
        """The same, while a layer is at work."""
        s = self.sizes
        x, leaving = self.rows * s.hidden * s.element, self._leaving(keeps)
        kept, worst = 0, (0, 0)
        for keep, count in _runs(keeps):
            own, forward, backward = self._numbers(keep)
            kept += (count - 1) * own  # of layers that keep alike, the last one has most before it
            moments = [(kept, forward + x + leaving), (kept + own, backward)]
            worst = max(worst, *moments, key=sum)
            kept += own
        return worst

    def _head_moment(self, keeps: Sequence[Keep], chunk_bytes: int) -> tuple[int, int]:
        kept = sum(count * self.kept_bytes(keep) for keep, count in _runs(keeps))
        return kept, self.head_bytes(chunk_bytes) + self._leaving(keeps)

    def _leaving(self, keeps: Sequence[Keep]) -> int:
        """What may still be on its way to the host."""
        away = [self.movable_width(keep) for keep, _ in _runs(keeps) if keep.offload]
        return _LEAVING * self.rows * max(away, default=0) * self.sizes.element

    def _beside_recording(self, chunk_bytes: int) -> int:
        """A recording keeps its memory: the head works beside it, gradients leave as copies, input
        and output and its gradient are buffers of their own, as are the libraries' workspaces."""
        s = self.sizes
        copies = 4 * s.trainable + 3 * self.rows * s.hidden * s.element
        return self.head_bytes(chunk_bytes) + copies + WORKSPACES

    def _numbers(self, keep: Keep) -> tuple[int, int, int]:
        if keep not in self._known:  # a plan asks some thousand times for a dozen of them
            numbers = self.kept_bytes(keep), self.forward_bytes(keep), self.backward_bytes(keep)
            self._known[keep] = numbers
        return self._known[keep]


def _runs(keeps: Sequence[Keep]) -> list[tuple[Keep, int]]:
    """Layers that follow one another and keep alike, and how many they are."""
    return [(keep, len(list(run))) for keep, run in groupby(keeps)]
