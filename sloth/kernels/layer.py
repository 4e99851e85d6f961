"""The frozen half of a fused layer: its stacks of projections, the scratch they compute from.

A `Workspace` belongs to one network. It remembers each block's `FusedLayer`, rebuilt only when a
matrix was replaced, and owns the scratch that layers of one shape share: a layer fills it, uses it,
and the next one fills it anew. So a workspace serves one stream at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sloth.errors import KernelUnavailable
from sloth.kernels.context import BlockContext
from sloth.kernels.fp8 import (
    BaseCompute,
    FP8Stack,
    FP8Weight,
    require_fp8,
    require_fp8_stack,
    stamp,
)
from sloth.kernels.offload import HostStash
from sloth.kernels.ops.batch import CopyBatch, NF4Batch
from sloth.kernels.ops.glu import Activation
from sloth.kernels.rows import compute_dtype
from sloth.kernels.stacked import LoraStack, Stack, StackShape

# Stack name -> paths of its projections inside a block, in stacking order.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Norm(Protocol):
    """An RMSNorm module, as a twin reads it."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class Wiring:
    """What tells the families of one twin apart.

    norms: paths of the norms around the halves, in order. qk_norms: `q_norm` and `k_norm` stand
    between q, k and RoPE. softcap: the attention module has one.
    """

    norms: tuple[str, ...]
    activation: Activation = "silu"
    qk_norms: bool = False
    softcap: bool = False


class FusedLayer:
    """What a twin needs of one block, prepared: its stacks, its norms, what fills the scratch.

    resident: its NF4 matrices stay unpacked, in scratch of its own; DoRA, whose gains change them
    at every step, and products of 8-bit floats refuse it (KernelUnavailable).
    stacks: by name. norms: modules with weight, eps and offset. matrices: A, B and magnitudes of
    every projection in stack order, None without one or while the adapter is switched off.
    """

    def __init__(
        self,
        block: nn.Module,
        wiring: Wiring,
        dtype: torch.dtype,
        workspace: Workspace,
        resident: bool,
    ) -> None:
        self.wiring = wiring
        self.stash, self.resident = workspace.stash, resident
        modules = dict(block.named_modules())
        self.paths = [path for paths in GROUPS.values() for path in paths]
        self.members: list[Any] = [modules[path] for path in self.paths]
        self.norms: list[Any] = [modules[path] for path in wiring.norms]
        attention: Any = modules["self_attn"]
        self.softcap: float | None = attention.softcap if wiring.softcap else None
        self.qk_norms: tuple[Norm, Norm] | None = None
        if wiring.qk_norms:
            self.qk_norms = attention.q_norm, attention.k_norm
        self.head_dim, self.scale, self.dtype = attention.head_dim, attention.scale, dtype
        self.stacks: dict[str, LoraStack] = {}
        self.base_compute = workspace.base_compute
        if resident and self.base_compute is not None:
            raise KernelUnavailable(
                f"a layer with base_compute={self.base_compute!r} keeps nothing unpacked"
            )
        for name, paths in GROUPS.items():
            shared = None if resident else workspace
            members = [modules[path] for path in paths]
            self.stacks[name] = _prepare_stack(name, members, dtype, shared)
        self.qkv, self.o = self.stacks["qkv"], self.stacks["o"]
        self.gate_up, self.down = self.stacks["gate_up"], self.stacks["down"]
        every = list(self.stacks.values())
        self._codes = NF4Batch([part for stack in every for part in stack.codes()])
        self._copies = CopyBatch([part for stack in every for part in stack.copies()])
        # Of these the gains are taken, from the matrices without them, before each forward.
        self._dora = [stack for stack in every if stack.is_dora]
        self._bare_codes = NF4Batch([p for s in self._dora for p in s.codes(with_gains=False)])
        self._bare_copies = CopyBatch([p for s in self._dora for p in s.copies(with_gains=False)])
        if resident and self._dora:
            raise KernelUnavailable("a layer with DoRA cannot stay unpacked: its rows are scaled")
        if resident:
            self._codes.run()
            self._codes = NF4Batch([])
        self._state = self._states()
        self.matrices: list[Tensor | None] = []
        for member in self.members:
            lora = member.lora
            self.matrices += (None, None) if lora is None else (lora.A, lora.B)
            self.matrices.append(_magnitudes(member))

    @property
    def keeps_raw_qkv(self) -> bool:
        """Whether the products before RoPE are wanted again: by norms of q and k, or by DoRA."""
        return self.qk_norms is not None or self.qkv.is_dora

    @property
    def is_dora(self) -> bool:
        """Whether a projection has magnitudes."""
        return bool(self._dora)

    @property
    def has_dropout(self) -> bool:
        """Whether the next forward draws masks."""
        return any(m.lora_dropout and m.training and m.lora is not None for m in self.members)

    def is_current(self, dtype: torch.dtype, resident: bool) -> bool:
        """Whether nothing it was prepared from has been replaced since."""
        same = dtype == self.dtype and resident == self.resident
        return same and self._state == self._states()

    def _states(self) -> list[tuple[Any, ...]]:
        """Of every member; copies in 8 bits must notice too what is written in place."""
        states = [_state(member) for member in self.members]
        return states + [stamp(m) for m in self.members if self.base_compute == "fp8"]

    def fill(self) -> None:
        """Unpack the codes and write A and B as they are now: two launches.

        With DoRA they come twice, for the gains are taken from the matrices themselves; dense ones
        are read where they lie, and copied once.
        """
        if self._dora:
            self._bare_codes.run()
            self._bare_copies.run()
            for stack in self._dora:
                stack.take_gains()
        self.refill()

    def refill(self) -> None:
        """The same for a backward: the gains are those of its forward, as A and B are."""
        self._codes.run()
        self._copies.run()

    def draw_dropout_masks(self, like: Tensor) -> dict[str, list[Tensor | None]]:
        """Per stack with dropout, one byte for each input element of each member with a LoRA."""
        if not self.has_dropout:
            return {}
        masks: dict[str, list[Tensor | None]] = {}
        for name, stack in self.stacks.items():
            drawn = [_draw(member, like, stack.K) for member in stack.members]
            if any(mask is not None for mask in drawn):
                masks[name] = drawn
        return masks

    def refuse_trainable_base(self) -> None:
        """A twin derives no gradient of the base: an error, rather than one that stays None."""
        if not torch.is_grad_enabled():
            return
        named = [*zip(self.paths, self.members, strict=True)]
        named += zip(self.wiring.norms, self.norms, strict=True)
        named += zip(("self_attn.q_norm", "self_attn.k_norm"), self.qk_norms or (), strict=False)
        for path, module in named:
            for kind in ("weight", "bias"):
                value = getattr(module, kind, None)
                if isinstance(value, Tensor) and value.requires_grad:
                    raise KernelUnavailable(
                        f"the fused level derives no gradient of {path}.{kind}, which requires "
                        "one; freeze the base (add_lora does) or load with level='ops'"
                    )


class Workspace:
    """Scratch and prepared layers of one network.

    base_compute: what the products with frozen matrices run on, `fp8.BaseCompute`.
    """

    def __init__(self, base_compute: BaseCompute = None) -> None:
        self.base_compute = base_compute
        self._scratch: dict[tuple[Any, ...], Tensor] = {}
        # By first member of a stack; an adapter that is switched leaves them as they are.
        self._fp8: WeakKeyDictionary[nn.Module, tuple[Any, FP8Weight]] = WeakKeyDictionary()
        self.stash = HostStash()
        self._layers: WeakKeyDictionary[nn.Module, FusedLayer] = WeakKeyDictionary()

    def clear(self) -> None:
        """Give all of it back; layers are prepared again when they next run."""
        self._scratch.clear()
        self._layers.clear()
        self._fp8.clear()

    def scratch(
        self, name: str, shape: StackShape, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The scratch that stacks of this name and shape share: one of each in a layer."""
        key = (name, shape, dtype, device)
        if key not in self._scratch:
            self._scratch[key] = shape.scratch(dtype, device)
        return self._scratch[key]

    def fp8_stack(
        self, name: str, members: list[Any], shape: StackShape, dtype: torch.dtype
    ) -> FP8Stack:
        """A stack of 8-bit floats, its matrices cast anew only if one was replaced or written."""
        state = dtype, [stamp(member) for member in members]
        known = self._fp8.get(members[0])
        if known is None or known[0] != state:
            known = self._fp8[members[0]] = state, FP8Weight.of(members, dtype)
        key = (name, shape, dtype, known[1].rows.device)
        if key not in self._scratch:
            self._scratch[key] = shape.factors(*key[2:])
        return FP8Stack(members, shape, self._scratch[key], known[1])

    def prepared(self, blocks: Iterable[nn.Module]) -> list[FusedLayer] | None:
        """The blocks as they were last prepared; None if one has not been yet."""
        layers = [self._layers.get(block) for block in blocks]
        return None if None in layers else [layer for layer in layers if layer is not None]

    def layer(
        self, block: nn.Module, wiring: Wiring, dtype: torch.dtype, resident: bool
    ) -> FusedLayer:
        """The block, prepared to compute in `dtype`; made anew if a matrix was replaced."""
        layer = self._layers.get(block)
        if layer is None or not layer.is_current(dtype, resident):
            layer = FusedLayer(block, wiring, dtype, self, resident)
            self._layers[block] = layer
        return layer


def prepare(
    block: nn.Module,
    hidden: Tensor,
    context: BlockContext,
    workspace: Workspace | None,
    wiring: Wiring,
) -> FusedLayer:
    """The block, ready for a twin to run on `hidden`.

    Raises KernelUnavailable where a base weight, a bias or a norm wants a gradient, and for a
    context with a cache.
    """
    if context.cache is not None:
        raise KernelUnavailable("the fused block keeps no cache; decode with the plain block")
    workspace = workspace or Workspace()
    layer = workspace.layer(block, wiring, hidden.dtype, context.keep.resident)
    layer.refuse_trainable_base()
    return layer


def _prepare_stack(
    name: str, members: list[Any], dtype: torch.dtype, workspace: Workspace | None
) -> LoraStack:
    shape = StackShape(
        members[0].in_features,
        tuple(member.out_features for member in members),
        tuple(0 if m.lora_slot is None else len(m.lora_slot.A) for m in members),
    )
    bases = [member.base for member in members]
    device = next(b.device if isinstance(b, Tensor) else b.codes.device for b in bases)
    is_dora = any(_magnitudes(member) is not None for member in members)
    if workspace is not None and workspace.base_compute == "fp8":
        require_fp8(device, dtype)
        require_fp8_stack(name, shape, is_dora)
        return workspace.fp8_stack(name, members, shape, dtype)
    gains = None
    if is_dora:
        gains = torch.empty(shape.num_outputs, dtype=compute_dtype(dtype), device=device)
    if workspace is not None and (is_dora or not any(isinstance(base, Tensor) for base in bases)):
        return Stack(members, shape, workspace.scratch(name, shape, dtype, device), gains)
    scratch = shape.scratch(dtype, device)
    for base, slot in zip(bases, shape.slots, strict=True):
        if isinstance(base, Tensor):
            _move_in(base, scratch[slot.rows, : shape.num_inputs])
    return Stack(members, shape, scratch, gains)


def _magnitudes(member: Any) -> Tensor | None:
    """DoRA's magnitudes of a projection, None without them or while the adapter is off."""
    return member.lora_magnitude_vector if member.lora_enabled else None


def _move_in(weight: Tensor, place: Tensor) -> None:
    """Let a dense matrix live in `place`: the parameter becomes a view of the scratch."""
    place.copy_(weight.detach())
    if weight.dtype == place.dtype:
        weight.data = place


def _state(member: Any) -> tuple[Any, ...]:
    """What a prepared projection depends on."""
    A, B, bias = member.lora_A, member.lora_B, member.bias
    return (
        member.address,
        None if bias is None else bias.data_ptr(),
        None if A is None else A.weight.data_ptr(),
        None if B is None else B.weight.data_ptr(),
        None if member.lora_magnitude_vector is None else member.lora_magnitude_vector.data_ptr(),
        member.lora_scale,
        member.lora_enabled,
    )


def _draw(member: Any, like: Tensor, num_inputs: int) -> Tensor | None:
    if member.lora is None or not (member.lora_dropout and member.training):
        return None
    mask = like.new_empty(len(like), num_inputs)
    return mask.bernoulli_(1.0 - member.lora_dropout) != 0
