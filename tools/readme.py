"""Tables of the README that are made from elsewhere: each stands between two markers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def between(readme: str, begin: str, end: str, table: str) -> str:
    """The README's text with this table between its markers."""
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def command(doc: str, table: Callable[[], str], rewritten: Callable[[str], str]) -> None:
    """The command line of a table: print it, or put it into the README."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    if not parser.parse_args().write:
        print(table())
        return
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
