"""Written files in llama.cpp itself: logits, text, adapters, token ids. Needs llama-cpp-python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sloth
from sloth.formats.gguf_tokenizer import PRE_TOKENIZERS, rebuild_tokenizer
from sloth.formats.gguf_vocabulary import PROBE_TEXTS
from sloth.infer.generate import generate_tokens
from tests.formats.test_gguf_tokenizer import byte_level_metadata, sentencepiece_metadata
from tests.oracles import llama_cpp, llama_cpp_greedy, save_tiny
from tests.test_lora import randomised
from tests.text.test_tokenizer import TEXTS, byte_level_folder, sentencepiece_model
from tests.tiny_configs import GGUF_TYPES, LLAMA_VARIANTS
from tests.tolerance import LLAMA_CPP_LOGITS

TOKENS = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
NUM_NEW = 32
DECOMPOSED = "e\u0301"  # llama.cpp composes no characters, as Qwen's tokenizer does first

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in GGUF_TYPES}
CASES |= {
    name: ("llama", LLAMA_VARIANTS[name]) for name in ("tied_biased", "linear", "yarn", "llama3")
}
CASES["gemma3, scaled"] = (
    "gemma3_text",
    {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    },
)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_sloth_does(case: str, tmp_path: Path) -> None:
    model_type, settings = CASES[case]
    folder = save_tiny(model_type, tmp_path / "base", **{"vocab_size": 384, **settings})
    byte_level_folder(folder)
    model = sloth.load(folder, device="cpu", level="reference")
    path = model.save_gguf(tmp_path / "out" / "model.gguf", "f16")
    again = sloth.load(path, device="cpu", level="reference")
    texts = [text for text in TEXTS if text]
    got, ids = llama_cpp(path, TOKENS[0].tolist(), texts)
    with torch.no_grad():
        assert error(got, again.logits(TOKENS)[0]) < LLAMA_CPP_LOGITS
    assert ids == [model.tokenizer.encode(text) for text in texts]

    randomised(model.add_lora(r=4, alpha=8, use_rslora=True))
    model.save_adapter(tmp_path / "adapter", format="gguf")
    adapted, _ = llama_cpp(path, TOKENS[0].tolist(), [], tmp_path / "adapter" / "adapter.gguf")
    with torch.no_grad():
        assert error(adapted, model.logits(TOKENS)[0]) < LLAMA_CPP_LOGITS
    assert error(adapted, got) > 10 * LLAMA_CPP_LOGITS, "the adapter changed nothing"


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_continues_with_the_same_32_tokens(case: str, tmp_path: Path) -> None:
    model_type, settings = CASES[case]
    folder = save_tiny(model_type, tmp_path / "base", **{"vocab_size": 384, **settings})
    byte_level_folder(folder)
    path = sloth.load(folder, device="cpu").save_gguf(tmp_path / "out" / "model.gguf", "f16")
    network = sloth.load(path, device="cpu", level="reference").network
    prompt = TOKENS[0].tolist()
    ours = [step[0] for step in generate_tokens(network, [prompt], NUM_NEW)]
    assert ours == llama_cpp_greedy(path, prompt, NUM_NEW)


@pytest.mark.parametrize("kind", ["sentencepiece", *PRE_TOKENIZERS])
def test_llama_cpp_splits_text_as_sloth_does(kind: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base", vocab_size=384, num_hidden_layers=1)
    metadata = byte_level_metadata(pre=kind)
    if kind == "sentencepiece":
        metadata = sentencepiece_metadata(sentencepiece_model())
    for name, content in rebuild_tokenizer(metadata).items():
        (folder / name).write_text(content)
    model = sloth.load(folder, device="cpu")
    path = model.save_gguf(tmp_path / "out" / "model.gguf")
    texts = [text for text in (*TEXTS, *PROBE_TEXTS) if text]
    if kind == "qwen2":
        texts = [text for text in texts if DECOMPOSED not in text]
    _, ids = llama_cpp(path, [1], texts)
    assert ids == [model.tokenizer.encode(text) for text in texts]
