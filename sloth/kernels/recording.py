"""All fused layers as two CUDA graphs, forward and backward, so that the host makes two calls.

A layer is about forty launches each way, 2 to 5.6 ms of the host's time. Where the device is done
sooner, it waits for them; else the host could do something better. So the layers of a batch shape
that comes again and again are recorded once and then replayed, each pass by one call. The planner
says where (`Keep.recorded`).

What a replay reads and writes stays where it was when recorded: the input, the tables, what is
kept for the backward, the gradients. So a recording serves one forward at a time. A second one
before the first one's backward runs unrecorded, and gradients leave as copies of their own. While
an adapter is switched otherwise than when it was recorded, as for the reference passes of a
preference loss, a recording waits. It ends, and gives its memory back, when a step of another shape
or kind comes, or anything it read is replaced. Making one stops the device, so whatever ends them
again and again, shapes that take turns or matrices frozen in turn, makes them ever more rare.

Source: CUDA graphs, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sloth.kernels.context import BlockContext
from sloth.kernels.function import Function
from sloth.kernels.layer import FusedLayer, Workspace

# Passes of one shape in a row before it is recorded: the first ones compile kernels. Doubled each
# time, after the first, that a recording came to its end.
_TRIES = 2

# Hidden states [B, T, D] through every layer.
RunLayers = Callable[[Tensor, Sequence[BlockContext]], Tensor]


class Passes(Protocol):
    """Both directions of the layers, on memory of their own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, D] after the layers; overwritten by the next call."""

    def backward(self, d_hidden: Tensor) -> list[Tensor]:
        """Gradients: of the input if it wanted one, then of the trained matrices; copies."""


# (run, hidden, contexts, trained matrices) -> passes.
Record = Callable[[RunLayers, Tensor, Sequence[BlockContext], list[Tensor]], Passes]


class GraphPasses:
    """Two CUDA graphs that share a memory pool: what the forward keeps, the backward reads."""

    def __init__(
        self,
        run: RunLayers,
        hidden: Tensor,
        contexts: Sequence[BlockContext],
        matrices: list[Tensor],
    ) -> None:
        self._contexts = contexts  # their tables are read by every replay
        self._input = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        sources = [self._input] * hidden.requires_grad + matrices
        with torch.cuda.graph(self._forward):
            output = run(self._input, contexts)
        self._d_output = torch.empty_like(output)
        with torch.cuda.graph(self._backward, pool=self._forward.pool()):
            grads = list(torch.autograd.grad(output, sources, self._d_output))
            self._d_input = grads.pop(0) if hidden.requires_grad else None
            self._flat = torch.cat([grad.flatten() for grad in grads])
        self._output = output.detach()
        self._sizes, self._shapes = [g.numel() for g in grads], [g.shape for g in grads]

    def forward(self, hidden: Tensor) -> Tensor:
        """Replay the forward."""
        self._input.detach().copy_(hidden)
        self._forward.replay()
        return self._output.detach()

    def backward(self, d_hidden: Tensor) -> list[Tensor]:
        """Replay the backward."""
        self._d_output.copy_(d_hidden)
        self._backward.replay()
        parts = self._flat.clone().split(self._sizes)
        grads = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return grads if self._d_input is None else [self._d_input.clone(), *grads]


class _Call:
    """One forward whose backward may still come."""


class Recorder:
    """Runs the layers of a network, recorded where their contexts ask for it.

    run: the layers, unrecorded. blocks: their modules, as `workspace` knows them.
    """

    def __init__(
        self,
        run: RunLayers,
        blocks: Sequence[nn.Module],
        workspace: Workspace,
        record: Record = GraphPasses,
    ) -> None:
        self._run, self._blocks, self._workspace = run, blocks, workspace
        self._record = record
        self._shape: object = None
        self._tries, self._given_way = 0, 0
        self._recording: _Recording | None = None

    def forget(self) -> None:
        """Give the recording's memory back, once no backward waits for it."""
        was_recorded = self._recording is not None
        self._given_way += was_recorded
        self._shape, self._tries, self._recording = None, 0, None
        if was_recorded and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the pool of a graph is of no use to other launches

    def __call__(self, hidden: Tensor, contexts: Sequence[BlockContext]) -> Tensor:
        """Hidden states [B, T, D] -> after every layer; differentiable like the layers."""
        if not torch.is_grad_enabled():
            return self._run(hidden, contexts)
        if not all(context.keep.recorded for context in contexts):
            self.forget()  # a step that runs needs the memory, as its plan has it
            return self._run(hidden, contexts)
        # Of kernels, those that repeat bit for bit may be asked for from now on, or no longer.
        exact = torch.are_deterministic_algorithms_enabled()
        shape = hidden.shape, hidden.dtype, hidden.requires_grad, exact
        outdated = self._recording is not None and not self._recording.is_current(
            hidden.dtype, contexts
        )
        if shape != self._shape or outdated:
            self.forget()
            self._shape = shape
        if self._recording is None:
            self._tries += 1
            layers = self._workspace.prepared(self._blocks)
            needed = _TRIES * 2 ** max(self._given_way - 1, 0)
            if self._tries <= needed or layers is None or not _recordable(layers):
                return self._run(hidden, contexts)
            self._recording = _Recording(self._run, layers, hidden, contexts, self._record)
        recording = self._recording
        if recording.is_busy or not recording.is_switched_as_recorded:
            return self._run(hidden, contexts)
        return RecordedLayers.apply(hidden, recording, *recording.matrices)


class _Recording:
    """The passes of one shape, and what they were recorded from."""

    def __init__(
        self,
        run: RunLayers,
        layers: list[FusedLayer],
        hidden: Tensor,
        contexts: Sequence[BlockContext],
        record: Record,
    ) -> None:
        self._layers = layers
        self._keeps = [context.keep for context in contexts]
        self._signatures = [layer.signature() for layer in layers]
        self.matrices = _trained(layers)
        # Recorded on aliases: where autograd adds up gradients of the matrices themselves belongs
        # to the stream of an earlier pass, which must not wait for one that is recorded.
        aliases = {id(m): m.detach().requires_grad_() for m in self.matrices}

        def run_on_aliases(hidden: Tensor, contexts: Sequence[BlockContext]) -> Tensor:
            originals = [layer.matrices for layer in layers]
            for layer in layers:
                layer.matrices = [aliases.get(id(m), m) for m in layer.matrices]
            try:
                return run(hidden, contexts)
            finally:
                for layer, matrices in zip(layers, originals, strict=True):
                    layer.matrices = matrices

        self.passes = record(run_on_aliases, hidden, contexts, list(aliases.values()))
        self._call: Callable[[], _Call | None] = lambda: None

    def is_current(self, dtype: torch.dtype, contexts: Sequence[BlockContext]) -> bool:
        """Whether a replay would still do what the layers do, their adapters switched as then."""
        if self._keeps != [context.keep for context in contexts]:
            return False
        pairs = zip(self._layers, self._keeps, strict=True)
        same = all(layer.is_current(dtype, keep.resident) for layer, keep in pairs)
        return same and self._signatures == [layer.signature() for layer in self._layers]

    @property
    def is_switched_as_recorded(self) -> bool:
        """Whether the same adapters are on."""
        return all(layer.switches == layer.switches_now() for layer in self._layers)

    @property
    def is_busy(self) -> bool:
        """Whether a forward waits for its backward."""
        return self._call() is not None

    def begin(self) -> _Call:
        """A forward; busy until its backward, or until nothing refers to it any more."""
        call = _Call()
        self._call = weakref.ref(call)
        return call


class RecordedLayers(Function):
    """Replays a recording. Inputs: hidden states, the recording, its trained matrices."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, recording: _Recording, *matrices: Tensor) -> Tensor:
        ctx.recording, ctx.call = recording, recording.begin()
        ctx.save_for_backward(*matrices)  # autograd refuses ones changed in place meanwhile
        return recording.passes.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        if ctx.call is None:
            raise RuntimeError(
                "backward a second time through recorded layers, whose kept tensors are gone; "
                "run the forward again"
            )
        recording = ctx.recording
        ctx.call = ctx.recording = None  # a loss that is kept must not keep a recording
        grads: list[Tensor | None] = [*recording.passes.backward(d_hidden)]
        d_input = grads.pop(0) if ctx.needs_input_grad[0] else None
        return d_input, None, *grads


def _recordable(layers: list[FusedLayer]) -> bool:
    """Whether passes of the layers repeat, and something in them is trained: else there is no
    backward to record."""
    repeat = not any(layer.is_dora or layer.has_dropout for layer in layers)
    return repeat and bool(_trained(layers))


def _trained(layers: list[FusedLayer]) -> list[Tensor]:
    return [m for layer in layers for m in layer.matrices if m is not None and m.requires_grad]
