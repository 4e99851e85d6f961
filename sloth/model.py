"""`Model`: a network with its tokenizer, its chat template and where it came from.

It delegates: training to `train`, generation to `infer`, files to `exporting`. What computes is
`model.network`, a plain nn.Module with Hugging Face's parameter names; gradients come through
ordinary autograd, so any loop and any torch optimizer work on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sloth import exporting, exporting_gguf, new_tokens
from sloth.errors import AdapterMismatch, KernelUnavailable, TokenizerMissing
from sloth.infer.text import Prompt, generate_text, is_batch, stream_text
from sloth.kernels.dispatch import choose_level
from sloth.kernels.fp8 import BaseCompute, refuse_dora
from sloth.lora import adapter_disabled, attach_lora, has_adapter, is_lora_name
from sloth.lora_config import LoraConfig
from sloth.models.decoder import Decoder
from sloth.models.inputs import check_labels, check_positions, check_tokens, checked_divisor
from sloth.planning import Planner
from sloth.text.tokenizer import Tokenizer
from sloth.train.config import TrainConfig
from sloth.train.memory import Plan

if TYPE_CHECKING:
    from sloth.pushing import Pushed
    from sloth.train.facts import Training
    from sloth.train.trainer import TrainReport


class Model:
    """What `sloth.load` returns.

    network: nn.Module; `network(tokens, positions=None)` gives logits. name: what was loaded, as
    the adapter's base. revision: commit hash on the hub, None for local files. level, level_reason:
    kernel level in use and why. originals: CPU copies of the matrices that an adapter trains in
    full. carried: names of frozen matrices that came with an adapter, which is saved with them
    again. base_is_tied: whether the base, before any adapter, shares its embedding with the head.
    wrapper: model_type of the multimodal model whose text tower this is, None for a text model.
    license: the base's, where its card says one. training: the last run on this model, for the card
    that `save_adapter`, `save_merged` and `push` write.
    """

    def __init__(
        self,
        network: Decoder,
        hf_config: dict[str, Any],
        tokenizer: Tokenizer | None,
        *,
        name: str,
        revision: str | None = None,
        wrapper: str | None = None,
        license: str | None = None,
        requested_level: str = "auto",
        is_quantized: bool = False,
        frozen_base: bool = False,
        base_compute: BaseCompute = None,
    ) -> None:
        self.network = network
        network.base_compute = base_compute
        self.hf_config = hf_config
        self.name, self.revision, self.wrapper = name, revision, wrapper
        self.license = license
        self.training: Training | None = None
        self.is_quantized = is_quantized
        self.base_is_tied = network.tied
        self.lora_config: LoraConfig | None = None
        self.originals: dict[str, Tensor] = {}
        self.carried: list[str] = []
        self._tokenizer = tokenizer
        self._new_ids: list[int] = []
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

    @property
    def planner(self) -> Planner:
        """The plans of steps at the fused level; see `plan`."""
        return self._planner

    def __repr__(self) -> str:
        kind = "NF4" if self.is_quantized else str(self.dtype).removeprefix("torch.")
        adapter = ", adapter" if self.has_adapter else ""
        return f"Model({self.name!r}, {kind}, {self.device}, {self.level}{adapter})"

    # -- computing -------------------------------------------------------------------------------

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V] in the compute dtype.

        positions: [T] or [B, T]; where they restart at 0, a new packed document begins.
        Raises ValueError for tokens that are no int32 or int64 matrix, empty or, given on the host,
        outside the vocabulary, and for positions of another length. So do the calls below.
        """
        return self.network(self._checked(tokens, positions), positions)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        num_trained: int | Tensor | None = None,
    ) -> Tensor:
        """Next-token cross-entropy, an fp32 scalar: summed over trained labels, over their number.

        tokens, labels: [B, T]; labels are shifted here, -100 is not trained. num_trained: divisor
        in place of this batch's count, for steps of several micro-batches; above 0.
        """
        tokens = self._checked(tokens, positions)
        check_labels(labels, tokens, self.config.vocab_size)
        return self.network.loss(tokens, labels, positions, checked_divisor(num_trained))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D] after the final norm, in the compute dtype.

        What the output head multiplies; differentiable. positions: as for `logits`.
        """
        return self.network.hidden_states(self._checked(tokens, positions), positions)

    def logprobs(
        self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """log p(token t + 1 | tokens up to t): token ids [B, T] -> fp32 [B, T - 1].

        For losses of one's own: differentiable, and computed in chunks, so that no tensor of B T
        times the vocabulary is kept, forward or backward. labels: [B, T], other tokens to ask about
        than those that follow; -100 where none is wanted, as after the end of a padded row, which
        gives 0 and costs nothing. positions: as for `logits`; the first token of each document
        gives 0.
        """
        tokens = self._checked(tokens, positions)
        if labels is not None:
            check_labels(labels, tokens, self.config.vocab_size)
        return self.network.logprobs(tokens, labels, positions)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, the model computes as its base: without LoRA, and with the matrices that the
        adapter trains in full as they were. Raises AdapterMismatch without an adapter.
        """
        if not self.has_adapter:
            raise AdapterMismatch("adapter_off: the model has no adapter; add_lora attaches one")
        parameters = dict(self.network.named_parameters()) if self.originals else {}
        trained = {name: parameters[name].data for name in self.originals}
        with adapter_disabled(self.network):
            try:
                for name, original in self.originals.items():
                    parameters[name].data = original.to(trained[name])
                yield
            finally:
                for name, value in trained.items():
                    parameters[name].data = value

    def _checked(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        check_tokens(tokens, self.config.vocab_size)
        check_positions(positions, tokens)
        return tokens.to(self.device)

    # -- training --------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig | None = None, **overrides: Any) -> Model:
        """Freeze the base and attach a LoRA adapter. Raises NoTargets, AdapterMismatch.

        Its start values do not depend on torch's generators: they are drawn from a fixed seed, and
        by `train`, which finds them as they were drawn, once more from its own (`seed`). So the
        same seed gives the same adapter whether it was attached here or by `train(lora=...)`.
        """
        config = LoraConfig(**{**(config or LoraConfig()).model_dump(), **overrides})
        self._attach(config, strict=True)
        return self

    def add_tokens(
        self, tokens: Sequence[str], init: str = "mean", special: bool = False
    ) -> list[int]:
        """Teach the tokenizer new tokens and give them rows in embedding and head; their ids.

        init: "mean" of all known rows, which any position can begin with; "normal", drawn with
        their mean and deviation; or "zeros". special: left out when text is decoded for show. An
        adapter attached afterwards trains the new rows and carries them
        (`trainable_token_indices`), unless `modules_to_save` trains all. Raises ValueError for
        tokens that are there already, AdapterMismatch once an adapter is attached,
        TokenizerMissing.
        """
        ids = new_tokens.add_tokens(self, tokens, init, special)
        self._new_ids += ids
        self.hf_config["vocab_size"] = self.config.vocab_size
        self._planner.forget()
        return ids

    def take_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Use this tokenizer from now on: the model's own with tokens added."""
        self._tokenizer = tokenizer

    def _attach(self, config: LoraConfig, strict: bool) -> None:
        if self.network.base_compute is not None and config.use_dora:
            refuse_dora()
        config = new_tokens.carrying(config, self.network, self._new_ids)
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
            self._requested_level,
            self.network.model_type,
            trainable_base,
            self.network.base_compute,
        )
        self.network.set_level(self.level)
        self._planner.forget()
        self.network.planner = self._planner.keeps if self.level == "fused" else None

    def plan(self, *, batch: int, seq: int, memory_gib: float | None = None) -> Plan:
        """Choose what every layer keeps for batches of this shape, and predict the step's peak.

        memory_gib: the budget from here on, for other shapes too; None for what is free on the
        device. Called by itself on a new shape. Raises BudgetTooSmall when even the smallest plan
        does not fit a stated budget, and ValueError for what is no shape or budget, after which
        the budget of before holds; KernelUnavailable below the fused level, which plans nothing.
        """
        if self.level != "fused":
            raise KernelUnavailable(
                f"only the fused level has plans, and takes memory_gib; this model runs at "
                f"{self.level}: {self.level_reason}"
            )
        return self._planner.set_budget(memory_gib, batch, seq)

    def train(self, data: Any, config: TrainConfig | None = None, **overrides: Any) -> TrainReport:
        """Train on `data`; the settings are a TrainConfig's.

        data: a file (JSONL, JSON, CSV, TSV, TXT, Parquet), a folder with train.* and valid.*,
        hf://datasets/owner/name, or rows: a list, an iterator, a `datasets.Dataset`, a DataFrame,
        an arrow Table, a mapping of splits. An NF4 model without an adapter gets the settings'
        `lora`, or `LoraConfig()`.

        Raises, before the first step, ValueError for settings that cannot be or take no effect,
        DataError, TokenizerMissing, AdapterMismatch, NoTargets, BudgetTooSmall, OutputExists,
        CheckpointMismatch and SaveFailed for a disk without room; later NonFiniteGradients,
        OutOfMemory, SaveFailed, Interrupted after SIGINT or SIGTERM, and RankFailed where another
        process failed.
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

        PEFT's names are those of the model that was loaded: of the whole multimodal model where
        this is its text tower.
        Raises AdapterMismatch without one, OutputExists.
        """
        if format not in ("peft", "gguf"):
            raise ValueError(f"format must be 'peft' or 'gguf', got {format!r}")
        if format == "gguf":
            return exporting_gguf.save_gguf_adapter(self, Path(folder).expanduser())
        return exporting.save_adapter(self, Path(folder).expanduser())

    def save_merged(self, folder: str | Path, dtype: str | torch.dtype | None = None) -> Path:
        """Write a Hugging Face folder with the adapter merged, in `dtype` (default: compute).

        A multimodal model's text tower is written as the text model it is.
        """
        return exporting.save_merged(self, Path(folder).expanduser(), dtype)

    def save_base(self, folder: str | Path, quant: str | None = None) -> Path:
        """Write the model without its adapter: dense, or bitsandbytes with quant="nf4"."""
        return exporting.save_base(self, Path(folder).expanduser(), quant)

    def save_gguf(self, path: str | Path, quant: str = "f16") -> Path:
        """Write one GGUF file with the adapter merged, and a Modelfile for Ollama beside it
        (<name>.Modelfile where there is one).

        path: ends in .gguf. quant: "f16", "bf16", "q8_0" or "q4_0". An NF4 base is dequantised
        first. Raises UnsupportedConfig for what such files cannot say, TokenizerMissing,
        OutputExists.
        """
        return exporting_gguf.save_gguf(self, Path(path).expanduser(), quant)

    def push(
        self,
        repo_id: str,
        *,
        private: bool = True,
        merged: bool = False,
        message: str | None = None,
    ) -> Pushed:
        """Upload the adapter, or with merged=True the whole model, and its card to the hub.

        repo_id: owner/name, made where there is none. The token is the one of `hf auth login` or
        HF_TOKEN. Gives the page's url and the commit. Raises UploadFailed, saying what to do.
        """
        from sloth.pushing import push

        return push(self, repo_id, private=private, merged=merged, message=message)
