"""Row 34: prepared data are used again when nothing that made them has changed, and only then."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from sloth.constants import GIB
from sloth.data import cache, dataset, examples
from sloth.data.dataset import load_data
from sloth.text.chat import ChatTemplate
from tests.data.test_masks import FAMILIES, SPECIAL
from tests.train.fakes import ROWS, FakeTokenizer


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that is worth caching; several shards come of it."""
    monkeypatch.setenv("SLOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "MIN_CACHED_BYTES", 100)
    monkeypatch.setattr(examples, "SHARD_TOKENS", 150)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


class Counting(FakeTokenizer):
    """encoded: texts that were encoded in batches."""

    def __init__(self, template=None):
        super().__init__(template)
        self.encoded = 0

    def encode_batch(self, texts):
        self.encoded += len(texts)
        return super().encode_batch(texts)


def load(file, tokenizer=None, **settings):
    """(dataset, whether it was prepared anew)."""
    tokenizer = tokenizer or Counting()
    found = load_data(file, tokenizer, settings.pop("max_length", 99), **settings)
    return found, tokenizer.encoded > 0


def test_row_34_the_second_time_nothing_is_encoded_and_all_is_the_same(file):
    fresh, _ = load_data(ROWS, FakeTokenizer(), 99), load(file)
    kept, is_new = load(file)
    assert not is_new
    assert kept.examples == fresh.examples and kept.fingerprint == fresh.fingerprint
    assert kept.counts == fresh.counts
    assert len(list((cache.default_folder()).glob("*/*.safetensors"))) > 2
    packed, is_new = load(file, packing=True)  # rows are made from lengths, not kept
    assert not is_new and packed.packing is not None


def changed_rows(file, tokenizer):
    file.write_text(file.read_text().replace("hi", "ha", 1))


def changed_template(file, tokenizer):
    tokenizer.chat = ChatTemplate(FAMILIES["mistral"], SPECIAL)


def changed_vocabulary(file, tokenizer):
    tokenizer.fingerprint = lambda: "other characters"


@pytest.mark.parametrize(
    "change",
    [
        changed_rows,
        changed_template,
        changed_vocabulary,
        {"max_length": 98},
        {"on_long": "drop"},
        {"train_on": "last"},
        {"skip_bad": True},
        {"columns": {"messages": "messages"}},
        ("ENCODING_VERSION", 0),
        ("__version__", "9"),
    ],
    ids=lambda change: getattr(change, "__name__", str(change)),
)
def test_row_34_each_change_makes_the_data_anew(file, monkeypatch, change):
    tokenizer = Counting()
    tokenizer.chat = ChatTemplate(FAMILIES["llama"], SPECIAL)
    assert load(file, tokenizer)[1]
    tokenizer.encoded, settings = 0, {}
    if isinstance(change, dict):
        settings = change
    elif isinstance(change, tuple):
        monkeypatch.setattr(cache, *change)
    else:
        change(file, tokenizer)
    assert load(file, tokenizer, **settings)[1]


def test_row_34_a_template_that_writes_the_date_is_rendered_each_day(file, monkeypatch):
    def loaded(day):
        class Day(cache.date):
            @classmethod
            def today(cls):
                return cls(2026, 11, day)

        monkeypatch.setattr(cache, "date", Day)
        tokenizer = Counting()
        dated = "{{ strftime_now('%d') }}" + FAMILIES["llama"]
        tokenizer.chat = ChatTemplate(dated, SPECIAL)
        return load(file, tokenizer)[1]

    assert [loaded(day) for day in (1, 1, 2)] == [True, False, True]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index"])
def test_a_damaged_entry_is_made_again(file, damage):
    before, _ = load(file)
    (entry,) = cache.default_folder().iterdir()
    shard = entry / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    shard.unlink()  # a new file, since `before` has the old one mapped
    if damage == "flip":
        content[-9] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-8])
    elif damage == "index":
        shard.write_bytes(content)
        (entry / "index.json").write_text("{")
    after, is_new = load(file)
    assert is_new and after.examples == before.examples
    assert not load(file)[1]


def test_an_entry_appears_whole_or_not_at_all(file, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.NewEntry, "publish", fail)
    with pytest.raises(KeyboardInterrupt):
        load(file)
    assert not list(cache.default_folder().iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_of_processes_that_need_the_same_data_one_prepares_them(file):
    """The ranks of a run all began at once, and did the same work beside one another."""
    is_at_it, may_end = Event(), Event()

    class Slow(Counting):
        def encode_batch(self, texts):
            is_at_it.set()
            assert may_end.wait(20)
            return super().encode_batch(texts)

    with ThreadPoolExecutor(1) as other:
        first = other.submit(load, file, Slow())
        assert is_at_it.wait(20)
        said = []

        def notice(text):
            said.append(text)
            may_end.set()

        found, is_new = load(file, notice=notice)
        made, was_new = first.result()
    assert (was_new, is_new) == (True, False) and found.fingerprint == made.fingerprint
    assert "another process is preparing the same" in said[0] and "prepared examples" in said[1]
    assert not list(cache.default_folder().glob("*.lock"))


def test_a_cache_that_cannot_be_written_is_said_and_done_without(file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("SLOTH_CACHE", str(tmp_path / "taken"))
    said = []
    found = load_data(file, FakeTokenizer(), 99, notice=said.append)
    assert len(found.examples) == len(ROWS) and "WARNING: prepared data are not kept" in said[0]


def test_a_disk_that_fills_up_on_the_way_costs_the_cache_and_not_the_run(file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(examples, "write_tensors", full)
    said = []
    found = load_data(file, FakeTokenizer(), 99, notice=said.append)
    assert len(found.examples) == len(ROWS) and "No space left" in said[0]
    assert not list(cache.default_folder().iterdir())


def test_small_files_lists_and_an_empty_setting_keep_nothing(file, tmp_path, monkeypatch):
    load(ROWS)
    monkeypatch.setattr(dataset, "MIN_CACHED_BYTES", 10**9)
    load(file)
    monkeypatch.setattr(dataset, "MIN_CACHED_BYTES", 100)
    monkeypatch.setenv("SLOTH_CACHE", "")
    load(file)
    assert not (tmp_path / "cache").exists()


# -- room ------------------------------------------------------------------------------------------


def entries():
    return {path.name for path in cache.default_folder().iterdir()}


def keep_room_for(monkeypatch, num_bytes):
    monkeypatch.setenv("SLOTH_CACHE_GIB", repr(num_bytes / GIB))


def one_entry(file, max_length, age):
    """The name of a new entry, read `age` seconds ago and not in use; its bytes."""
    before = entries() if cache.default_folder().exists() else set()
    assert load(file, max_length=max_length)[1]
    (name,) = entries() - before
    folder = cache.default_folder() / name
    held_bytes = sum(path.stat().st_size for path in folder.iterdir())
    at = time.time() - age
    os.utime(folder / "index.json", (at, at))
    return name, held_bytes


def test_entries_read_longest_ago_go_when_room_runs_out(file, monkeypatch):
    old, old_bytes = one_entry(file, 96, age=300)
    older, _ = one_entry(file, 97, age=500)
    oldest, _ = one_entry(file, 98, age=900)
    load(file, max_length=98)  # read again: now the newest
    keep_room_for(monkeypatch, 3.5 * old_bytes)
    said = []
    load_data(file, FakeTokenizer(), 99, notice=said.append)
    assert older not in entries() and {old, oldest} < entries() and len(entries()) == 3
    assert said[-1].startswith("1 older prepared data sets (0.00 GiB) deleted from ")
    keep_room_for(monkeypatch, 0)
    load(file, max_length=95)
    assert len(entries()) == 1


def test_an_entry_in_use_is_not_deleted(file):
    """A lock belongs to an open file, so another process would meet it as this one does."""
    fresh, _ = load(file, max_length=96)
    kept, is_new = load(file, max_length=96)
    assert not is_new
    folder = cache.default_folder()
    assert cache.prune(folder, 0) == (0, 0)
    del kept
    assert cache.prune(folder, 0) == (0, 0), "the data set that was made is still there"
    assert list(fresh.examples)
    del fresh
    assert cache.prune(folder, 0)[0] == 1 and entries() == set()


def test_what_a_dead_process_left_half_made_goes_after_a_day(file):
    folder = cache.default_folder()
    for name in ("a.tmp-1", "b.tmp-2"):
        (folder / name).mkdir(parents=True)
    at = time.time() - 2 * 24 * 3600
    os.utime(folder / "a.tmp-1", (at, at))
    load(file)
    assert "a.tmp-1" not in entries() and "b.tmp-2" in entries()


@pytest.mark.parametrize("size", ["much", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_refused(file, monkeypatch, size):
    monkeypatch.setenv("SLOTH_CACHE_GIB", size)
    with pytest.raises(ValueError, match=f"SLOTH_CACHE_GIB='{size}': expected a number of GiB"):
        load(file)
