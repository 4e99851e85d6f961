"""JSON files that hold one object, as settings do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sloth.errors import SlothError


def read_mapping(file: Path, refusal: type[SlothError]) -> dict[str, Any]:
    """The object in a file that is there. Raises `refusal`, naming the file, for anything else."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refusal(f"{file} is not valid JSON: {error}") from error
    if not isinstance(held, dict):
        raise refusal(f"{file} holds a {type(held).__name__}, expected an object")
    return held
