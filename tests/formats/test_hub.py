"""Names to files: aliases, paths, and the hub as a loopback server speaks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import validate_repo_id

import sloth
from sloth.errors import DataError, UnknownModel
from sloth.formats.hub import ALIASES, fetch_dataset, is_repo_id, resolve
from tests.formats.hub_server import COMMIT, TAGGED, serve
from tests.oracles import save_tiny_llama

# The hub library reads its settings at import, so each call runs in a process of its own.
SCRIPT = """
import json, sys, warnings
import sloth
from sloth.errors import SlothError
name, revision = sys.argv[1], sys.argv[2] or None
try:
    model = sloth.load(name, revision=revision, device="cpu")
    print(json.dumps({"name": model.name, "revision": model.revision}))
except SlothError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "evil.py").write_text("raise SystemExit")
    server = serve(folder)
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def load(address: str, cache: Path, name: str, revision: str = "", **more: str) -> dict:
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "SLOTH_CACHE": str(cache / "sloth"),
        **more,
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, revision],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_repository_loads_with_its_commit_and_then_offline_from_the_cache(address, tmp_path):
    found = load(address, tmp_path, "org/tiny")
    assert found == {"name": "org/tiny", "revision": COMMIT}
    assert load(address, tmp_path, "org/tiny", HF_HUB_OFFLINE="1") == found
    assert not list(tmp_path.rglob("evil.py"))


def test_a_revision_is_passed_through_and_resolved_to_its_commit(address, tmp_path):
    assert load(address, tmp_path, "org/tiny", "v2")["revision"] == TAGGED
    missing = load(address, tmp_path, "org/tiny", "v9")
    assert missing["error"] == "UnknownModel" and "v9" in missing["text"]


def test_gated_and_missing_repositories_say_what_to_do(address, tmp_path):
    gated = load(address, tmp_path, "org/gated")
    assert gated["error"] == "UnknownModel"
    assert "gated" in gated["text"] and "hf auth login" in gated["text"]
    missing = load(address, tmp_path, "org/nothing")
    assert missing["error"] == "UnknownModel" and "not on the hub" in missing["text"]


def test_offline_without_a_cache_is_a_clear_error(address, tmp_path):
    found = load(address, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    assert found["error"] == "UnknownModel" and "local cache" in found["text"]


def test_a_gated_alias_names_the_open_copy(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)  # made without the response it wraps

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UnknownModel, match=r"unsloth/Llama-3\.2-1B-unsloth-bnb-4bit"):
        resolve("llama-3.2-1b")


@pytest.mark.parametrize("typed", ["lama-3.2-1b", "llama-3.2-1b-instuct", "Llama 3.2 1B"])
def test_misspelt_aliases_are_answered_with_the_nearest(typed):
    with pytest.raises(UnknownModel, match=r"llama-3\.2-1b"):
        resolve(typed)


STRANGE = {
    "nothing": "",
    "a space": " ",
    "up and back": "../x/..",
    "up": "../x",
    "ends up": "x/..",
    "dots": "x/a..b",
    "here": "./x",
    "hidden": "x/.y",
    "absolute": "/no/such",
    "a drive": "C:\\x",
    "nul": "a/b\0",
    "nul before": "a\0/b",
    "escaped": "a/b%2f..",
    "an address": "https://a/b",
    "a line": "a/b\n",
    "nobody's home": "~nobody-of-that-name/x",
    "dashes": "a--b/c",
    "ends in .git": "a/b.git",
    "long": "x" * 5000,
    "two long parts": "x" * 2500 + "/" + "y" * 2500,
    "longer than the hub's": "a/" + "b" * 97,
}


@pytest.mark.parametrize("name", STRANGE)
def test_row_25_a_strange_name_is_refused_before_any_request(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **b: asked.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda *rest: asked.append(rest))
    with pytest.raises(UnknownModel, match="is no folder, no .gguf file and no alias") as caught:
        sloth.load(STRANGE[name], device="cpu")
    assert "written owner/name" in str(caught.value) and len(str(caught.value)) < 700
    with pytest.raises(DataError, match="is no data set on the hub") as refused:
        fetch_dataset(STRANGE[name])
    assert len(str(refused.value)) < 700 and not asked and not list(tmp_path.iterdir())


def test_names_that_the_hub_takes_are_taken():
    for repository in ("01-ai/Yi-6B", "a/b", "A_b.c/d-e_f.g", "x/" + "y" * 96):
        validate_repo_id(repository)
        assert is_repo_id(repository)
    assert all(is_repo_id(repository) for repository, _ in ALIASES.values())


def test_aliases_are_plain_names_of_repositories():
    for alias, (repository, open_copy) in ALIASES.items():
        assert alias == alias.lower() and "/" not in alias
        assert repository.count("/") == 1 and (open_copy is None or open_copy.count("/") == 1)


def test_paths_win_over_names_and_take_no_revision(tmp_path):
    assert resolve(str(tmp_path)).path == tmp_path
    with pytest.raises(ValueError, match="revision"):
        resolve(str(tmp_path), revision="main")
    (tmp_path / "x.txt").touch()
    with pytest.raises(UnknownModel, match="gguf"):
        resolve(str(tmp_path / "x.txt"))
    with pytest.raises(UnknownModel, match="no folder"):
        resolve(str(tmp_path / "gone.gguf"))
