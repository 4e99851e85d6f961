"""JSON as text of rows: every key of an object once.

The JSON standard leaves open what a key means that is there twice. Python keeps the last value, and
the others would be left out of training without a word.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


class DoubleKey(ValueError):
    """An object has a key more than once."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Called for every object of every row, so no more than two lengths are compared."""
    held = dict(pairs)
    if len(held) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        times = "twice" if count == 2 else f"{count} times"
        raise DoubleKey(f"an object has the key {key!r:.80} {times}; rename or delete one of them")
    return held


# One for all: making a decoder takes as long as reading a short row.
DECODER = json.JSONDecoder(object_pairs_hook=_once)
