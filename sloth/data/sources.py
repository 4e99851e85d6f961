"""Where rows come from: files, folders, Python objects; each row with the place to name in errors.

    .jsonl .ndjson   one JSON object a line                     .csv .tsv   a header, then rows
    .json            lists of objects, or one object a line     .txt        one text a line
    .parquet         needs pyarrow (the extra `data`)           a folder    train.* and valid.*
    hf://datasets/owner/name[@revision][/folder]     Parquet files of a data set on the hub
    a list or iterator of rows (dicts, or strings as texts; tuples and numpy arrays are lists); a
    `datasets.Dataset`, which is one; a pandas DataFrame or an arrow Table; a mapping of splits,
    such as a `datasets.DatasetDict`

Everything is read as a stream: a file of any size costs the memory of one row (Parquet: of one
batch of rows). Where one row cannot be read and the next one can be found, a `Malformed` comes in
its place; what leaves no way on (a broken list, a damaged file) is raised.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sloth.data.json_lists import read_lists
from sloth.data.json_text import DECODER, DoubleKey
from sloth.errors import DataError
from sloth.formats.hub import fetch_dataset

Source = str | Path | Iterable[Any]
Placed = tuple[str, Any]

SPLITS = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev", "eval")}
# A Path makes one slash of two.
_HUB = re.compile(
    r"hf:/{1,2}datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<below>.*))?"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_TABLE_ROWS = 1024
_CHUNK_BYTES = 1 << 20
# Of a line, a cell (csv's own limit, 131,072, is shorter than some chats), and how far a broken row
# of a JSON list is read. Some 8 million tokens of text: no example, rather a missing newline.
MAX_ROW_CHARS = 1 << 25


@dataclass(frozen=True)
class Malformed:
    """Stands in a row's place: `error` is for whoever reads on to raise, or to count."""

    error: DataError


@dataclass(frozen=True)
class Rows:
    """Rows to be read in order. files: what they are read from, none for Python objects.

    can_reread: whether a second pass gives the same rows. revision: the commit of a data set on the
    hub.
    """

    name: str
    files: tuple[Path, ...]
    can_reread: bool
    read: Callable[[], Iterator[Placed]]
    revision: str | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)


def open_rows(source: Source, name: str = "data", split: str = "train") -> Rows:
    """The rows of `source`. split: which part of a folder or a mapping of splits.

    Raises DataError for what cannot be a source.
    """
    if isinstance(source, (str, Path)):
        place, revision = _local(source)
        files = _files(place, split)
        return Rows(str(source), files, True, lambda: _read_files(files), revision)
    if isinstance(source, Mapping):
        part = next((source[n] for n in SPLITS[split] if n in source), None)
        if part is None or isinstance(part, str) or not isinstance(part, Iterable):
            raise DataError(
                f"{name}: expected a path or rows, got a {type(source).__name__}; one row goes "
                "into a list, and a mapping of splits needs a train split"
            )
        return open_rows(part, f"{name}[{split!r}]", split)
    table = _rows_of_table(source)
    if table is not None:
        return Rows(name, (), True, lambda: _number(table(), name))
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise DataError(f"{name}: expected a path or rows, got a {type(source).__name__}")
    if _has(source, "readline"):
        raise DataError(
            f"{name}: expected a path or rows, got an open file ({getattr(source, 'name', '?')}); "
            "give its path, whose ending tells how it is read"
        )
    can_reread = iter(source) is not source
    return Rows(name, (), can_reread, lambda: _number(source, name))


def has_split(source: object, split: str) -> bool:
    """Whether `source` is a folder or a mapping with that split."""
    if isinstance(source, (str, Path)):
        folder, _ = _local(source)
        return folder.is_dir() and bool(_of_split(folder, split))
    return isinstance(source, Mapping) and any(name in source for name in SPLITS[split])


def _number(rows: Iterable[Any], name: str) -> Iterator[Placed]:
    for index, row in enumerate(map(_plain, rows)):
        yield f"{name}[{index}]", {"text": row} if isinstance(row, str) else row


# -- tables --------------------------------------------------------------------------------------


def _rows_of_table(source: Any) -> Callable[[], Iterator[Any]] | None:
    """What reads a table's rows, some at a time; None for what is no table. Told by its methods, as
    its library need not be here. (Iterating over one would give its columns.)
    """
    if _has(source, "to_pylist", "slice", "num_rows"):  # arrow
        return lambda: _in_slices(source.num_rows, lambda at, n: source.slice(at, n).to_pylist())
    if _has(source, "to_dict", "iloc", "columns"):  # pandas

        def records(at: int, count: int) -> list[Any]:
            rows: list[Any] = source.iloc[at : at + count].to_dict("records")
            return rows

        return lambda: _in_slices(len(source), records)
    return None


def _in_slices(num_rows: int, read: Callable[[int, int], list[Any]]) -> Iterator[Any]:
    for at in range(0, num_rows, _TABLE_ROWS):
        yield from read(at, _TABLE_ROWS)


def _has(source: object, *names: str) -> bool:
    return all(hasattr(type(source), name) for name in names)


def _plain(value: Any) -> Any:
    """A row or cell in JSON's types in place of tuples and pandas' and numpy's own, told by their
    methods; a missing cell is None.
    """
    if type(value) is str:
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if _has(value, "tolist", "ndim"):
        own = value.tolist()
        return own if type(own) is type(value) else _plain(own)  # a long double stays one
    is_missing = type(value).__name__ in ("NAType", "NaTType")
    return None if is_missing or (isinstance(value, float) and value != value) else value


# -- files ---------------------------------------------------------------------------------------


def _local(source: str | Path) -> tuple[Path, str | None]:
    """A path on this machine, of files fetched from the hub if need be; then with their commit."""
    found = _HUB.fullmatch(str(source))
    if found is None:
        return _path(source), None
    below = Path(found["below"] or "")
    if ".." in below.parts or below.is_absolute():
        raise DataError(f"{source}: a folder of the data set has no '..' in its name")
    folder = fetch_dataset(found["repo"], found["revision"])
    # The hub's cache names a snapshot's folder by its commit.
    return folder / below, folder.name if _COMMIT.fullmatch(folder.name) else None


def _path(source: str | Path) -> Path:
    """Raises DataError for what the system cannot look for, such as a text given as a path."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # the latter for a ~user without a home
        said = getattr(error, "strerror", None) or error
        raise DataError(
            f"data file {str(source)[:80]!r} cannot be looked for: {said}; give the path of a file "
            "or folder, or a list of rows: a text by itself goes into a list"
        ) from error
    return path


def _files(path: Path, split: str) -> tuple[Path, ...]:
    if path.is_dir():
        found = _of_split(path, split)
        if not found:
            held = sorted(p.name for p in path.iterdir())[:8]
            raise DataError(
                f"data folder {path} has no {split} file; expected one of "
                f"{', '.join(f'{split}{kind}' for kind in _READERS)}; found {held or 'nothing'}"
            )
        return found
    if not path.is_file():
        hint = ""
        if _HUB_NAME.fullmatch(path.as_posix()) and path.suffix.lower() not in _READERS:
            hint = f"; a data set on the hub is written hf://datasets/{path.as_posix()}"
        raise DataError(f"data file {path} does not exist{hint}")
    _reader(path)
    return (path,)


def _of_split(folder: Path, split: str) -> tuple[Path, ...]:
    """Files of a split: train.jsonl, train-00000-of-00002.parquet or all of train/, in the folder,
    in data/ or in default/, the hub's name for a data set's only part.
    """
    for place in (folder, folder / "data", folder / "default"):
        for name in SPLITS[split]:
            found = [*place.glob(f"{name}[.-]*"), *place.glob(f"{name}/*")]
            files = [f for f in sorted(found) if f.is_file() and f.suffix.lower() in _READERS]
            if files:
                return tuple(files)
    return ()


def _read_files(files: Iterable[Path]) -> Iterator[Placed]:
    for file in files:
        yield from _reader(file)(file)


def _reader(file: Path) -> Callable[[Path], Iterator[Placed]]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(
            f"data file {file} is of an unknown kind {file.suffix!r}; known: {', '.join(_READERS)}"
        )
    return reader


def _lines(file: Path) -> Iterator[tuple[str, str | Malformed]]:
    """(place, line) of each line that is not blank: UTF-8, a byte-order mark allowed."""
    with file.open("rb") as stream:
        for number in count(1):
            raw = stream.readline(MAX_ROW_CHARS)
            if not raw:
                return
            where = f"{file}:{number}"
            if len(raw) == MAX_ROW_CHARS and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(_CHUNK_BYTES)
                yield where, _malformed(where, f"a line of {MAX_ROW_CHARS >> 20} MiB or more")
                continue
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if line.strip():
                yield where, _decoded(line, where)


def _malformed(where: str, said: str) -> Malformed:
    return Malformed(DataError(f"{where}: {said}"))


def _decoded(line: bytes, where: str) -> str | Malformed:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return _malformed(where, f"not UTF-8 at byte {error.start} of the line")


def _read_jsonl(file: Path) -> Iterator[Placed]:
    for where, line in _lines(file):
        yield where, line if isinstance(line, Malformed) else _parsed(line, where)


def _parsed(line: str, where: str) -> Any:
    try:
        row = DECODER.decode(line)
    except RecursionError:
        return _malformed(where, "JSON nested too deeply")
    except DoubleKey as error:
        return _malformed(where, str(error))
    except ValueError as error:
        mark = " (a byte-order mark)" if line.startswith("\ufeff") else ""
        return _malformed(where, f"expected one JSON object on the line: {error}{mark}")
    if isinstance(row, list):
        return _malformed(where, "expected one JSON object per line, got a JSON list")
    return row


def _read_json(file: Path) -> Iterator[Placed]:
    """Lists, decoded item by item; a file that does not begin with a list holds lines."""
    with file.open("rb") as stream:
        beginning = stream.read(_CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning.startswith(b"["):
        yield from _read_jsonl(file)
        return
    with file.open(encoding="utf-8-sig") as text:
        try:
            for where, row in read_lists(text, str(file), _CHUNK_BYTES, MAX_ROW_CHARS):
                yield where, Malformed(row) if isinstance(row, DataError) else row
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8: {error.reason}") from error


def _read_csv(file: Path) -> Iterator[Placed]:
    csv.field_size_limit(MAX_ROW_CHARS)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: not UTF-8 after line {reader.line_num}") from error
            except csv.Error as error:
                where = f"{file}:{reader.line_num}"
                broken = _malformed(where, f"not valid CSV: {error}")
                if not header:  # without it, no row has a meaning
                    raise broken.error from error
                yield where, broken
                continue
            where = f"{file}:{reader.line_num}"
            if not header:
                header = _header(cells, where)
            elif cells and len(cells) != len(header):
                yield where, _malformed(where, f"expected {len(header)} columns")
            elif cells:
                yield where, dict(zip(header, cells, strict=True))


def _header(cells: list[str], where: str) -> list[str]:
    """Names of columns; none for a line that is blank."""
    if not any(cell.strip() for cell in cells):
        return []
    mark = next((mark for mark in ";\t|" if mark in cells[0]), None)
    if len(cells) == 1 and mark is not None:
        raise DataError(
            f"{where}: the header {cells[0][:80]!r} looks like columns separated by {mark!r}; "
            "separate them by commas, or by tabs in a file that ends in .tsv"
        )
    # Spreadsheets write columns without a name behind the others; nobody misses those.
    double = next((cell for cell in cells if cell and cells.count(cell) > 1), None)
    if double is not None:
        raise DataError(
            f"{where}: the header names the column {double!r} twice; rename or delete one of them"
        )
    return cells


def _read_txt(file: Path) -> Iterator[Placed]:
    for where, line in _lines(file):
        yield where, line if isinstance(line, Malformed) else {"text": line.rstrip("\r\n")}


def _read_parquet(file: Path) -> Iterator[Placed]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file}: Parquet needs pyarrow; install it with pip install 'sloth-llm[data]'"
        ) from error
    try:
        index = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_TABLE_ROWS):
                for row in batch.to_pylist():
                    yield f"{file}[{index}]", row
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
