"""JSON lists, decoded item by item: a file of any size costs the memory of one row.

Files that were put together (`cat a.json b.json`) hold several lists, and objects between or after
them. All of it is read, as what is left unread would be left out of training without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from sloth.data.json_text import DECODER, DoubleKey
from sloth.errors import DataError

_MARK = "\ufeff"  # the second file's byte-order mark stands in the middle
_SHOWN_CHARS = 20


def read_lists(
    stream: IO[str], name: str, chunk_chars: int, max_chars: int
) -> Iterator[tuple[str, Any]]:
    """(place, item) of every list and object of a file that begins with a list.

    The place counts over the whole file. chunk_chars: how much is read at once; max_chars: how far
    an item that does not decode is read on. A DataError comes in the place of an item with a key
    twice; one is raised where there is no way on.
    """
    held, at, index, is_over, lines = "", 0, 0, False, 1
    # Then "begun", after a list's bracket; "item", after a comma; "after" an item.
    state = "outside"
    while True:
        while at < len(held) and (held[at].isspace() or (state, held[at]) == ("outside", _MARK)):
            at += 1
        if at < len(held):
            found, where = held[at], f"{name}[{index}]"
            if state == "outside" and found == "[":
                at, state = at + 1, "begun"
                continue
            if state == "outside" and found != "{":
                line = lines + held.count("\n", 0, at)
                raise DataError(
                    f"{name}:{line}: expected the end of the file, or another JSON list or object, "
                    f"after the JSON list; got {held[at : at + _SHOWN_CHARS]!r}"
                )
            if state in ("begun", "after") and found == "]":
                at, state = at + 1, "outside"
                continue
            if state == "after":
                if found != ",":
                    raise DataError(f"{where}: expected ',' in the JSON list")
                at, state = at + 1, "item"
                continue
            try:
                row, end = _decoded(held, at, where)
            except RecursionError as error:
                raise DataError(f"{where}: JSON nested too deeply") from error
            except ValueError as error:
                if is_over or len(held) - at > max_chars:
                    raise DataError(f"{where}: not valid JSON: {error.args[0]:.200}") from error
            else:
                if end < len(held) or is_over:  # a number may go on in the next chunk
                    yield where, row
                    at, index = end, index + 1
                    state = state if state == "outside" else "after"
                    continue
        if is_over:
            if state == "outside":
                return
            raise DataError(f"{name}: the JSON list has no end")
        # At least doubled, so that one long row is not decoded over and over.
        chunk = stream.read(max(chunk_chars, len(held) - at))
        lines += held.count("\n", 0, at)
        held, at, is_over = held[at:] + chunk, 0, not chunk


def _decoded(held: str, at: int, where: str) -> tuple[Any, int]:
    """The item at a place, and where it ends. Raises ValueError, RecursionError."""
    try:
        return DECODER.raw_decode(held, at)
    except DoubleKey as error:
        _, end = json.JSONDecoder().raw_decode(held, at)
        return DataError(f"{where}: {error}"), end
