"""A row as the model reads it, for a person to look at before training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from sloth.constants import IGNORE_INDEX
from sloth.data.dataset import Dataset
from sloth.data.examples import Example
from sloth.redact import Redactor

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

SHOWN_CHARACTERS = 1500
NAMED_ROWS, BEGINNING_TOKENS, BEGINNING_CHARACTERS = 4, 48, 60

_TRAINED_STYLE = "bold green"
_CONTROL = {code: "\ufffd" for code in range(32) if chr(code) not in "\n\t"} | {127: "\ufffd"}


def warnings_of(data: Dataset, positions: int | None) -> list[str]:
    """What is odd about the data, in sentences, also for a model made for so many positions (None:
    not known).
    """
    said = data.counts.warnings()
    num_long = 0 if positions is None else int((data.examples.lengths > positions).sum())
    if num_long:
        said.append(
            f"{num_long} examples are longer than the {positions} positions that the model is made "
            "for (max_position_embeddings of its config.json); a smaller max_length cuts them"
        )
    return said


def beginnings(data: Dataset, rows: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The first words of the first few rows of a batch, by which they can be found in the data:
    rows that were dropped, split or packed leave no number that would count those of a file.
    """
    found = []
    for row in rows[:NAMED_ROWS]:
        tokens = data.batch([row], pad_id=0).tokens[0][:BEGINNING_TOKENS].tolist()
        text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
        found.append(Redactor().text(text)[:BEGINNING_CHARACTERS])
    return found


def named_rows(rows: Sequence[int], begins: Sequence[str]) -> str:
    """The rows of a step, in words."""
    named = ", ".join(repr(text.translate(_CONTROL)) for text in begins)
    return f"rows {list(rows)} as they are batched; the first begin {named}"


def describe_first_row(data: Dataset, tokenizer: Tokenizer) -> Text:
    """The first example, or both halves of the first pair."""
    if not data.pairs:
        return describe_row(data.examples[0], tokenizer)
    chosen, rejected = (describe_row(example, tokenizer) for example in data.examples[:2])
    return Text("\n").join((Text("chosen:"), chosen, Text("rejected:"), rejected))


def without_secrets(text: str | Text) -> Text:
    """For a person to see; the style is lost where there are some."""
    plain = text if isinstance(text, str) else text.plain
    safe = Redactor().text(plain)
    return text if isinstance(text, Text) and safe == plain else Text(safe)


def describe_row(example: Example, tokenizer: Tokenizer) -> Text:
    """The row as the model reads it, trained spans in `[+ ... +]` and, on a terminal, in green.

    Decoded with its special tokens and cut to a screenful; control characters are replaced.
    `.plain` is the string.
    """
    text = Text()
    pairs = list(zip(example.tokens, [IGNORE_INDEX, *example.labels[1:]], strict=True))
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        piece = piece.translate(_CONTROL)
        room = SHOWN_CHARACTERS - len(text)
        cut = f"{piece[:room]} ..." if len(piece) > room else piece
        text.append(f"[+{cut}+]" if trained else cut, _TRAINED_STYLE if trained else "dim")
        if len(piece) > room:
            break
    return text
