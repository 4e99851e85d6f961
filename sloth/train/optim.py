"""AdamW over the trainable parameters, the gradient norm, and clipping.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101. Decay leaves out 1-D parameters
(norms, biases). State keeps the parameter's dtype. Names, not positions, identify state in a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPS = 1e-8

_FUSED_DEVICES = ("cuda", "cpu")


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with a gradient, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def build_optimizer(
    parameters: dict[str, nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with matrices decayed and vectors not; fused where torch has that kernel."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in _FUSED_DEVICES for p in parameters.values())
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=lr, betas=BETAS, eps=EPS, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, a scalar on their device; NaN or inf if any entry is."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float | None) -> None:
    """Scale all gradients by min(1, largest / norm)."""
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """State as flat tensors: `<parameter name>|exp_avg`, `|exp_avg_sq`, `|step`."""
    return {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
) -> None:
    """Undo `optimizer_tensors`."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        by_name.setdefault(name, {})[key] = tensor
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
