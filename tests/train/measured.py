"""What one fused layer allocates, tensor by tensor, at any size and without a GPU.

The layer runs on the meta device, on the engine of a GPU, its launches held back: its host
functions allocate as they do there. What the vendor's attention works in, and the fp32 sums of its
products, stand in for calls that a GPU alone has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sloth
from sloth.kernels import halves, normed, stacked
from sloth.kernels.context import Keep
from sloth.kernels.dispatch import twin_of, wiring_of
from sloth.kernels.engine import forced_engine, launches_held
from sloth.kernels.ops import glu_lora
from sloth.linear import Linear, Projection
from sloth.lora import attach_lora
from sloth.models import ARCHITECTURES
from sloth.quant.linear4bit import Linear4bit
from sloth.train.network_sizes import NetworkSizes
from tools.shapes import hf_config


class Measured(NamedTuple):
    """Bytes: what the layer keeps, its input included; the most that its forward holds beside the
    input, and its backward beside what is kept and the gradients of its adapter; these."""

    kept: int
    forward: int
    backward: int
    gradients: int


class Allocations(TorchDispatchMode):
    """Remembers, after every op, which of the storages made inside are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[tuple[StorageWeakRef, int]] = []
        self.moments: list[dict[int, int]] = []

    def number(self, tensor: Tensor) -> int | None:
        """Of a tensor's storage, None for one from outside."""
        place = tensor.untyped_storage()._cdata
        known = enumerate(self._storages)
        return next((i for i, (s, _) in known if s.cdata == place and not s.expired()), None)

    def take(self, tensor: Tensor) -> int:
        """Count this tensor's storage, too."""
        storage = tensor.untyped_storage()
        self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        return len(self._storages) - 1

    def look(self) -> dict[int, int]:
        """Number -> bytes of what is alive."""
        storages = enumerate(self._storages)
        return {i: num_bytes for i, (s, num_bytes) in storages if not s.expired()}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), keywords: Any = None
    ) -> Any:
        out = function(*args, **(keywords or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, keywords)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            if x.untyped_storage()._cdata not in given and self.number(x) is None:
                self.take(x)
        self.moments.append(self.look())
        return out


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def fake_sum_over_rows(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=dtype)


def fake_attention_fwd(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Any]:
    out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
    return out, (q.new_empty(q.shape[:-1], dtype=torch.float32),)


def fake_attention_bwd(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    grads = [torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
    sums = [q.new_empty(q.shape, dtype=torch.float32)]
    if k.shape[1] < q.shape[1]:
        sums += [q.new_empty(q.shape), q.new_empty(q.shape)]
    return grads


def measure(
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    keep: Keep,
    lora: sloth.LoraConfig,
    *,
    batch: int = 4,
    seq: int = 2048,
    quantized: bool = True,
) -> tuple[NetworkSizes, Measured]:
    """One layer of a real model's shape (`tools.shapes`) in bf16."""
    monkeypatch.setattr(halves, "attention_fwd", fake_attention_fwd)
    monkeypatch.setattr(halves, "attention_bwd", fake_attention_bwd)
    for module in (stacked, normed, glu_lora):
        monkeypatch.setattr(module, "sum_over_rows", fake_sum_over_rows)

    def projection(path: str, inputs: int, outputs: int, bias: bool) -> Projection:
        in_4_bits = quantized and path != "lm_head"
        return (Linear4bit if in_4_bits else Linear)(inputs, outputs, bias)

    config = hf_config(shape)
    config["num_hidden_layers"] = 1
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    config_class, decoder = ARCHITECTURES[config["model_type"]]
    with torch.device("meta"):
        network = decoder(config_class.from_hf(config), projection).bfloat16()
        x = torch.empty(batch, seq, config["hidden_size"], dtype=torch.bfloat16).requires_grad_()
    attach_lora(network, lora)
    network.set_level("fused")
    sizes, block, workspace = NetworkSizes.of(network), network.model.layers[0], network.workspace
    twin, wiring = twin_of(network.model_type), wiring_of(network.model_type)
    (context,) = network.contexts(x, None, None)
    context.keep = keep
    with forced_engine("triton"), launches_held(lambda *_: None):
        layer = workspace.layer(block, wiring, x.dtype, keep.resident)
        with Allocations() as live:
            y = twin(block, x, context, workspace)
        forward = max(sum(moment.values()) for moment in live.moments)
        output = live.number(y)
        kept = sum(size for number, size in live.look().items() if number != output)
        dy = torch.empty_like(y)
        live.take(dy)
        live.moments.clear()
        matrices = [matrix for matrix in layer.matrices if matrix is not None]
        with live:
            grads = torch.autograd.grad(y, [x, *matrices], dy)
    apart = {output, *(live.number(grad) for grad in grads[1:])}
    backward = max(
        sum(size for number, size in moment.items() if number not in apart)
        for moment in live.moments
    )
    gradients = sum(grad.nbytes for grad in grads[1:])
    return sizes, Measured(kept + x.nbytes, forward, backward - kept, gradients)
