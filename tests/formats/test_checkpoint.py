"""Safetensors folders: what is read, what is refused before it can hurt, what is written."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sloth.errors import CheckpointMismatch
from sloth.formats import checkpoint
from sloth.formats.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsFolder,
    read_header,
    write_safetensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int = 0, end: int = 4, shape: tuple[int, ...] = (1,)) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def test_single_and_sharded_folders_read_back_equal(tmp_path):
    for name, limit in (("single", 10**9), ("sharded", 10)):
        folder = tmp_path / name
        folder.mkdir()
        files = write_safetensors(folder, iter(TENSORS.items()), max_shard_bytes=limit)
        opened = SafetensorsFolder(folder)
        assert opened.names.keys() == TENSORS.keys()
        assert all(torch.equal(opened.tensor(key), value) for key, value in TENSORS.items())
        assert opened.names["b"].dtype == "BF16" and opened.names["a"].shape == (2, 3)
        assert len(files) == (1 if name == "single" else 2)
    index = json.loads((tmp_path / "sharded" / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 32, "total_parameters": 10}
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_written_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        (file,) = write_safetensors(tmp_path, iter(TENSORS.items()))
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[1, 2]", "no object"),
        (b"{not json", "cannot be read"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), "twice"),
        ({"a": {"dtype": "F32"}}, "describe a"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "damaged"),
        ({"a": entry(), "b": entry(8, 12)}, "damaged"),
        ({"a": entry(0, 4, (2**40, 2**40))}, "damaged"),
        ({"a": entry(0, 2**40)}, "damaged"),
        ({"a": entry(0, 12, (2,))}, "damaged"),
        ({"a": entry(0, 12, (3,)) | {"dtype": "F64"}}, "damaged"),
        ({"a": entry(0, 12, (3,)) | {"dtype": "F99"}}, "damaged"),
        ({"a": entry(0, 8, (2,))}, "damaged"),
        ({"a": entry(4, 12, (2,))}, "damaged"),
        ({"a": entry(4, 0), "b": entry(4, 12, (2,))}, "damaged"),
        (b"[" * 5000, "cannot be read"),
        ({"a": entry() | {"shape": 5}}, "describe a"),
        ({"a": entry() | {"shape": [1, "2"]}}, "describe a"),
        ({"a": entry() | {"shape": [True]}}, "describe a"),
        ({"a": entry() | {"shape": [-1]}}, "describe a"),
        ({"a": entry() | {"shape": None}}, "describe a"),
        ({"a": entry() | {"data_offsets": {"0": 4}}}, "describe a"),
        ({"a": entry() | {"dtype": ["F32"]}}, "describe a"),
        ({"a": 3}, "describe a"),
    ],
)
def test_row_26_hostile_headers_are_refused_by_file_name(tmp_path, header, words):
    file = raw(tmp_path / SINGLE_NAME, header, b"\0" * 12)
    with pytest.raises(CheckpointMismatch, match=words) as caught:
        SafetensorsFolder(tmp_path)
    assert file.name in str(caught.value)


def test_row_26_trailing_bytes_truncation_and_lying_lengths_are_refused(tmp_path):
    file = tmp_path / SINGLE_NAME
    save_file(TENSORS, file)
    whole = file.read_bytes()
    for broken in (whole + b"x", whole[:-1], whole[:20], whole[:5], b""):
        file.write_bytes(broken)
        with pytest.raises(CheckpointMismatch):
            SafetensorsFolder(tmp_path)
    raw(file, b"{}", length=2**63)
    with pytest.raises(CheckpointMismatch, match="header"):
        SafetensorsFolder(tmp_path)


def test_row_26_a_huge_header_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", 1000)
    raw(tmp_path / SINGLE_NAME, {f"t{i}": entry(0, 0, (0,)) for i in range(100)})
    with pytest.raises(CheckpointMismatch, match="at most 1000"):
        SafetensorsFolder(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 50)
    with pytest.raises(CheckpointMismatch, match="at most 50"):
        SafetensorsFolder(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_row_26_a_flipped_header_byte_gives_an_error_or_other_names_never_another_layout(data):
    """What passes has tensors of the same types and shapes in the same places; one may go by
    another name, which loading refuses. Behind the header safetensors has no checksum, so nothing
    is promised of a flip there; downloads have the hub's hash, checkpoints of a run a manifest.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SINGLE_NAME
        save_file(TENSORS, file)
        written = list(read_header(file))
        content = bytearray(file.read_bytes())
        position = data.draw(st.integers(0, len(content) - 41))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        try:
            found = read_header(file)
        except CheckpointMismatch as error:
            assert SINGLE_NAME in str(error)
            return
        assert len(found) == len(TENSORS)
        opened = SafetensorsFolder(file.parent)
        for name, true in zip(found, written, strict=True):
            assert torch.equal(opened.tensor(name), TENSORS[true])


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/x.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "a/b.safetensors",
        "x\0.safetensors",
        "x" * 5000 + "/.safetensors",
        "model.bin",
        "..",
        "",
    ],
)
def test_row_25_an_index_that_points_outside_the_folder_is_refused(tmp_path, shard):
    save_file(TENSORS, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointMismatch, match="plain"):
        SafetensorsFolder(folder)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        JSON_VALUES,
        st.fixed_dictionaries(
            {},
            optional={
                name: JSON_VALUES | st.lists(st.integers(0, 9), max_size=3) | st.just("F32")
                for name in ("dtype", "shape", "data_offsets")
            },
        ),
    )
)
def test_row_26_an_entry_of_any_types_is_refused_by_the_files_name(tmp_path_factory, held):
    file = raw(tmp_path_factory.mktemp("types") / SINGLE_NAME, {"a": held}, b"\0" * 12)
    with pytest.raises(CheckpointMismatch, match=SINGLE_NAME):
        read_header(file)


PARTS = st.sampled_from(
    ("..", ".", "/", "\\", "C:", "\0", "~", "a", "model", ".safetensors", "%2e")
)
NAMES = st.one_of(
    st.text(max_size=20),
    st.lists(PARTS, max_size=8).map("".join),
    st.lists(PARTS, max_size=8).map(lambda parts: "".join(parts) + ".safetensors"),
    st.integers(200, 6000).map(lambda length: "x" * length + ".safetensors"),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3), NAMES | JSON_VALUES, min_size=1, max_size=3))
def test_row_25_no_name_in_an_index_reads_a_file_outside_the_folder(tmp_path_factory, weight_map):
    """Whatever it says: refused, or files of the folder, of which there are none."""
    place = tmp_path_factory.mktemp("names")
    folder = place / "model"
    folder.mkdir()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    opened = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "read_header", lambda file: opened.append(file) or {})
        with pytest.raises(CheckpointMismatch):
            SafetensorsFolder(folder)
    assert not opened


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": ' + "[" * 100_000, "[]", "3"])
def test_row_25_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointMismatch, match="no shard index"):
        SafetensorsFolder(tmp_path)


def test_row_25_links_out_of_the_folder_are_refused_and_a_hub_cache_is_not(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file(TENSORS, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / SINGLE_NAME).symlink_to(outside)
    with pytest.raises(CheckpointMismatch, match="outside"):
        SafetensorsFolder(folder)
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "f00").write_bytes(outside.read_bytes())
    (snapshot / SINGLE_NAME).symlink_to("../../blobs/f00")
    assert SafetensorsFolder(snapshot).names.keys() == TENSORS.keys()


def test_an_index_that_lies_is_refused(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    index = tmp_path / INDEX_NAME
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "z": "one.safetensors"}}))
    with pytest.raises(CheckpointMismatch, match="z is in"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(CheckpointMismatch, match="two files"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointMismatch, match="lacks gone"):
        SafetensorsFolder(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointMismatch, match="no shard index"):
        SafetensorsFolder(tmp_path)


def test_row_24_pickled_weights_are_refused_with_the_way_out_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    with pytest.raises(CheckpointMismatch, match="safe_serialization"):
        SafetensorsFolder(tmp_path)
    assert not canary.exists()


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointMismatch, match=r"lacks model\.safetensors"):
        SafetensorsFolder(tmp_path)
