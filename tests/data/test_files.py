"""What files hold is read to their end, or refused where it cannot be."""

from __future__ import annotations

import tracemalloc

import pytest

from sloth.data import sources
from sloth.data.sources import has_split, open_rows
from sloth.errors import DataError

A, B, C = ({"text": text} for text in "abc")


def read(tmp_path, content, name="a.json"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(open_rows(file).read())


# -- lists of JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        '[{"text":"a"}]\n[{"text":"b"},{"text":"c"}]',
        '[{"text":"a"}][{"text":"b"}]\n\n[]\n[{"text":"c"}]\n',
        '[{"text":"a"}]\n{"text":"b"}\n{"text":"c"}\n',
        '[]{"text":"a"} [ {"text":"b"} ] {"text":"c"}',
        '\ufeff[{"text":"a"}]\n\ufeff[{"text":"b"},\n{"text":"c"}]\n',
    ],
)
def test_all_lists_and_objects_of_a_file_are_read(tmp_path, monkeypatch, content, chunk_bytes):
    """Of two files put into one, the second was left out without a word."""
    monkeypatch.setattr(sources, "_CHUNK_BYTES", chunk_bytes)
    found = read(tmp_path, content)
    assert [row for _, row in found] == [A, B, C]
    assert [where.removeprefix(str(tmp_path)) for where, _ in found] == [
        f"/a.json[{index}]" for index in range(3)
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[{"text":"a"}]\n]garbage{',
            r"a\.json:2: expected the end .*got '\]garbage\{'",
        ),
        ('[{"text":"a"}]]garbage{', r"a\.json:1: expected the end of the file.*got '\]garb"),
        ('[{"text":\n"a"}]\n\n, [{"text":"b"}]', r"a\.json:4: expected .*another JSON list"),
        ('[{"text":"a"}]\n3', r"a\.json:2: .*got '3'"),
        ('[{"text":"a"}]\n{"text":', r"a\.json\[1\]: not valid JSON"),
        ('[{"text":"a"}]\n[{"text":"b"}', "the JSON list has no end"),
        ('[{"text":"a"},]', r"a\.json\[1\]: not valid JSON"),
    ],
)
def test_what_follows_a_list_and_is_none_is_refused_with_its_place(
    tmp_path, monkeypatch, content, said
):
    with pytest.raises(DataError, match=said):
        read(tmp_path, content)
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 2)
    with pytest.raises(DataError, match=said):
        read(tmp_path, content)


def test_lists_behind_lists_are_not_held(tmp_path):
    one = b'[{"text": "' + b"a" * 1000 + b'"}]\n'
    (tmp_path / "a.json").write_bytes(one * 20_000)
    tracemalloc.start()
    assert sum(1 for _ in open_rows(tmp_path / "a.json").read()) == 20_000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000_000


# -- CSV -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["\n", "\r\n\r\n", "  \n,\n", "\ufeff\n"])
def test_blank_lines_before_a_header_are_none(tmp_path, blank):
    rows = read(tmp_path, f'{blank}prompt,completion\n"a\n",b\n\nc\nd,e\n', "a.csv")
    first = blank.count("\n") + 1
    places = [where.rpartition(":")[2] for where, _ in rows]
    assert places == [str(first + number) for number in (2, 4, 5)]
    assert [rows[0][1], rows[2][1]] == [
        {"prompt": "a\n", "completion": "b"},
        {"prompt": "d", "completion": "e"},
    ]
    assert f"a.csv:{first + 4}: expected 2 columns" in str(rows[1][1].error)


@pytest.mark.parametrize("content", ["", "\n\n", "\n,\n", "text\n"])
def test_a_table_without_rows_has_none(tmp_path, content):
    assert read(tmp_path, content, "a.csv") == []


def test_a_header_that_cannot_be_read_leaves_no_way_on(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:1: not valid CSV"):
        read(tmp_path, '"text" x\na\nb\n', "a.csv")


def test_a_column_that_is_named_twice_is_refused(tmp_path):
    """The last one was read, and the other left out without a word."""
    with pytest.raises(DataError, match=r"a\.csv:2: the header names the column 'prompt' twice"):
        read(tmp_path, "\nprompt,prompt,completion\na,b,c\n", "a.csv")
    ((_, row),) = read(tmp_path, "text,,\na,,\n", "a.csv")
    assert row == {"text": "a", "": ""}


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_columns_that_something_else_separates_are_told(tmp_path, mark):
    """They came as one column, which was suggested as the text to train on."""
    content = f"prompt{mark}completion\na{mark}b, c\n"
    with pytest.raises(DataError, match=r"a\.csv:1: the header .* looks like columns separated by"):
        read(tmp_path, content, "a.csv")
    if mark == "\t":
        ((_, row),) = read(tmp_path, content, "a.tsv")
        assert row == {"prompt": "a", "completion": "b, c"}


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tatsu-lab/alpaca", "; a data set on the hub is written hf://datasets/tatsu-lab/alpaca"),
        ("data/rows.jsonl", ""),
        ("rows", ""),
        ("../data/rows", ""),
    ],
)
def test_the_name_of_a_data_set_on_the_hub_is_told_how_it_is_written(name, hint):
    with pytest.raises(DataError) as caught:
        open_rows(name)
    assert str(caught.value) == f"data file {name} does not exist{hint}"


@pytest.mark.parametrize("source", ["a" * 5000, "./" + "a" * 300, "~nobody-here/a.txt"])
def test_what_cannot_be_a_path_is_refused(source):
    """Most likely a text; the system's own error named neither data nor what to do."""
    for ask in (open_rows, lambda source: has_split(source, "valid")):
        with pytest.raises(DataError, match="cannot be looked for: .*goes into a list") as caught:
            ask(source)
        assert len(str(caught.value)) < 300
    with pytest.raises(DataError, match="does not exist"):
        open_rows("a\0b")
