"""The sizes of a network that decide what a step of it takes: widths, ranks, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sloth.kernels.dispatch import has_twin, wiring_of
from sloth.kernels.fp8 import TURNED_COLUMNS
from sloth.kernels.stack_shape import GROUPS, padded
from sloth.models.decoder import Decoder


@dataclass(frozen=True)
class NetworkSizes:
    """Widths, ranks and bytes of a network; everything a prediction reads.

    hidden D, qkv (H + 2 K) E, queries H E, heads H, ffn F, vocab V. ranks: of the stacks qkv, o,
    gate_up and down, padded, the largest of any layer. shapes: how many sizes each stack comes in,
    since layers of one size share their scratch. element: bytes of an activation. weights: all
    stored weights but the embedding, embedding in bytes; it stays on the device where it is the
    head too, or is trained.
    trainable: elements trained. post_norms: whether a norm follows each half. dora: whether the
    stacks qkv, o, gate_up and down have DoRA's magnitudes. head_gradient: bytes of the gradient of
    the head's matrix, and of the copy that an adapter on it is computed with; 0 if it is frozen.
    fp8: whether the products with frozen matrices run on copies of them in 8 bits. mlp_rank: the
    largest of gate, up and down in any layer. qk_norms: whether norms stand between q, k and RoPE.
    """

    num_layers: int
    hidden: int
    qkv: int
    queries: int
    heads: int
    ffn: int
    vocab: int
    ranks: tuple[int, int, int, int]
    element: int
    weights: int
    embedding: int
    embedding_stays: bool
    quantized: bool
    trainable: int
    post_norms: bool = False
    dora: tuple[bool, bool, bool, bool] = (False, False, False, False)
    head_gradient: int = 0
    fp8: bool = False
    shapes: tuple[int, int, int, int] = (1, 1, 1, 1)
    mlp_rank: int = 0
    qk_norms: bool = False

    @property
    def stack_sizes(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the stacks qkv, o, gate_up and down."""
        hidden, ffn = self.hidden, self.ffn
        return (self.qkv, hidden), (hidden, self.queries), (2 * ffn, hidden), (hidden, ffn)

    @property
    def stack_scratch(self) -> list[int]:
        """Bytes of the four scratch matrices of a layer."""
        return [
            (outputs + rank) * padded(inputs + rank) * self.element
            for (outputs, inputs), rank in zip(self.stack_sizes, self.ranks, strict=True)
        ]

    @property
    def layer_scratch(self) -> int:
        """Their sum."""
        return sum(self.stack_scratch)

    @property
    def fp8_copies(self) -> int:
        """Bytes of a layer's matrices in 8 bits, as they are and turned, with their scales."""
        sizes = self.stack_sizes if self.fp8 else ()
        return sum(2 * outputs * inputs + 4 * (outputs + inputs) for outputs, inputs in sizes)

    @property
    def fp8_casting(self) -> int:
        """Bytes held while these are made: a stack unpacked, and columns of it turned."""
        sizes = self.stack_sizes if self.fp8 else ()
        elements = [outputs * (inputs + min(TURNED_COLUMNS, inputs)) for outputs, inputs in sizes]
        return max(elements, default=0) * self.element

    @classmethod
    def of(cls, network: Decoder) -> NetworkSizes:
        """Read a decoder, on any device: on meta too, where nothing is loaded."""
        config, layers = network.config, [_stacks_of(block) for block in network.model.layers]
        ranks = [[tuple(map(_rank, stack)) for stack in layer] for layer in layers]
        by_stack = list(zip(*ranks, strict=True))
        q, o, g, d = (max(padded(sum(each)) for each in stack) for stack in by_stack)
        q_shapes, o_shapes, g_shapes, d_shapes = (len(set(stack)) for stack in by_stack)
        q_dora, o_dora, g_dora, d_dora = (
            any(m.lora_magnitude_vector is not None for stack in stacks for m in stack)
            for stacks in zip(*layers, strict=True)
        )
        (q_proj, k_proj, v_proj), _, _, (down_proj,) = layers[0]
        projections = [m for layer in layers for stack in layer for m in stack]
        embedding, model_type = network.model.embed_tokens.weight, network.model_type
        # Without a twin only the sizes count: autograd keeps what it wants.
        wiring = wiring_of(model_type) if has_twin(model_type) else None
        return cls(
            num_layers=len(layers),
            hidden=q_proj.in_features,
            qkv=sum(m.out_features for m in (q_proj, k_proj, v_proj)),
            queries=q_proj.out_features,
            heads=config.num_attention_heads,
            ffn=down_proj.in_features,
            vocab=len(embedding),
            ranks=(q, o, g, d),
            element=embedding.element_size(),
            weights=_stored_bytes(network) - embedding.nbytes,
            embedding=embedding.nbytes,
            embedding_stays=network.shares_embedding or embedding.requires_grad,
            quantized=any(not isinstance(m.base, Tensor) for m in projections),
            trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
            post_norms=wiring is not None and wiring.post_norms,
            dora=(q_dora, o_dora, g_dora, d_dora),
            head_gradient=_head_gradient(network),
            fp8=network.base_compute == "fp8",
            shapes=(q_shapes, o_shapes, g_shapes, d_shapes),
            mlp_rank=max(rank for layer in ranks for stack in layer[2:] for rank in stack),
            qk_norms=wiring is not None and wiring.qk_norms,
        )


def _stacks_of(block: nn.Module) -> list[list[Any]]:
    return [[block.get_submodule(path) for path in paths] for paths in GROUPS.values()]


def _rank(projection: Any) -> int:
    return len(projection.lora_A.weight) if projection.has_lora else 0


def _head_gradient(network: Decoder) -> int:
    """The fp32 sum, one chunk's share of it (then the scaled sum), and a copy of W with the rows
    trained apart, or with B beside it."""
    head: Any = network.lm_head
    weight = network.model.embed_tokens.weight if head is None else head.weight
    rank = 0 if head is None or not head.has_lora else len(head.lora_A.weight)
    holder = network.model.embed_tokens if head is None else head
    rows = holder.token_adapter is not None
    if not (weight.requires_grad or rank or rows):
        return 0
    copies = rows or (bool(rank) and 1 + (head.lora_magnitude_vector is not None))
    wide = max(4, weight.element_size())
    vocabulary, hidden = weight.shape
    return vocabulary * (hidden + rank) * (2 * wide + copies * weight.element_size())


def _stored_bytes(network: Decoder) -> int:
    # A tied head that an adapter stands on is a parameter of its own in the embedding's memory.
    head = network.lm_head
    again = head.weight if head is not None and network.shares_embedding else None
    stored = [t for t in (*network.parameters(), *network.buffers()) if t is not again]
    return sum(t.nbytes for t in {t.data_ptr() or id(t): t for t in stored}.values())
