"""How much memory a training step takes without the fused blocks: the base itself is trained.

Always there are the weights and, for each number that is trained, its gradient, AdamW's two moments
and, beside 16-bit weights, an fp32 master (`masters.py`). In bytes a parameter:

    bf16, full training     2 + 4 + 8 + 4 = 18       fp32     4 + 4 + 8 = 16

Beside that stands what autograd keeps from forward to backward. It is not derived here but counted:
every layer is run once on the meta device, which computes nothing, and the tensors that the graph
then holds are added up. Gradients count as there throughout, as they are from the second forward
pass of a step on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sloth.constants import GIB
from sloth.errors import BudgetTooSmall
from sloth.machine import free_host_gib
from sloth.models.decoder import Decoder
from sloth.train.config import Optimizer, TrainConfig
from sloth.train.masters import SIXTEEN_BITS
from sloth.train.memory import FRAGMENTATION, Plan, device_budget_gib, require_rows
from sloth.train.network_sizes import NetworkSizes
from sloth.train.optim import moment_bytes, trainable
from sloth.train.step_memory import WORKSPACES, StepMemory
from sloth.train.trainable import Trainable


def state_bytes_of(network: nn.Module, optimizer: Optimizer = "adamw") -> dict[str, int]:
    """Name -> bytes that training holds whatever the batch; works on the meta device, too."""
    trained = list(trainable(network).values())
    # By place: tied matrices are one.
    held = {t.data_ptr() or id(t): t for t in (*network.parameters(), *network.buffers())}
    return {
        "weights": sum(tensor.nbytes for tensor in held.values()),
        "fp32 masters": sum(4 * p.numel() for p in trained if p.dtype in SIXTEEN_BITS),
        "gradients": sum(p.numel() * _width(p) for p in trained),
        "moments": sum(moment_bytes(p.numel(), _width(p), optimizer) for p in trained),
    }


def require_room(
    needed: Mapping[str, int], name: str, device: torch.device, instead: Callable[[], str]
) -> None:
    """Raise BudgetTooSmall where `needed`, by name, is more than the device has free.

    instead: what to do then, put into words only if it comes to that.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        budget = device_budget_gib(device, held)
        assert budget is not None
        free = budget * (1 - FRAGMENTATION) - held / GIB
    else:
        on_host = free_host_gib()
        if on_host is None:
            return
        free = on_host
    total = sum(needed.values()) / GIB
    if total > free:
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in needed.items() if size)
        raise BudgetTooSmall(
            f"full training of {name} needs {total:.2f} GiB more on {device} before it reads a row "
            f"({parts}), and {free:.2f} GiB are free. {instead()}"
        )


def check_memory(model: Trainable, config: TrainConfig) -> None:
    """Raise BudgetTooSmall where the state of a full training of a loaded model will not fit."""
    if config.lora is not None or model.has_adapter or model.is_quantized:
        return
    needed = state_bytes_of(model.network, config.optimizer)
    del needed["weights"]  # they are there
    require_room(
        needed,
        model.name,
        model.device,
        lambda: "An adapter (lora=LoraConfig()), optimizer='adamw_8bit' or quant='nf4' needs less",
    )


def full_plan(
    network: Decoder, batch: int, seq: int, budget_gib: float | None, optimizer: Optimizer = "adamw"
) -> Plan:
    """The predicted peak of a step outside the fused level, where nothing is to be chosen."""
    require_rows(batch, seq)
    sizes = NetworkSizes.of(network)
    working = max(
        _backward_bytes(sizes, batch * seq),
        StepMemory(sizes, batch, seq).head_bytes(),
    )
    sixteen = [p.nbytes for p in trainable(network).values() if p.dtype in SIXTEEN_BITS]
    parts = state_bytes_of(network, optimizer) | {
        "workspaces": WORKSPACES,
        "kept by layers": kept_bytes(network, batch, seq),
        "working set": working + max(sixteen, default=0),  # a gradient on its way to its master
    }
    in_gib = {name: value / GIB for name, value in parts.items()}
    return Plan(batch, seq, (), False, sum(in_gib.values()), budget_gib, in_gib)


def kept_bytes(network: Decoder, batch: int, seq: int) -> int:
    """What autograd holds of all layers when the forward pass is over, parameters not counted."""
    dtype = network.model.embed_tokens.weight.dtype
    hidden = torch.empty(batch, seq, network.config.hidden_size, dtype=dtype, device="meta")
    hidden.requires_grad_()
    contexts, total = network.contexts(hidden, None, None), 0
    for block, context in zip(network.model.layers, contexts, strict=True):
        stand_ins = {
            name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
            for name, tensor in (*block.named_parameters(), *block.named_buffers())
        }
        held: dict[int, Tensor] = {}  # by storage: views of one tensor are one
        with saved_tensors_hooks(partial(_note, held), lambda tensor: tensor):
            torch.func.functional_call(block, stand_ins, (hidden, context))
        for tensor in (*stand_ins.values(), context.cos, context.sin):
            if tensor is not None:
                held.pop(_place(tensor), None)
        total += sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    return total


def _note(held: dict[int, Tensor], tensor: Tensor) -> Tensor:
    held[_place(tensor)] = tensor
    return tensor


def _place(tensor: Tensor) -> int:
    """A number of the storage, not given to another one while this one lives."""
    return tensor.untyped_storage()._cdata


def _backward_bytes(sizes: NetworkSizes, rows: int) -> int:
    """The most that a layer's backward holds beside what was kept.

    MLP: the gradients that arrive and leave [D] and those of act, gate and up [F]; attention: those
    of the output and of q, k, v, before and after RoPE.
    """
    mlp = 2 * sizes.hidden + 3 * sizes.ffn
    attention = 2 * sizes.hidden + sizes.queries + 2 * sizes.qkv
    return rows * max(mlp, attention) * sizes.element


def _width(parameter: Tensor) -> int:
    """Bytes of a gradient's number: those of its master."""
    return max(4, parameter.element_size())
