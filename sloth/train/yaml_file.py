"""A YAML file of settings, read with care: bounded, without aliases, nothing given twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_CONFIG_BYTES = 64 * 1024
MAX_CONFIG_DEPTH = 16


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values: at most 64 KiB, no aliases (they can expand without bound).

    Raises ValueError naming the file, and the line where there is one.
    """
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"config file {path} has {size} bytes, more than {MAX_CONFIG_BYTES}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = _line(event.start_mark)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"{path}:{line}: YAML aliases are not accepted; write the value out"
                )
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise ValueError(f"{path}:{line}: nested more than {MAX_CONFIG_DEPTH} deep")
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), path)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"config file {path} holds a {type(values).__name__}, expected `name: value`"
        )
    return values


def _line(mark: Any) -> int:
    """Line number of a YAML mark, from 1."""
    return mark.line + 1


def _refuse_duplicates(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise ValueError(f"{path}:{_line(key.start_mark)}: {name!r} is given twice")
            seen.add(name)
            _refuse_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value, path)
