"""AdamW over the trainable parameters in groups of rate and decay; the gradient norm; clipping.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101. Decay leaves out 1-D parameters
(norms, biases). Rates: `lr`; `embedding_lr` for the embedding and the head; `lora_plus` times the
rate for LoRA's B, which starts at zero and learns features faster with a larger one (LoRA+, Hayou
et al. 2024, https://arxiv.org/abs/2402.12354; they advise 16). The schedule scales all alike.

8 bits: bitsandbytes keeps m and v as codes with a scale per block of 256 (Dettmers et al. 2022,
https://arxiv.org/abs/2110.02861): 2 bytes a parameter in place of 8. Names, not positions, identify
state in a checkpoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sloth.train.config import Optimizer, TrainConfig

BETAS = (0.9, 0.999)
EPS = 1e-8
# Smaller tensors keep 32-bit moments: they are few bytes and the noisiest (the library's default).
MIN_8BIT_SIZE = 4096

_OF_VOCABULARY = (
    "embed_tokens.weight",
    "lm_head.weight",
    "trainable_tokens_delta",
    "lora_embedding_A",
    "lora_embedding_B",
)

_FUSED_DEVICES = ("cuda", "cpu")


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with a gradient, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def kind_of(name: str) -> str:
    """embedding (a matrix over the vocabulary, rows of it, LoRA on the input's), lora_B, or
    other."""
    if ".lora_B." in name:
        return "lora_B"
    return "embedding" if name.endswith(_OF_VOCABULARY) else "other"


def rate_scales(config: TrainConfig) -> dict[str, float]:
    """What the scheduled rate is multiplied with, by kind of parameter."""
    embedding = 1.0 if config.embedding_lr is None else config.embedding_lr / config.lr
    return {"embedding": embedding, "lora_B": config.lora_plus or 1.0, "other": 1.0}


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """One group per rate and decay that occurs. Raises ValueError for a rate without takers."""
    kinds = {kind_of(name) for name in parameters}
    if config.embedding_lr is not None and "embedding" not in kinds:
        raise ValueError(
            f"embedding_lr={config.embedding_lr:g} has no effect: neither embed_tokens nor lm_head "
            "is trained; add them to lora.modules_to_save, or leave embedding_lr out"
        )
    if config.lora_plus is not None and "lora_B" not in kinds:
        raise ValueError(f"lora_plus={config.lora_plus:g} has no effect without a LoRA adapter")
    scales = rate_scales(config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        scale = scales[kind_of(name)]
        group = groups.setdefault(
            (scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW, fused where torch has that kernel; or bitsandbytes' 8-bit one."""
    groups = parameter_groups(parameters, config)
    if config.optimizer == "adamw_8bit":
        library = eight_bit_library()
        return library.optim.AdamW8bit(
            groups, lr=config.lr, betas=BETAS, eps=EPS, min_8bit_size=MIN_8BIT_SIZE
        )
    fused = all(p.device.type in _FUSED_DEVICES for p in parameters.values())
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=fused)


def eight_bit_library() -> Any:
    """bitsandbytes, an extra. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"optimizer='adamw_8bit' needs bitsandbytes: pip install 'sloth-llm[bnb]' ({error})"
        ) from error


def state_bytes(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> int:
    """Bytes of both moments, once they exist."""
    return sum(
        moment_bytes(p.numel(), p.element_size(), config.optimizer) for p in parameters.values()
    )


def moment_bytes(count: int, element: int, optimizer: Optimizer) -> int:
    """Bytes of both moments of `count` numbers of `element` bytes each."""
    is_8bit = optimizer == "adamw_8bit" and count >= MIN_8BIT_SIZE
    return count * (2 if is_8bit else 2 * element)


@torch.no_grad()
def make_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """AdamW's state before its first step, in full: what lacks the memory for it fails here, with
    no weight changed yet, and not half-way through an update. 8-bit moments come with the step.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for parameter in parameters.values():
        state = optimizer.state[parameter]
        if not state:
            device = parameter.device if optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, scaled in each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, a scalar on their device; NaN or inf if any entry is."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float | None) -> None:
    """Scale all gradients by min(1, largest / norm)."""
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """State as flat tensors: `<parameter name>|exp_avg`, `|exp_avg_sq`, `|step`; in 8 bits
    `|state1`, `|absmax1`, `|qmap1` and so on.
    """
    return {
        f"{name}|{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Undo `optimizer_tensors`: each value in the dtype it was stored in."""
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if key != "step":
            state[key] = tensor.to(parameter.device)
        elif not isinstance(optimizer, torch.optim.AdamW):  # bitsandbytes counts with an int
            state[key] = int(tensor)
        else:  # torch's fused kernel reads the count on the device, the others on the CPU
            state[key] = tensor.to(parameter.device if optimizer.defaults["fused"] else "cpu")
