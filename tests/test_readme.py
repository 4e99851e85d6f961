"""What the README says of models is what the code does."""

from __future__ import annotations

import re

from sloth.formats.hub import ALIASES
from sloth.formats.wrapper import WRAPPERS
from sloth.models import ARCHITECTURES
from tools import speed_table
from tools.models_table import COMMAND, KNOWN_AS, rewritten, table
from tools.readme import README


def test_the_table_of_models_is_the_codes() -> None:
    text = README.read_text(encoding="utf-8")
    assert rewritten(text) == text, f"README.md is out of date; run: {COMMAND}"


def test_the_table_of_speeds_is_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert speed_table.rewritten(text) == text, (
        f"README.md is out of date; run: {speed_table.COMMAND}"
    )


def test_every_type_has_a_row_and_no_row_is_made_up() -> None:
    rows = [line.split("`")[1] for line in table().splitlines()[2:]]
    assert rows == [*ARCHITECTURES, *WRAPPERS] and set(KNOWN_AS) == set(rows)


def test_the_models_that_examples_load_are_known() -> None:
    text = README.read_text(encoding="utf-8")
    named = re.findall(r'(?:load\("|sloth (?:train|chat|info|estimate) |--model )([\w./-]+)', text)
    examples = {name for name in named if not name.isupper()}  # MODEL stands for any
    assert examples and examples <= set(ALIASES)
