"""A tokenizer of characters and a model of one hidden layer, with the interfaces the trainer asks
for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sloth.errors import KernelUnavailable
from sloth.lora_config import LoraConfig
from sloth.train.facts import Training
from sloth.train.memory import Plan
from sloth.train.trainable import Trainable

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "start": "<|start|>", "end": "<|end|>"}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "hi " * n},
            {"role": "assistant", "content": "yo" * n},
        ]
    }
    for n in (1, 3, 9, 2, 5, 14, 4, 1, 7, 6, 11)
]
PAIRS = [
    {"prompt": [{"role": "user", "content": "hi " * n}], "chosen": "yo" * n, "rejected": "no" * m}
    for n, m in ((1, 2), (3, 1), (9, 9), (2, 8), (5, 5), (7, 4), (4, 6), (1, 1), (6, 3))
]


class FakeTokenizer:
    """One id per special token, else one per ASCII character, after them."""

    def __init__(self, template: Callable[..., str] | None = None) -> None:
        self.special_tokens = SPECIALS
        self._texts = list(SPECIALS.values()) + [chr(code) for code in range(128)]
        self._ids = {text: index for index, text in enumerate(self._texts)}
        self._split = re.compile("|".join(map(re.escape, SPECIALS.values())) + "|.", re.DOTALL)
        self.bos_id, self.eos_id, self.pad_id = 0, 1, 1
        self.stop_ids = (3, 1)
        self.chat: Any = FakeTemplate(template or chatml)
        self.vocab_size = len(self._texts)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self._ids[piece] for piece in self._split.findall(text)]
        return [self.bos_id, *ids] if add_special_tokens else ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        assert not add_special_tokens
        return self.encode(text, False), [found.span() for found in self._split.finditer(text)]

    def encode_batch(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [self.encode_with_offsets(text) for text in texts]

    def fingerprint(self) -> str:
        return "characters"

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        skipped = len(SPECIALS) if skip_special_tokens else 0
        return "".join(self._texts[index] for index in ids if index >= skipped)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.txt").write_text("characters")


class FakeTemplate:
    def __init__(self, template: Callable[..., str]) -> None:
        self._template = template
        self.source, self.special_tokens = template.__name__, SPECIALS
        self.named: dict[str, str] = {}

    def render(
        self, messages: list[dict], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        return self._template(messages, add_generation_prompt)


def chatml(messages: list[dict], for_generation: bool) -> str:
    """<|start|>role NEWLINE content <|end|> NEWLINE."""
    turns = [f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in messages]
    return "<s>" + "".join(turns) + ("<|start|>assistant\n" if for_generation else "")


def reasoning(messages: list[dict], for_generation: bool) -> str:
    """chatml that keeps reasoning in the last turn only, and opens it in the generation prompt."""
    parts = ["<s>"]
    for m in messages:
        thought = f"<think>{m['thought']}</think>" if "thought" in m and m is messages[-1] else ""
        parts.append(f"<|start|>{m['role']}\n{thought}{m['content']}<|end|>\n")
    return "".join(parts) + ("<|start|>assistant\n<think>" if for_generation else "")


class FakeLinear(nn.Module):
    """x W^T + s B A dropout(x)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        self.dropout, self.is_on = 0.0, True

    def attach(self, config: LoraConfig) -> None:
        size = self.weight.shape[0]
        self.lora_A = nn.utils.skip_init(nn.Linear, size, config.r, bias=False)
        self.lora_B = nn.utils.skip_init(nn.Linear, config.r, size, bias=False)
        self.dropout = config.dropout
        drawn = torch.rand(config.r, size, generator=torch.Generator().manual_seed(0)) - 0.5
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.weight.data.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        if self.lora_A is None or self.lora_B is None or not self.is_on:
            return y
        return y + self.lora_B(self.lora_A(nn.functional.dropout(x, self.dropout, self.training)))


class FakeNetwork(nn.Module):
    """Each token sees itself and the mean of those before: enough for padding to matter if it
    leaked.
    """

    base_compute = None

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=512)
        self.embed_tokens = nn.Embedding(vocab_size, size)
        self.q_proj = FakeLinear(size)
        self.norm = nn.LayerNorm(size)
        self.lm_head = nn.Linear(size, vocab_size, bias=False)
        self.as_stored = nullcontext
        self.num_released = 0

    def release(self) -> None:
        self.num_released += 1

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(tokens)
        seen = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype).tril()
        if positions is not None:
            document = (positions.to(x.device) == 0).cumsum(1)
            seen = seen * (document[:, :, None] == document[:, None])
        mean = (seen / seen.sum(-1, keepdim=True)) @ x
        return self.lm_head(self.norm(torch.tanh(self.q_proj(x + mean))))


class FakeModel:
    """Keeps to what `sloth.Model` offers the trainer. calls: what was saved, in order."""

    level, level_reason = "reference", "it is a fake"
    planner: Any = SimpleNamespace(memory_gib=None, forget=lambda: None)

    def __init__(self, seed: int = 0, is_quantized: bool = False, device: str = "cpu") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Of what these two are, training asks for a part.
            self.tokenizer: Any = FakeTokenizer()
            self.network: Any = FakeNetwork(self.tokenizer.vocab_size, 16).to(device)
        self.network.requires_grad_(not is_quantized)
        self.device = torch.device(device)
        self.name = "fake"
        self.revision: str | None = None
        self.training: Training | None = None
        self.is_quantized = is_quantized
        self.lora_config: LoraConfig | None = None
        self.calls: list[str] = []

    @property
    def has_adapter(self) -> bool:
        return self.lora_config is not None

    def add_lora(self, config: LoraConfig | None = None) -> FakeModel:
        self.lora_config = config or LoraConfig()
        self.network.requires_grad_(False)
        self.network.q_proj.attach(self.lora_config)
        self.network.to(self.device)
        return self

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        num_trained: int | Tensor | None = None,
    ) -> Tensor:
        logits, targets = self._logits_and_targets(tokens, labels, positions)
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        return total / (num_trained if num_trained is not None else (targets != -100).sum())

    def logprobs(
        self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        labels = tokens if labels is None else labels
        logits, targets = self._logits_and_targets(tokens, labels, positions)
        return -nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )

    def _logits_and_targets(
        self, tokens: Tensor, labels: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens, labels = tokens.to(self.device), labels.to(self.device)
        if positions is not None:
            labels = labels.masked_fill(positions.to(self.device) == 0, -100)
        return self.network(tokens, positions)[:, :-1], labels[:, 1:]

    def plan(self, *, batch: int, seq: int, memory_gib: float | None = None) -> Plan:
        raise KernelUnavailable("memory_gib: a fake plans nothing")

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        self.network.q_proj.is_on = False
        yield
        self.network.q_proj.is_on = True

    def save_adapter(self, folder: Path) -> Path:
        return self._save(folder, "adapter")

    def save_merged(self, folder: Path) -> Path:
        return self._save(folder, "merged")

    def _save(self, folder: Path, what: str) -> Path:
        self.calls.append(what)
        folder.mkdir(parents=True)
        (folder / "weights.txt").write_text(what)
        return folder


if TYPE_CHECKING:  # mypy, which reads this file too, says where the fake lacks what training asks
    _asked: Trainable = FakeModel()
