"""Names that people give: an unknown one is refused, with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def refuse_unknown(
    values: Iterable[Any],
    known: Iterable[str],
    kind: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raise ValueError for the first unknown name, with the nearest known one.

    elsewhere: what other programs call the known ones.
    """
    names = list(known)
    for value in values:
        if value in names:
            continue
        near = (elsewhere or {}).get(str(value)) or next(
            iter(difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)), None
        )
        hint = f"did you mean {near!r}?" if near in names else f"known: {', '.join(names)}"
        raise ValueError(f"unknown {kind} {value!r}; {hint}")
