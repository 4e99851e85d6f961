"""`Model`: a network with its tokenizer, its chat template and where it came from.

It delegates: training to `train`, generation to `infer`, files to `exporting`. What computes is
`model.network`, a plain nn.Module with Hugging Face's parameter names; gradients come through
ordinary autograd, so any loop and any torch optimizer work on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sloth import exporting, exporting_gguf
from sloth.errors import KernelUnavailable, TokenizerMissing
from sloth.infer.text import Prompt, generate_text, is_batch, stream_text
from sloth.kernels.dispatch import choose_level
from sloth.lora import attach_lora, has_adapter, is_lora_name
from sloth.lora_config import LoraConfig
from sloth.models.decoder import Decoder
from sloth.planning import Planner
from sloth.text.tokenizer import Tokenizer
from sloth.train.config import TrainConfig
from sloth.train.memory import Plan

if TYPE_CHECKING:
    from sloth.train.trainer import TrainReport


class Model:
    """What `sloth.load` returns.

    network: nn.Module; `network(tokens, positions=None)` gives logits. name: what was loaded, as
    the adapter's base. revision: commit hash on the hub, None for local files. level, level_reason:
    kernel level in use and why. originals: CPU copies of the matrices that an adapter trains in
    full. base_is_tied: whether the base, before any adapter, shares its embedding with the head.
    """

    def __init__(
        self,
        network: Decoder,
        hf_config: dict[str, Any],
        tokenizer: Tokenizer | None,
        *,
        name: str,
        revision: str | None = None,
        requested_level: str = "auto",
        is_quantized: bool = False,
        frozen_base: bool = False,
    ) -> None:
        self.network = network
        self.hf_config = hf_config
        self.name, self.revision = name, revision
        self.is_quantized = is_quantized
        self.base_is_tied = network.tied
        self.lora_config: LoraConfig | None = None
        self.originals: dict[str, Tensor] = {}
        self._tokenizer = tokenizer
        self._requested_level = requested_level
        self._planner = Planner(network)
        if not frozen_base:  # with an adapter on its way the base is about to be frozen
            self._update_level()

    # -- what it is ------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The architecture's own config, e.g. `LlamaConfig`."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.network.model.embed_tokens.weight.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerMissing when the model's folder held no tokenizer files."""
        if self._tokenizer is None:
            raise TokenizerMissing(
                f"{self.name} came without tokenizer files (tokenizer.json or tokenizer.model); "
                "token ids work, text does not"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether text calls work."""
        return self._tokenizer is not None

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA is attached."""
        return has_adapter(self.network)

    def __repr__(self) -> str:
        kind = "NF4" if self.is_quantized else str(self.dtype).removeprefix("torch.")
        adapter = ", adapter" if self.has_adapter else ""
        return f"Model({self.name!r}, {kind}, {self.device}, {self.level}{adapter})"

    # -- computing -------------------------------------------------------------------------------

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V] in the compute dtype.

        positions: [T] or [B, T]; where they restart at 0, a new packed document begins.
        Raises ValueError for tokens that are no integer matrix or outside the vocabulary.
        """
        return self.network(self._checked(tokens), positions)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        num_trained: int | Tensor | None = None,
    ) -> Tensor:
        """Next-token cross-entropy, an fp32 scalar: summed over trained labels, over their number.

        tokens, labels: [B, T]; labels are shifted here, -100 is not trained. num_trained: divisor
        in place of this batch's count, for steps of several micro-batches.
        """
        tokens = self._checked(tokens)
        if labels.shape != tokens.shape:
            raise ValueError(
                f"labels have shape {list(labels.shape)}, not the {list(tokens.shape)} of tokens"
            )
        return self.network.loss(tokens, labels, positions, num_trained)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be integers of shape [batch, length], got {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        return tokens.to(self.device)

    # -- training --------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig | None = None, **overrides: Any) -> Model:
        """Freeze the base and attach a LoRA adapter. Raises NoTargets, AdapterMismatch."""
        config = LoraConfig(**{**(config or LoraConfig()).model_dump(), **overrides})
        self._attach(config, strict=True)
        return self

    def _attach(self, config: LoraConfig, strict: bool) -> None:
        attach_lora(self.network, config, strict)
        self.lora_config = config
        self.originals = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad and not is_lora_name(name)
        }
        self._update_level()

    def _update_level(self) -> None:
        trainable_base = any(
            parameter.requires_grad and not is_lora_name(name)
            for name, parameter in self.network.model.layers.named_parameters()
        )
        self.level, self.level_reason = choose_level(
            self._requested_level, self.network.model_type, trainable_base
        )
        self.network.set_level(self.level)
        self._planner.forget()
        self.network.planner = self._planner.keeps if self.level == "fused" else None

    def plan(self, *, batch: int, seq: int, memory_gib: float | None = None) -> Plan:
        """Choose what every layer keeps for batches of this shape, and predict the step's peak.

        memory_gib: the budget from here on, for other shapes too; None for what is free on the
        device. Called by itself on a new shape. Raises BudgetTooSmall when even the smallest plan
        does not fit a stated budget, KernelUnavailable below the fused level, which plans nothing.
        """
        if self.level != "fused":
            raise KernelUnavailable(
                f"only the fused level has plans; this model runs at {self.level}: "
                f"{self.level_reason}"
            )
        self._planner.memory_gib = memory_gib
        self._planner.forget()
        return self._planner.plan(batch, seq)

    def train(self, data: Any, config: TrainConfig | None = None, **overrides: Any) -> TrainReport:
        """Train on `data` (a JSONL path, rows, or an iterator); the settings are a TrainConfig's.

        An NF4 model without an adapter gets `LoraConfig()`. Raises DataError, OutputExists,
        NonFiniteGradients.
        """
        from sloth.train.trainer import Trainer

        return Trainer(self, data, config, **overrides).run()

    # -- generating ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
    ) -> str | list[str] | Iterator[str]:
        """New text after `prompt`: a str is raw text, a list of messages is put in the chat
        template.

        A list of either is decoded as one batch and gives a list. temperature 0 is greedy. stop:
        texts that end the answer and are cut off. stream=True gives an iterator of pieces, for one
        prompt. Raises TokenizerMissing, ValueError.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        marks = [stop] if isinstance(stop, str) else list(stop or [])
        if not all(marks):
            raise ValueError("a stop text is empty")
        batch = is_batch(prompt)
        prompts: Any = list(prompt) if batch else [prompt]
        if stream:
            if batch:
                raise ValueError("stream=True takes one prompt, not a list of them")
            return stream_text(
                self.network, self.tokenizer, prompts[0], max_new_tokens, temperature, marks
            )
        if not prompts:
            return []
        answers = generate_text(
            self.network, self.tokenizer, prompts, max_new_tokens, temperature, marks
        )
        return answers if batch else answers[0]

    # -- saving ----------------------------------------------------------------------------------

    def save_adapter(self, folder: str | Path, format: str = "peft") -> Path:
        """Write the adapter as PEFT files, or with format="gguf" as adapter.gguf.

        Raises AdapterMismatch without one, OutputExists.
        """
        if format not in ("peft", "gguf"):
            raise ValueError(f"format must be 'peft' or 'gguf', got {format!r}")
        if format == "gguf":
            return exporting_gguf.save_gguf_adapter(self, Path(folder))
        return exporting.save_adapter(self, Path(folder))

    def save_merged(self, folder: str | Path, dtype: str | torch.dtype | None = None) -> Path:
        """Write a Hugging Face folder with the adapter merged, in `dtype` (default: compute)."""
        return exporting.save_merged(self, Path(folder), dtype)

    def save_base(self, folder: str | Path, quant: str | None = None) -> Path:
        """Write the model without its adapter: dense, or bitsandbytes with quant="nf4"."""
        return exporting.save_base(self, Path(folder), quant)

    def save_gguf(self, path: str | Path, quant: str = "f16") -> Path:
        """Write one GGUF file with the adapter merged, and a Modelfile for Ollama beside it.

        path: ends in .gguf. quant: "f16", "bf16", "q8_0" or "q4_0". An NF4 base is dequantised
        first. Raises UnsupportedConfig for what such files cannot say, TokenizerMissing,
        OutputExists.
        """
        return exporting_gguf.save_gguf(self, Path(path), quant)
