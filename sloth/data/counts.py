"""What became of the rows of a data set: nothing is cut, dropped or odd without a number."""

from __future__ import annotations

from dataclasses import dataclass, field

from sloth.data.encode import Encoded
from sloth.errors import DataError

NAMED_MALFORMED, NAMED_CHARACTERS = 3, 240
COUNTED_ROLES, NAMED_ROLES = 20, 3


@dataclass
class DataCounts:
    """What became of the rows. All but rows, kinds, malformed and empty count examples or their
    tokens.

    malformed: rows that could not be read and are left out, beside the `rows`; malformed_first:
    what is wrong with the first of them, and where.

    truncated, split: longer than max_length and cut; pieces: what split ones became. A dropped
    example is not kept: without a trained token, too long, or the other half of such a one in a
    pair; same_answers: pairs whose halves are equal. turns: trained assistant turns;
    unstopped: of those, without a stop token at their end; unwritten: whose words the template does
    not write in full. by_prefixes: rows whose mask took more than one rendering. longest: tokens of
    the longest example before any cut. held_out: rows that are evaluated in place of trained on
    (val_set_size); they are in no other number but `rows`. unknown_roles: messages by roles that
    are none of the usual; of the first few such. lacks_tools: rows whose tools the template leaves
    out.
    """

    rows: int = 0
    malformed: int = 0
    malformed_first: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    truncated: int = 0
    split: int = 0
    pieces: int = 0
    dropped_by_truncation: int = 0
    dropped_by_mask: int = 0
    dropped_by_length: int = 0
    dropped_with_other: int = 0
    same_answers: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut_tokens: int = 0
    empty: int = 0
    turns: int = 0
    unstopped: int = 0
    double_bos: int = 0
    lacks_bos: int = 0
    by_prefixes: int = 0
    longest: int = 0
    held_out: int = 0
    unwritten: int = 0
    lacks_tools: int = 0
    unknown_roles: dict[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Examples left out."""
        alone = self.dropped_by_truncation + self.dropped_by_mask + self.dropped_by_length
        return alone + self.dropped_with_other

    @property
    def malformed_share(self) -> float:
        """Of all rows that were met."""
        return self.malformed / max(self.rows + self.malformed, 1)

    def summary(self) -> str:
        """One line with the counts and shares."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        seen = max(self.examples + self.dropped, 1)
        split = f"{self.split} split into {self.pieces}, " if self.split else ""
        malformed = ""
        if self.malformed:
            malformed = f", {self.malformed} malformed skipped ({self.malformed_share:.1%})"
        held_out = f", {self.held_out} held out" if self.held_out else ""
        return (
            f"{self.rows} rows ({kinds}){malformed}{held_out}: {self.examples} examples, "
            f"{self.tokens} tokens, {self.trained_tokens / max(self.tokens, 1):.1%} trained; "
            f"{self.truncated} truncated ({self.truncated / seen:.1%}), "
            f"{split}{self.dropped} dropped ({self.dropped / seen:.1%})"
        )

    def warnings(self) -> list[str]:
        """What a person should know before training, in sentences."""
        said = {
            f"{self.malformed} of {self.rows + self.malformed} rows are malformed and left out "
            f"({self.malformed_share:.1%}); first {'; '.join(self.malformed_first)}": (
                self.malformed
            ),
            f"{self.unstopped} of {self.turns} assistant turns do not end in a token that stops "
            "generation, so the model would not learn to stop there": self.unstopped,
            f"of {self.unwritten} of {self.turns} assistant turns the chat template leaves words "
            "out (some drop <think>...</think>), which are not trained": self.unwritten,
            f"{self.double_bos} rows begin with the beginning-of-text token twice; the data may "
            "hold rendered text": self.double_bos,
            f"the chat template of {self.lacks_bos} rows leaves out the beginning-of-text token "
            "that the tokenizer puts before other texts": self.lacks_bos,
            f"the chat template of {self.lacks_tools} rows does not write their tools, which the "
            "model thus never sees": self.lacks_tools,
            f"{self.empty} rows have a blank answer": self.empty,
            f"{self.same_answers} pairs have the same answer twice, which prefers nothing": (
                self.same_answers
            ),
        }
        named = list(self.unknown_roles.items())[:NAMED_ROLES]
        roles = ", ".join(f"{role[:NAMED_CHARACTERS]!r} ({count})" for role, count in named)
        said[
            f"{sum(self.unknown_roles.values())} messages have roles that templates do not know, "
            f"{roles}; only those of assistant are trained"
        ] = len(named)
        return [text for text, count in said.items() if count]

    def add_malformed(self, error: DataError) -> None:
        """Count a row that could not be read; the error names its place and what was expected."""
        self.malformed += 1
        if len(self.malformed_first) < NAMED_MALFORMED:
            self.malformed_first.append(" ".join(str(error).split())[:NAMED_CHARACTERS])

    def add_row(self, row: Encoded) -> None:
        """Count one row, whatever is kept of it."""
        self.rows += 1
        self.kinds[row.kind] = self.kinds.get(row.kind, 0) + 1
        self.empty += row.is_empty
        self.turns += row.turns
        self.unstopped += row.unstopped
        self.unwritten += row.unwritten
        self.double_bos += row.has_double_bos
        self.lacks_bos += row.lacks_bos
        self.lacks_tools += row.lacks_tools
        self.same_answers += row.has_same_answers
        for role in row.unknown_roles:
            if role in self.unknown_roles or len(self.unknown_roles) < COUNTED_ROLES:
                self.unknown_roles[role] = self.unknown_roles.get(role, 0) + 1
