"""Formats: every one is told by its fields, named, and comes to the same conversation or text."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from sloth.data.dataset import load_data
from sloth.data.rows import Chat, Completion, Text, is_empty, kind_of, map_columns, read_row
from sloth.data.sources import has_split, open_rows
from sloth.errors import DataError
from tests.train.fakes import FakeTokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


MESSAGES = [user("ask"), assistant("yes")]
SHAREGPT = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "yes"}]
ALPACA = {"instruction": "ask", "input": "", "output": "yes"}


@pytest.mark.parametrize(
    ("row", "kind", "content"),
    [
        ({"messages": MESSAGES}, "messages", Chat(MESSAGES)),
        ({"conversations": MESSAGES, "id": 3}, "messages", Chat(MESSAGES)),
        ({"messages": json.dumps(MESSAGES)}, "messages", Chat(MESSAGES)),
        ({"conversations": SHAREGPT}, "sharegpt", Chat(MESSAGES)),
        ({"messages": SHAREGPT}, "sharegpt", Chat(MESSAGES)),
        (ALPACA, "alpaca", Chat(MESSAGES, first_trained=1)),
        (
            {**ALPACA, "input": "this", "text": "all of it"},
            "alpaca",
            Chat([user("ask\n\nthis"), MESSAGES[1]], first_trained=1),
        ),
        (
            {"prompt": "ask", "completion": "yes"},
            "prompt/completion",
            Completion("ask", "yes"),
        ),
        (
            {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
            "prompt/completion",
            Chat(MESSAGES, first_trained=1),
        ),
        ({"text": "ask", "url": "x"}, "text", Text("ask")),
    ],
)
def test_format_is_told_by_the_fields(row, kind, content):
    assert kind_of(row, "data[0]") == kind
    assert read_row(row, "data[0]", has_template=True) == (kind, content)


def test_alpaca_without_a_template_is_a_prompt_and_a_completion():
    row = {**ALPACA, "input": "this", "system": "be kind"}
    _, content = read_row(row, "", has_template=False)
    assert content == Completion("be kind\n\nask\n\nthis\n\n", "yes")


def test_a_system_column_opens_the_conversation():
    system = {"role": "system", "content": "be kind"}
    for row in (
        {"conversations": SHAREGPT, "system": "be kind"},
        {**ALPACA, "system": "be kind"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "system": "be kind"},
    ):
        assert read_row(row, "", True)[1].messages == [system, *MESSAGES]
    row = {"prompt": "ask ", "completion": "yes", "system": "be kind"}
    assert read_row(row, "", True)[1] == Completion("be kind\n\nask ", "yes")


@pytest.mark.parametrize("field", ["system", "tools"])
def test_what_a_text_has_no_place_for_is_refused(field):
    """Left out, it would be missing from what is learned, and nobody would know."""
    for row in ({"text": "a"}, {"prompt": "ask", "completion": "yes"}):
        assert read_row({**row, "tools": "[]", "system": None}, "data[0]", True)
        if "text" in row or field == "tools":
            with pytest.raises(DataError, match=rf"data\[0\]: a row of .* no place for '{field}'"):
                value = [{"name": "rain"}] if field == "tools" else "be kind"
                read_row({**row, field: value}, "data[0]", True)


def test_calls_and_parts_come_in_the_form_that_templates_read():
    """OpenAI keeps a call's arguments as JSON text, ShareGPT a whole call; Parquet adds nulls."""
    function = {"name": "rain", "arguments": '{"city": "Oslo"}'}
    called = {"name": "rain", "arguments": {"city": "Oslo"}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}], "tool_calls": None},
            assistant(None, tool_calls=[{"type": "function", "function": function}]),
            {"role": "tool", "content": "yes", "tool_calls": None},
        ],
        "tools": json.dumps([{"type": "function"}]),
    }
    _, chat = read_row(row, "", True)
    assert chat.tools == [{"type": "function"}]
    assert chat.messages == [
        user("Rain?"),
        assistant(None, tool_calls=[{"type": "function", "function": called}]),
        {"role": "tool", "content": "yes"},
    ]
    turns = [SHAREGPT[0], {"from": "function_call", "value": json.dumps(called)}]
    _, chat = read_row({"conversations": turns}, "", True)
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": called}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": MESSAGES, "prompt": None, "text": None, "chosen": None}, "messages"),
        ({"messages": None, "conversations": SHAREGPT, "completion": None}, "sharegpt"),
        ({"messages": None, "conversations": None, **ALPACA, "system": None}, "alpaca"),
        ({"messages": None, "prompt": "ask", "completion": "yes"}, "prompt/completion"),
        ({"messages": None, "instruction": "a", "output": None, "text": "ask"}, "text"),
    ],
)
def test_a_field_that_is_null_is_none(row, kind):
    """As in files of columns, which have every field in every row."""
    assert kind_of(row, "data[0]") == kind
    found, _ = read_row(row, "data[0]", True)
    assert found == kind


def test_a_pair_beside_fields_that_are_null_is_a_pair():
    row = {"messages": None, "prompt": None, "chosen": "a b", "rejected": "a c", "text": None}
    assert kind_of(row, "") == "preference"
    with pytest.raises(DataError, match="messages: expected a non-empty list of messages, got nul"):
        read_row({"messages": None}, "", True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [{"from": "me", "value": "a"}]}, r"conversations\[0\].from: expected"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\].value: expected a"),
        ({"messages": [user([{"type": "image_url"}])]}, r"content: expected parts of type text"),
        ({"messages": MESSAGES, "tools": "{"}, r"tools: expected JSON"),
        ({**ALPACA, "output": None}, r"output: expected a text, got null"),
        (
            {"chosen": MESSAGES, "rejected": MESSAGES},
            r'preference pair.*columns={"messages": "chosen"}',
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            r'columns={"prompt": "prompt", "completion": "chosen"}',
        ),
        ({"chosen": "b"}, r"'rejected' is missing"),
    ],
)
def test_what_cannot_be_read_says_where_and_what_was_expected(row, said):
    with pytest.raises(DataError, match=rf"^data\[0\].*{said}"):
        read_row(row, "data[0]", True)


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"id": 3, "Query": "a", "Response": "b"}, {"prompt": "Query", "completion": "Response"}),
        ({"dialog": MESSAGES, "id": "x"}, {"messages": "dialog"}),
        ({"body": "a", "n": 1}, {"text": "body"}),
        ({"links": "a", "rechts": "b"}, {"prompt": "links", "completion": "rechts"}),
    ],
)
def test_unknown_columns_are_named_with_a_mapping_that_works(row, mapping):
    with pytest.raises(DataError) as caught:
        kind_of(row, "data[0]")
    assert all(repr(column) in str(caught.value) for column in row)
    assert str(caught.value).endswith(f"perhaps columns={json.dumps(mapping)}")
    read_row(map_columns(row, mapping, ""), "", True)


def test_columns_are_mapped_and_the_rest_is_left_out():
    rows = [{"q": "ask", "a": "yes", "messages": "not these"}]
    data = load_data(rows, FakeTokenizer(), 99, columns={"prompt": "q", "completion": "a"})
    assert data.counts.kinds == {"prompt/completion": 1}
    with pytest.raises(DataError, match=r"data\[0\]: no column 'b'.*columns are 'q', 'a', 'messa"):
        load_data(rows, FakeTokenizer(), 99, columns={"prompt": "q", "completion": "b"})
    with pytest.raises(ValueError, match="unknown field in columns 'promt'; did you mean 'prompt'"):
        load_data(rows, FakeTokenizer(), 99, columns={"promt": "q"})


def test_a_row_may_lack_an_optional_column_which_some_row_has():
    rows = [{"q": "ask", "a": "yes"}, {"q": "ask", "a": "yes", "s": "be kind"}]
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    data = load_data(rows, FakeTokenizer(), 99, columns=columns)
    assert len(data.examples[1].tokens) == len(data.examples[0].tokens) + len("be kind\n\n")
    with pytest.raises(DataError, match="no row has the column 'z'"):
        load_data(rows, FakeTokenizer(), 99, columns={**columns, "system": "z"})


def test_roles_are_read_in_any_case_and_strange_ones_are_counted_and_told():
    """ "Assistant" was trained on nothing, and nobody was told."""
    rows = [
        {"messages": [{"role": "User", "content": "a"}, {"role": "ASSISTANT ", "content": "b"}]},
        {"messages": [*MESSAGES, {"role": "Asistant", "content": "b", "name": None}]},
    ]
    data = load_data(rows, FakeTokenizer(), 99)
    assert data.examples[0].num_trained and data.counts.unknown_roles == {"Asistant": 1}
    (said,) = data.counts.warnings()
    assert said.startswith("1 messages have roles that templates do not know, 'Asistant' (1)")


def test_blank_answers_are_counted():
    assert is_empty(Text(" \n")) and is_empty(Completion("a", " "))
    assert is_empty(Chat([user("a"), assistant(" ")]))
    assert not is_empty(Chat([user("a"), assistant(None, tool_calls=[1])]))
    counts = load_data([{"prompt": "a", "completion": " "}, ALPACA], FakeTokenizer(), 99).counts
    assert counts.empty == 1 and "1 rows have a blank answer" in counts.warnings()


# -- where rows come from --------------------------------------------------------------------------

PAIRS = [{"prompt": f"ask {n}", "completion": f'yes, "{n}"\nor no'} for n in range(2500)]


def written(folder, suffix):
    file = folder / f"train{suffix}"
    lines = [json.dumps(row) for row in PAIRS]
    if suffix in (".jsonl", ".ndjson"):
        file.write_text("\n".join(lines))
    elif suffix == ".json":
        file.write_text(f"\ufeff [ {' ,'.join(lines)} ]\n", encoding="utf-8")
    elif suffix in (".csv", ".tsv"):
        import csv

        with file.open("w", newline="") as stream:
            table = csv.DictWriter(
                stream, ["prompt", "completion"], delimiter="\t" if suffix == ".tsv" else ","
            )
            table.writeheader()
            table.writerows(PAIRS)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(PAIRS), file)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("sloth.data.sources._CHUNK_BYTES", 1000)  # rows across chunks
    file = written(tmp_path, suffix)
    assert [row for _, row in open_rows(file).read()] == PAIRS
    assert [row for _, row in open_rows(tmp_path).read()] == PAIRS


def test_text_files_lists_of_strings_and_splits(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\r\n\n  two\n")
    assert [row for _, row in open_rows(file).read()] == [{"text": "one"}, {"text": "  two"}]
    assert list(open_rows(["one"]).read()) == [("data[0]", {"text": "one"})]
    splits = {"train": PAIRS, "validation": PAIRS[:2]}
    assert [row for _, row in open_rows(splits).read()] == PAIRS
    assert [row for _, row in open_rows(splits, split="valid").read()] == PAIRS[:2]
    assert has_split(splits, "valid") and not has_split(PAIRS, "valid")


def test_a_datasets_dataset_is_read_by_iterating_it():
    """It is an iterable of dicts that can be read twice; the library itself is not needed."""

    class Dataset:
        column_names = ["prompt", "completion"]

        def __iter__(self):
            return iter(PAIRS[:3])

    rows = open_rows(Dataset())
    assert rows.can_reread and not open_rows(iter(PAIRS)).can_reread
    assert load_data(Dataset(), FakeTokenizer(), 99).counts.examples == 3


def test_a_data_frame_and_an_arrow_table_are_read_row_by_row(monkeypatch):
    """Iterating over one would give its columns. Missing cells are null, arrays are lists."""
    monkeypatch.setattr("sloth.data.sources._TABLE_ROWS", 100)
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    for table in (pandas.DataFrame(PAIRS), pyarrow.Table.from_pylist(PAIRS)):
        rows = open_rows(table)
        assert [row for _, row in rows.read()] == [row for _, row in rows.read()] == PAIRS
        assert rows.can_reread and next(rows.read())[0] == "data[0]"
        assert load_data(table, FakeTokenizer(), 99).counts.rows == len(PAIRS)
    mixed = [{"messages": MESSAGES}, {"text": "ask"}]
    for table in (
        pandas.DataFrame(mixed),
        pyarrow.Table.from_pylist([{"messages": MESSAGES, "text": None}, {"text": "ask"}]),
        pyarrow.Table.from_pylist([{"messages": MESSAGES, "text": None}]).to_pandas(),
    ):
        kinds = load_data(table, FakeTokenizer(), 99).counts.kinds
        assert kinds == ({"messages": 1, "text": 1} if len(table) == 2 else {"messages": 1})
    splits = {"train": pandas.DataFrame(PAIRS), "valid": pandas.DataFrame(PAIRS[:2])}
    assert [row for _, row in open_rows(splits, split="valid").read()] == PAIRS[:2]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (io.StringIO('{"text": "a"}'), r"data: .* got an open file \(\?\); give its path"),
        (b'{"text": "a"}', "data: expected a path or rows, got a bytes"),
        (3, "data: expected a path or rows, got a int"),
    ],
)
def test_what_is_no_source_is_refused_by_name(source, said):
    with pytest.raises(DataError, match=said):
        open_rows(source)


def test_an_open_file_is_refused_by_its_name(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}')
    with file.open() as stream, pytest.raises(DataError, match=r"rows\.jsonl\); give its path"):
        load_data(stream, FakeTokenizer(), 99)


def test_a_folder_gives_sharded_train_and_valid(tmp_path):
    (tmp_path / "data").mkdir()
    for number in (0, 1):
        name = f"train-{number:05d}-of-00002.jsonl"
        (tmp_path / "data" / name).write_text(json.dumps(PAIRS[number]))
    (tmp_path / "data" / "validation.jsonl").write_text(json.dumps(PAIRS[2]))
    assert [row for _, row in open_rows(tmp_path).read()] == PAIRS[:2]
    assert [row for _, row in open_rows(tmp_path, split="valid").read()] == PAIRS[2:3]


def test_row_27_a_data_set_on_the_hub_is_read_as_parquet_and_nothing_of_it_is_run(
    tmp_path, monkeypatch
):
    """Its own files, or the hub's conversion where it has none; failures say what to do."""
    written(tmp_path, ".parquet")
    (tmp_path / "default" / "validation").mkdir(parents=True)
    (tmp_path / "train.parquet").rename(tmp_path / "default" / "validation" / "0000.parquet")
    asked, empty = [], tmp_path / "empty"
    empty.mkdir()

    def download(repo_id, *, repo_type, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, repo_type, revision, allow_patterns))
        if repo_id == "no/net":
            raise OSError("cut")
        return str(tmp_path if revision == "refs/convert/parquet" else empty)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("sloth.formats.download.PAUSE_S", 0.0)
    rows = open_rows("hf://datasets/some/one", split="valid")
    assert [row for _, row in rows.read()] == PAIRS
    assert asked == [
        ("some/one", "dataset", revision, ["*.parquet"])
        for revision in (None, "refs/convert/parquet")
    ]
    for source, said in (
        ("hf://datasets/some/one@main", "has no Parquet files"),
        ("hf://datasets/no/net", "could not be fetched.*hf auth login.*cut"),
        ("hf://datasets/some/one/../x", "has no '..'"),
        (Path("hf://datasets/some/o ne"), "written owner/name"),
        ("hf://datasets/some/one", "has no train file"),
    ):
        with pytest.raises(DataError, match=said):
            open_rows(source)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a\.json\[1\]: expected ','"),
        ("a.json", b'[{"text": "a"}', "the JSON list has no end"),
        ("a.json", b'[{"text": "a}]', r"a\.json\[0\]: not valid JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"text\na,b\n", r"a\.csv:2: expected 1 columns"),
        ("a.csv", b'text\n"a', r"a\.csv:\d: not valid CSV"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.doc", b"", r"unknown kind '\.doc'; known: \.jsonl"),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path, name, content, said):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_data(tmp_path / name, FakeTokenizer(), 99)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'sloth-llm\[data\]'"):
        load_data(tmp_path / "a.parquet", FakeTokenizer(), 99)
