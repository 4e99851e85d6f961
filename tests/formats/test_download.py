"""Row 27: what a hub download can go through, and still be the right bytes or an error."""

from __future__ import annotations

import hashlib

import pytest
from huggingface_hub import constants

from sloth.errors import CheckpointMismatch, UnknownModel
from sloth.formats import download
from sloth.formats.hub import resolve
from tests.formats.hub_server import Traffic, serve

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    traffic = Traffic()
    server = serve(folder, traffic)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setenv("SLOTH_CACHE", str(tmp_path / "sloth"))
    yield traffic
    server.shutdown()


def fetched():
    return (resolve("org/tiny").path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "faults",
    [["cut"], ["stall"], ["500", "500"], ["corrupt"], ["cut", "500", "corrupt", "stall"]],
    ids="-".join,
)
def test_row_27_the_right_bytes_come_through(hub, faults):
    hub.faults["model.safetensors"] = list(faults)
    assert fetched() == CONTENT
    assert not hub.faults["model.safetensors"], "every fault was met"


def test_weights_in_two_layouts_come_once(hub):
    fetched()
    names = {file.name for file in resolve("org/tiny").path.iterdir()}
    assert names == {"model.safetensors", "config.json"}


def test_row_27_a_cut_transfer_goes_on_where_it_stopped(hub):
    hub.faults["model.safetensors"] = ["cut"]
    assert fetched() == CONTENT
    assert hub.resumed == [len(CONTENT) // 2]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("corrupt", CheckpointMismatch, r"model\.safetensors came 4 times with other bytes"),
        ("500", UnknownModel, "org/tiny could not be fetched"),
    ],
)
def test_row_27_what_does_not_pass_is_an_error_and_leaves_no_wrong_bytes(hub, fault, error, said):
    hub.faults["model.safetensors"] = [fault] * 4
    with pytest.raises(error, match=said):
        resolve("org/tiny")
    assert fetched() == CONTENT


def test_row_27_each_file_is_hashed_once_and_damage_before_that_is_found(hub, monkeypatch):
    hashed = []
    plain = hashlib.file_digest

    def counting(stream, name):
        hashed.append(stream.name)
        return plain(stream, name)

    monkeypatch.setattr(download.hashlib, "file_digest", counting)
    blob = (resolve("org/tiny").path / "model.safetensors").resolve()
    assert hashed.count(str(blob)) == 1
    fetched()
    assert hashed.count(str(blob)) == 1
    # Damaged since: its size is the same, its time is not.
    blob.write_bytes(CONTENT[:-1] + b"?")
    assert fetched() == CONTENT
    (mark,) = (m for m in (download.cache_root() / "verified").iterdir() if m.name == blob.name)
    mark.write_bytes(b"")  # as an older version left it
    assert fetched() == CONTENT and mark.read_bytes()


def test_row_27_the_cache_serves_without_a_hub(hub, monkeypatch):
    assert fetched() == CONTENT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == CONTENT
