"""Row 31: a malformed row is refused with its place, or, with skip_bad, left out and counted."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth.data import sources
from sloth.data.dataset import load_data
from sloth.errors import DataError
from sloth.formats.gguf import GGUFFile
from sloth.text.tokenizer import Tokenizer
from sloth.train.trainer import Trainer
from tests.assets import smollm2
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer

GOOD = b'{"text": "ok"}'
BAD = [
    (b'{"text": "a"', "one JSON object on the line"),
    (b"\xff\xfe", "not UTF-8 at byte 0"),
    (b"\x00", "one JSON object on the line"),
    (b'[{"text": "a"}]', "got a JSON list"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": 3}', "text: expected a text, got a int"),
    (b'{"messages": "hi"}', "messages: expected a non-empty list"),
    (b'{"question": "hi"}', "found 'question'"),
    (b"null", "expected an object, got null"),
    (b'"text"', "expected an object, got a text"),
    (b"\xef\xbb\xbf" + GOOD, "a byte-order mark"),  # a mark is for the first line
    (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    (b'{"text": "a", "text": "b"}', "an object has the key 'text' twice"),
    (b'{"messages": [{"role": "user", "role": "assistant"}]}', "the key 'role' twice"),
    (b'{"text": "a", "k": {"a": 1, "b": 2, "a": 1, "a": 1}}', "the key 'a' 3 times"),
]


def load(file, **changes):
    return load_data(file, FakeTokenizer(), 2048, **changes)


def written(tmp_path, *lines, name="rows.jsonl"):
    file = tmp_path / name
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


@pytest.mark.parametrize(("line", "said"), BAD, ids=[said for _, said in BAD])
def test_row_31_a_malformed_row_is_refused_or_left_out_and_named(tmp_path, line, said):
    file = written(tmp_path, b"\xef\xbb\xbf" + GOOD, b"", line, GOOD)
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{said}"):
        load(file)
    data = load(file, skip_bad=True)
    assert (data.counts.rows, data.counts.malformed, len(data.examples)) == (2, 1, 2)
    assert data.examples[0] == data.examples[1]
    (named,) = data.counts.malformed_first
    assert "rows.jsonl:3: " in named and said in named
    assert "2 rows (2 text), 1 malformed skipped (33.3%): 2 examples" in data.summary()
    (warning,) = data.counts.warnings()
    assert warning.startswith("1 of 3 rows are malformed and left out (33.3%); first ")
    assert named in warning


def is_readable(line):
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get("text"), str)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.just(GOOD), st.binary(max_size=20), st.just(b'{"text": "a\x7f"}'))))
def test_row_31_any_bytes_keep_exactly_the_rows_that_can_be_read(tmp_path_factory, lines):
    lines = [b" ", *(line.replace(b"\n", b"") for line in lines)]
    file = written(tmp_path_factory.mktemp("fuzz"), *lines)
    readable = [line for line in lines if is_readable(line)]
    filled = [line for line in lines if line.strip()]
    if not readable:
        with pytest.raises(DataError, match="holds no rows|all of them malformed"):
            load(file, skip_bad=True)
        return
    data = load(file, skip_bad=True)
    decode = FakeTokenizer().decode
    assert [decode(e.tokens) for e in data.examples] == [json.loads(x)["text"] for x in readable]
    assert data.counts.malformed == len(filled) - len(readable)
    assert len(data.counts.malformed_first) == min(data.counts.malformed, 3)


def test_row_31_a_line_of_100_mb_is_told_apart_without_being_held(tmp_path):
    """Most likely a file without newlines; the row after it is found."""
    file = written(tmp_path, b'{"text": "' + b"a" * 100_000_000 + b'"}', GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a line of 32 MiB or more"):
        load(file)
    tracemalloc.start()
    data = load(file, skip_bad=True)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (data.counts.rows, data.counts.malformed) == (1, 1)
    assert peak_bytes < 100_000_000


@pytest.mark.parametrize("length", [31, 32, 33, 34])
def test_row_31_the_longest_line_is_read_to_its_newline(tmp_path, monkeypatch, length):
    monkeypatch.setattr(sources, "MAX_ROW_CHARS", 32)
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 8)
    line = b'{"text": "' + b"a" * (length - 12) + b'"}'
    data = load(written(tmp_path, line, GOOD), skip_bad=True)
    assert len(line) == length
    assert (data.counts.rows, data.counts.malformed) == ((2, 0) if length < 32 else (1, 1))


def test_row_31_all_malformed_or_none_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds 2 rows, all of them malformed; first .*jsonl:1: "):
        load(written(tmp_path, b"{", b"{"), skip_bad=True)
    with pytest.raises(DataError, match="holds no rows"):
        load(written(tmp_path, b""), skip_bad=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'text\nok\na,b\n"ok" x\nok\n'),
        ("a.json", b'[{"text": "ok"}, 3, {"text": null}, {"text": "ok"}]'),
        ("b.json", b'[{"text": "ok"}, {"a": 1, "a": 2}] {"b": [{"": 1, "": 1}]} [{"text": "ok"}]'),
        ("a.txt", b"ok\n\xff\n\xff\nok\n"),
    ],
)
def test_row_31_every_kind_of_file_goes_on_after_a_malformed_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    data = load(tmp_path / name, skip_bad=True)
    assert (data.counts.rows, data.counts.malformed) == (2, 2)
    assert data.examples[0] == data.examples[1]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_key_that_a_list_item_has_twice_is_named_wherever_the_file_is_cut(
    tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk)
    (tmp_path / "a.json").write_text('[{"text": "a", "text": "b", "more": "c"}, {"text": "ok"}]')
    with pytest.raises(DataError, match=r"a\.json\[0\]: an object has the key 'text' twice"):
        load(tmp_path / "a.json")
    data = load(tmp_path / "a.json", skip_bad=True)
    assert (data.counts.rows, data.counts.malformed) == (1, 1)


def test_a_key_that_json_in_a_cell_has_twice_is_refused():
    """As CSV files and OpenAI's calls hold objects."""
    messages = '[{"role": "user", "content": "a", "content": "b"}]'
    with pytest.raises(DataError, match=r"data\[0\]: messages: expected JSON: .*'content' twice"):
        load([{"messages": messages}])


@pytest.mark.parametrize("content", [b'[{"text": "ok"} {"text": "b"}]', b'[{"text": "ok"}, {"te'])
def test_a_list_without_a_way_on_is_refused_in_any_case(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="expected ','|not valid JSON"):
        load(tmp_path / "a.json", skip_bad=True)


def test_a_run_says_how_many_rows_it_left_out(tmp_path, capsys):
    rows = [*ROWS, {"text": 5}, "a" * 3, {"messages": [{"role": 7}]}]
    model = FakeModel()
    report = Trainer(model, rows, output=tmp_path / "run", max_steps=1, skip_bad=True).run()
    said = capsys.readouterr().out
    assert "WARNING: 2 of 14 rows are malformed and left out (14.3%); first data[11]: text" in said
    assert report.data.malformed == 2 and report.data.rows == 12
    with pytest.raises(DataError, match=r"data\[11\]: text: expected a text"):
        Trainer(model, rows)


def test_half_a_surrogate_pair_is_the_rows_fault_for_a_real_tokenizer(tmp_path):
    """Its library raises a TypeError that names no row."""
    tokenizer = Tokenizer.from_files(GGUFFile(smollm2()).tokenizer_files())
    rows = [{"text": "whole \U0001f9a5"}, {"text": "half \udda5"}]
    with pytest.raises(DataError, match=r"data\[1\]: half of a surrogate pair \('\\udda5'\)"):
        load_data(rows, tokenizer, 99)
