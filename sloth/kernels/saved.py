"""What a fused layer carries from its forward to its backward, and the gradients it collects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sloth.kernels.layer import FusedLayer
from sloth.kernels.normed import Normed
from sloth.kernels.stacked import Factors, LoraStack, Masks, Sums

_NO_SUMS = Sums()
_KEPT = ("x", "qkv", "o", "h", "a", "m", "gate", "up")
# Of these, what may wait in host memory.
_AWAY = ("x", "qkv", "o", "h", "a", "m")


class Saved:
    """Tensors of one call, by name; None for what is not kept.

    x, h, a, m [N, D]; qkv [N, (H + 2 K) E]; o [B, H, T, E]; gate, up [N, F]. stats: what
    attention's backward needs beside q, k, v and o. lows: X A^T [N, R] of each stack. rstds: of
    each norm [N], by its number. masks: per stack with dropout, which inputs of each member's A
    survived (bool [N, K]).
    """

    def __init__(self, layer: FusedLayer, x: Tensor) -> None:
        self.x: Any = x
        self.qkv: Any = None
        self.o: Any = None
        self.h: Any = None
        self.a: Any = None
        self.m: Any = None
        self.gate: Any = None
        self.up: Any = None
        self.stats: tuple[Tensor | None, ...] = ()
        self.lows: dict[str, Tensor] = {}
        self.rstds: dict[int, Tensor] = {}
        self.masks = layer.draw_dropout_masks(x)
        self._layer = layer

    def put_low(self, name: str, low: Tensor, rows: slice) -> None:
        """Take over X A^T of some rows."""
        self._put(self.lows, name, low, rows)

    def put_rstd(self, norm: int, rstd: Tensor, rows: slice = slice(None)) -> None:
        """Take over what a norm divides some rows by."""
        self._put(self.rstds, norm, rstd, rows)

    def _put(self, kept: dict[Any, Tensor], key: Any, part: Tensor, rows: slice) -> None:
        num_rows = len(self.x)
        if len(part) == num_rows:
            kept[key] = part
            return
        if key not in kept:
            kept[key] = part.new_empty(num_rows, *part.shape[1:])
        kept[key][rows] = part

    def masks_of(self, name: str, rows: slice | None = None) -> Masks:
        """Dropout masks of a stack's members, scaled, for some rows; None without dropout."""
        drawn = self.masks.get(name)
        if drawn is None:
            return None
        masks: list[Tensor | None] = []
        for mask, member in zip(drawn, self._layer.stacks[name].members, strict=True):
            if mask is not None:
                mask = mask if rows is None else mask[rows]
                mask = mask.to(self.x.dtype) / (1.0 - member.lora_dropout)
            masks.append(mask)
        return masks

    def store(self, ctx: Any, matrices: Sequence[Tensor | None], offload: bool) -> None:
        """Hand everything to autograd, which refuses LoRA matrices changed in place meanwhile.

        offload: what is kept waits in host memory (a CPU's is there already), but for the products
        of the MLP, which are larger than their copies could keep up with.
        """
        ctx.stashed, ctx.stashed_names = None, []
        if offload and self.x.is_cuda and any(ctx.needs_input_grad):
            away = [name for name in _AWAY if getattr(self, name) is not None]
            if self.o is not None:
                self.o = self.o.transpose(1, 2)  # [B, T, H, E], as it lies in memory
            tensors = [getattr(self, name).contiguous() for name in away]
            ctx.stashed, ctx.stashed_names = self._layer.stash.put(tensors), away
            for name in away:
                setattr(self, name, None)
        names, norms, stacks = list(self.lows), list(self.rstds), list(self.masks)
        masks = [mask for name in stacks for mask in self.masks[name]]
        ctx.save_for_backward(
            *(getattr(self, name) for name in _KEPT),
            *(self.lows[name] for name in names),
            *(self.rstds[norm] for norm in norms),
            *masks,
            *self.stats,
            *matrices,
        )
        ctx.names, ctx.norms, ctx.masked = names, norms, stacks
        ctx.num_stats = len(self.stats)

    @classmethod
    def restore(cls, ctx: Any, layer: FusedLayer) -> Saved:
        """What `store` handed over."""
        saved = cls.__new__(cls)
        tensors = iter(ctx.saved_tensors)
        for name in _KEPT:
            setattr(saved, name, next(tensors))
        saved.lows = {name: next(tensors) for name in ctx.names}
        saved.rstds = {norm: next(tensors) for norm in ctx.norms}
        saved.masks = {
            name: [next(tensors) for _ in layer.stacks[name].members] for name in ctx.masked
        }
        saved.stats = tuple(next(tensors) for _ in range(ctx.num_stats))
        saved._layer = layer
        if ctx.stashed is not None:
            tensors = layer.stash.take(ctx.stashed)
            for name, tensor in zip(ctx.stashed_names, tensors, strict=True):
                setattr(saved, name, tensor.transpose(1, 2) if name == "o" else tensor)
        return saved


class Gradients:
    """Gradients of A, B and magnitudes of a layer, summed over the row tiles of its MLP.

    needs: which of them are wanted, in the order of `FusedLayer.matrices`.
    """

    def __init__(self, layer: FusedLayer, needs: Sequence[bool]) -> None:
        triples = iter(zip(needs[::3], needs[1::3], needs[2::3], strict=True))
        self._wanted = {
            name: [next(triples) for _ in stack.members] for name, stack in layer.stacks.items()
        }
        self._factors: dict[str, list[Factors]] = {}
        self._stacks = layer.stacks

    def wants(self, name: str) -> bool:
        """Whether an adapter's tensor of this stack wants a gradient."""
        return any(any(want) for want in self._wanted[name])

    def add(
        self,
        name: str,
        dy: Tensor,
        x: Tensor | Normed | None,
        saved: Saved,
        rows: slice = slice(None),
        sums: Sums = _NO_SUMS,
    ) -> None:
        """Add what some rows give: dy [n, N + R] spread, x [n, K or more] the stack's input.

        sums: those that are formed already; x may be None where dA is.
        """
        if not self.wants(name):
            return
        stack: LoraStack = self._stacks[name]
        low, masks = saved.lows[name][rows], saved.masks_of(name, rows)
        new = stack.factor_gradients(dy, x, low, masks, self._wanted[name], sums)
        old = self._factors.get(name)
        self._factors[name] = new if old is None else [*map(_added, old, new)]

    def in_order(self) -> list[Tensor | None]:
        """dA, dB and dm of every projection, None where not wanted."""
        nothing: Factors = (None, None, None)
        return [
            gradient
            for name, stack in self._stacks.items()
            for factors in self._factors.get(name, [nothing] * len(stack.members))
            for gradient in factors
        ]


def _added(old: Factors, new: Factors) -> Factors:
    first, second, third = (
        None if a is None or b is None else a + b for a, b in zip(old, new, strict=True)
    )
    return first, second, third
