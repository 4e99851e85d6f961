"""sloth: fine-tune Llama, Mistral, Gemma and Qwen models, fast and exact.

    import sloth
    model = sloth.load("llama-3.2-1b", quant="nf4")
    model.train("data.jsonl", max_steps=200)
    model.save_adapter("my-adapter")

Names are imported on first use, so `import sloth` is quick and `sloth --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sloth.estimating import estimate
    from sloth.loading import load
    from sloth.lora_config import LoraConfig
    from sloth.model import Model
    from sloth.train.config import TrainConfig
    from sloth.train.trainer import Trainer, TrainReport

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "Model",
    "TrainConfig",
    "TrainReport",
    "Trainer",
    "errors",
    "estimate",
    "load",
]

# public name -> module that defines it
_HOMES = {
    "estimate": "sloth.estimating",
    "load": "sloth.loading",
    "LoraConfig": "sloth.lora_config",
    "Model": "sloth.model",
    "TrainConfig": "sloth.train.config",
    "Trainer": "sloth.train.trainer",
    "TrainReport": "sloth.train.trainer",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("sloth.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'sloth' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
