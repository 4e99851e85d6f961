"""The frozen half of a fused layer: its stacks of projections, the scratch they compute from.

A `Workspace` belongs to one network. It remembers each block's `FusedLayer`, rebuilt only when a
matrix was replaced, and owns the scratch that layers of one shape share: a layer fills it, uses it,
and the next one fills it anew. So a workspace serves one stream at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
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
    version_of,
)
from sloth.kernels.gains import GainsBatch
from sloth.kernels.handover import Handover
from sloth.kernels.offload import HostStash
from sloth.kernels.ops.batch import CopyBatch, NF4Batch
from sloth.kernels.ops.dora import Gains
from sloth.kernels.ops.glu import Activation
from sloth.kernels.ops.rms_norm import Norm
from sloth.kernels.rows import compute_dtype
from sloth.kernels.stack_shape import GROUPS, StackShape
from sloth.kernels.stacked import LoraStack, Stack

# Whether the adapter of each projection is on, in the order of GROUPS.
Switches = tuple[bool, ...]


@dataclass(frozen=True)
class Wiring:
    """What tells the families of one twin apart.

    norms: paths of the norms around the halves, in order. post_norms: some of them stand behind a
    half, whose output is then kept for their backward. qk_norms: `q_norm` and `k_norm` stand
    between q, k and RoPE. softcap: the attention module has one.
    """

    norms: tuple[str, ...]
    activation: Activation = "silu"
    post_norms: bool = False
    qk_norms: bool = False
    softcap: bool = False


class FusedLayer:
    """What a twin needs of one block, prepared: its stacks, its norms, what fills the scratch.

    resident: its NF4 matrices stay unpacked, in scratch of its own; those with DoRA's gains, which
    change at every step, from each forward to its backward. Products of 8-bit floats refuse it
    (KernelUnavailable).
    stacks: by name. norms: modules with weight, eps and offset. matrices: A, B and magnitudes of
    every projection in stack order, None without one or while the adapter is switched off. like:
    the same block with the adapter switched otherwise, whose stacks it shares, but for those with
    gains, which have those of their own last forward.
    """

    def __init__(
        self,
        block: nn.Module,
        wiring: Wiring,
        dtype: torch.dtype,
        workspace: Workspace,
        resident: bool,
        like: FusedLayer | None = None,
    ) -> None:
        self.wiring = wiring
        self.stash, self.handover, self.resident = workspace.stash, workspace.handover, resident
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
        self.switches = self.switches_now()
        for name, paths in GROUPS.items():
            known = None if like is None else like.stacks[name]
            if known is None or known.is_dora:
                members = [modules[path] for path in paths]
                # One variant of a block at most has room for rows that gains have scaled.
                own = resident and (all(self.switches) or not has_magnitudes(members))
                known = prepare_stack(name, members, dtype, workspace, own)
            self.stacks[name] = known
        self.qkv, self.o = self.stacks["qkv"], self.stacks["o"]
        self.gate_up, self.down = self.stacks["gate_up"], self.stacks["down"]
        every = list(self.stacks.values())
        # Unpacked now, before each forward, and before each backward.
        if like is None:
            NF4Batch([p for s in every if s.is_own and not s.is_dora for p in s.codes()]).run()
        changing = [s for s in every if s.is_dora or not s.is_own]
        self._codes = NF4Batch([part for stack in changing for part in stack.codes()])
        shared = [s for s in every if not s.is_own]
        self._codes_again = NF4Batch([part for stack in shared for part in stack.codes()])
        self._copies = CopyBatch([part for stack in every for part in stack.copies()])
        # Taken before each forward.
        self._gains = GainsBatch([p for s in every if isinstance(s, Stack) for p in s.gain_parts()])
        self.is_dora: bool = any(stack.is_dora for stack in every)
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
    def unpacked(self) -> list[Tensor]:
        """Matrices that only this layer holds, unpacked from codes."""
        stacks = [s for s in self.stacks.values() if isinstance(s, Stack) and s.is_own]
        return [stack.scratch for stack in stacks]

    def switches_now(self) -> Switches:
        """Which of its members' adapters are on."""
        return tuple(member.lora_enabled for member in self.members)

    @property
    def has_dropout(self) -> bool:
        """Whether the next forward draws masks."""
        return any(m.lora_dropout and m.training and m.lora is not None for m in self.members)

    def is_current(self, dtype: torch.dtype, resident: bool) -> bool:
        """Whether nothing it was prepared from has been replaced since."""
        same = dtype == self.dtype and resident == self.resident
        return same and self._state == self._states()

    def signature(self) -> tuple[Any, ...]:
        """What else its passes depend on, which they read anew each time and a recording of them
        does not: norms, which matrices are trained, dropout."""
        norms = [
            (id(norm.weight), norm.weight.data_ptr(), norm.eps, norm.offset)
            for norm in (*self.norms, *(self.qk_norms or ()))
        ]
        trained = [m is not None and m.requires_grad for m in self.matrices]
        return norms, trained, self.has_dropout

    def _states(self) -> list[tuple[Any, ...]]:
        return [_state(member) for member in self.members]

    def fill(self) -> None:
        """Unpack the codes and write A and B as they are now, with DoRA's gains of now: two
        launches, seven with gains."""
        self._gains.run()
        self._codes.run()
        self._copies.run()

    def refill(self) -> None:
        """The same for a backward, of what other layers wrote over: the gains are those of its
        forward, as A and B are."""
        self._codes_again.run()
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
        self.stash, self.handover = HostStash(), Handover()
        # Of each block, by which of its adapters are switched on.
        self._layers: WeakKeyDictionary[nn.Module, dict[Switches, FusedLayer]]
        self._layers = WeakKeyDictionary()

    def clear(self) -> None:
        """Give all of it back; layers are prepared again when they next run."""
        self._scratch.clear()
        self._layers.clear()
        self._fp8.clear()
        self.stash.clear()

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

    @property
    def num_bytes(self) -> int:
        """What it holds on the device beside the network's own tensors."""
        layers = [layer for variants in self._layers.values() for layer in variants.values()]
        unpacked = {id(x): x for layer in layers for x in layer.unpacked}
        tensors = [*self._scratch.values(), *unpacked.values()]
        copies = [part for _, weight in self._fp8.values() for part in weight]
        return sum(tensor.nbytes for tensor in tensors + copies)

    def prepared(self, blocks: Iterable[nn.Module]) -> list[FusedLayer] | None:
        """The blocks as they were last prepared, their adapters as they are switched now; None if
        one has not been yet."""
        layers = []
        for block in blocks:
            variants = self._layers.get(block)
            known = next(iter(variants.values())) if variants else None
            layer = variants.get(known.switches_now()) if variants and known else None
            if layer is None:
                return None
            layers.append(layer)
        return layers

    def layer(
        self, block: nn.Module, wiring: Wiring, dtype: torch.dtype, resident: bool
    ) -> FusedLayer:
        """The block, prepared to compute in `dtype`; made anew if a matrix was replaced."""
        variants = self._layers.get(block, {})
        known = next(iter(variants.values()), None)
        if known is not None and not known.is_current(dtype, resident):
            known, variants = None, {}
        layer = variants.get(known.switches_now()) if known is not None else None
        if layer is None:
            # What is kept outlives an inference mode, whose tensors no other mode may use.
            with torch.inference_mode(False):
                layer = FusedLayer(block, wiring, dtype, self, resident, known)
            variants[layer.switches] = layer
            self._layers[block] = variants
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


def prepare_stack(
    name: str, members: list[Any], dtype: torch.dtype, workspace: Workspace, own: bool
) -> LoraStack:
    """The stack of these projections, in scratch that the workspace shares, or in its own: because
    it is to stay unpacked (`own`), or because that is where its dense matrices live."""
    shape = StackShape.of(members)
    bases = [member.base for member in members]
    device = next(b.device if isinstance(b, Tensor) else b.codes.device for b in bases)
    is_dora = has_magnitudes(members)
    if workspace.base_compute == "fp8":
        require_fp8(device, dtype)
        require_fp8_stack(name, shape, is_dora)
        return workspace.fp8_stack(name, members, shape, dtype)
    gains = None
    if is_dora:
        gains = Gains(*torch.empty(3, shape.num_outputs, dtype=compute_dtype(dtype), device=device))
    dense = [isinstance(base, Tensor) for base in bases]
    own = own and not all(dense)
    if not own and (is_dora or not any(dense)):
        return Stack(members, shape, workspace.scratch(name, shape, dtype, device), gains)
    scratch = shape.scratch(dtype, device)
    if not is_dora:
        for base, slot in zip(bases, shape.slots, strict=True):
            if isinstance(base, Tensor):
                _move_in(base, scratch[slot.rows, : shape.num_inputs])
    return Stack(members, shape, scratch, gains, own)


def require_fp8_blocks(blocks: Iterable[nn.Module]) -> None:
    """Raise KernelUnavailable unless every stack of these blocks can be one of 8-bit floats.

    Sizes and DoRA are known from modules without weights, long before a stack is prepared.
    """
    for block in blocks:
        for name, paths in GROUPS.items():
            members = [block.get_submodule(path) for path in paths]
            require_fp8_stack(name, StackShape.of(members), has_magnitudes(members))


def has_magnitudes(members: Sequence[Any]) -> bool:
    """Whether gains come into a stack of these; also while the adapter is off, when they are 1: a
    dense matrix then stays where it is."""
    return any(member.lora_magnitude_vector is not None for member in members)


def _magnitudes(member: Any) -> Tensor | None:
    """DoRA's magnitudes of a projection, None without them or while the adapter is off."""
    return member.lora_magnitude_vector if member.lora_enabled else None


def _move_in(weight: Tensor, place: Tensor) -> None:
    """Let a dense matrix live in `place`: the parameter becomes a view of the scratch."""
    place.copy_(weight.detach())
    if weight.dtype == place.dtype:
        weight.data = place


def _state(member: Any) -> tuple[Any, ...]:
    """What a prepared projection depends on, but for whether its adapter is on: which tensors they
    are, where they lie, and for those that are copied or cast what was written into them."""
    adapter = (*member.factors_in_use, member.lora_magnitude_vector)
    places = [(id(x), None if x is None else x.data_ptr()) for x in adapter]
    bias = None if member.bias is None else (member.bias.data_ptr(), version_of(member.bias))
    return (*stamp(member), bias, *places, member.lora_scale)


def _draw(member: Any, like: Tensor, num_inputs: int) -> Tensor | None:
    if member.lora is None or not (member.lora_dropout and member.training):
        return None
    mask = like.new_empty(len(like), num_inputs)
    return mask.bernoulli_(1.0 - member.lora_dropout) != 0
