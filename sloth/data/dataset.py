"""Rows -> examples ready for batches, counted, and cached when they come from a file.

`load_data` reads, masks and encodes every row, cuts what is too long the way `on_long` says, drops
what has no trained token, and counts all of it; a set without any trained token is refused with the
cause. Memory is bounded: a file's tokens go to the disk as they are made and are mapped back.

    on_long   truncate  keep the beginning          split  into pieces, every target kept once
              drop      leave the example out       error  refuse the data
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sloth.constants import GIB
from sloth.data.batches import (
    Batch,
    StepPlan,
    collate,
    collate_documents,
    collate_pairs,
    order,
    padding_share,
)
from sloth.data.cache import (
    MIN_CACHED_BYTES,
    NewEntry,
    alone,
    cache_key,
    default_folder,
    hold,
    limit_bytes,
    prune,
    read_content,
    read_entry,
)
from sloth.data.counts import DataCounts
from sloth.data.encode import Encoded, RowEncoder
from sloth.data.examples import Example, Examples, ExamplesWriter
from sloth.data.masks import MaskDisagreement
from sloth.data.packing import Packing, pack
from sloth.data.settings import ROW_FIELDS, DataSettings, OnLong, TrainOn
from sloth.data.sources import Placed, Rows, Source, open_rows
from sloth.errors import DataError
from sloth.names import refuse_unknown

if TYPE_CHECKING:
    from sloth.text.tokenizer import Tokenizer

__all__ = ["Batch", "Dataset", "Source", "StepPlan", "collate", "load_data", "order"]

Notice = Callable[[str], None]
Made = tuple[Examples, DataCounts, str]

PROGRESS_ROWS = 20_000
# Padding-free rows leave the fastest attention kernel (it knows no documents), so a little padding
# is the smaller loss.
MAX_PADDING = 0.1


@dataclass(frozen=True)
class Dataset:
    """Rows ready for batches. fingerprint: sha256 over the examples' tokens and labels, in order.

    packing: which examples share a row; None for one a row. pairs: examples 2 i and 2 i + 1 are the
    chosen and the rejected one of row i. revision: commit of a data set on the hub.
    """

    name: str
    examples: Examples
    counts: DataCounts
    fingerprint: str
    packing: Packing | None = None
    pairs: bool = False
    revision: str | None = None

    @property
    def num_rows(self) -> int:
        """What a step counts in."""
        if self.pairs:
            return len(self.examples) // 2
        return len(self.packing.rows) if self.packing else len(self.examples)

    def row_lengths(self) -> list[int]:
        """Tokens of each row; of a pair, with the padding of its shorter half."""
        lengths: list[int] = self.examples.lengths.tolist()
        if self.pairs:
            halves = zip(lengths[::2], lengths[1::2], strict=True)
            return [2 * max(chosen, rejected) for chosen, rejected in halves]
        if self.packing is None:
            return lengths
        return [sum(lengths[index] for index in row) for row in self.packing.rows]

    def pass_shape(self, rows: int) -> tuple[int, int]:
        """(examples, tokens of the longest) of the largest forward pass of so many rows."""
        longest = max(self.row_lengths())
        return (2 * rows, longest // 2) if self.pairs else (rows, longest)

    def summary(self) -> str:
        """One line: counts, and how full packed rows are."""
        said = self.counts.summary()
        if self.packing is None:
            return said
        return f"{said}; packed into {self.num_rows} rows, {self.packing.fill:.1%} full"

    def batch(self, rows: Iterable[int], pad_id: int, padding_free: bool = False) -> Batch:
        """Some rows as tensors. padding_free: where much would be padding, as one row of
        documents instead; the loss is the same.
        """
        if self.pairs:
            pairs = [(self.examples[2 * row], self.examples[2 * row + 1]) for row in rows]
            lengths = [len(example.tokens) for pair in pairs for example in pair]
            is_free = padding_free and padding_share(lengths) > MAX_PADDING
            return collate_pairs(pairs, pad_id, is_free)
        if self.packing is not None:
            packed = [self.packing.rows[row] for row in rows]
            documents = [[self.examples[index] for index in row] for row in packed]
            return collate_documents(documents, pad_id)
        examples = [self.examples[row] for row in rows]
        if padding_free and padding_share([len(e.tokens) for e in examples]) > MAX_PADDING:
            return collate_documents([examples], pad_id)
        return collate(examples, pad_id)


def load_data(
    source: Source,
    tokenizer: Tokenizer,
    max_length: int,
    name: str = "data",
    *,
    split: str = "train",
    on_long: OnLong = "truncate",
    train_on: TrainOn = "assistant",
    columns: dict[str, str] | None = None,
    packing: bool = False,
    skip_bad: bool = False,
    pairs: bool = False,
    notice: Notice | None = None,
) -> Dataset:
    """Read, encode, mask and count every row of `source`; see sources.py for what that can be.

    columns: which column holds which field; empty as none. pairs: rows are preference pairs, kept
    whole or not at all; they are neither split nor packed.
    Raises DataError for a malformed row (place, field, expectation) unless skip_bad, which leaves
    such rows out and counts them; for no rows, and for no trained token.
    """
    refuse_unknown(columns or (), ROW_FIELDS, "field in columns")
    rows = open_rows(source, name, split)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "on_long": on_long,
        "train_on": train_on,
        "columns": columns or None,
        "skip_bad": skip_bad,
        "pairs": pairs,
    }
    maker = _Maker(rows, tokenizer, settings, notice or (lambda text: None))
    examples, counts, fingerprint = maker.cached_or_made()
    rows_of = pack(examples.lengths.tolist(), max_length) if packing else None
    return Dataset(rows.name, examples, counts, fingerprint, rows_of, pairs, rows.revision)


def load_for(
    settings: DataSettings,
    source: Source,
    tokenizer: Tokenizer,
    split: str = "train",
    notice: Notice | None = None,
) -> Dataset:
    """`load_data` under a run's settings. Held-out rows are never packed."""
    return load_data(
        source,
        tokenizer,
        settings.max_length,
        "data" if split == "train" else "eval_data",
        split=split,
        on_long=settings.on_long,
        train_on=settings.train_on,
        columns=settings.columns,
        packing=settings.packing and split == "train",
        skip_bad=settings.skip_bad,
        pairs=settings.pairs,
        notice=notice,
    )


def require_vocabulary(data: Dataset, vocab_size: int) -> None:
    """Raise DataError for a token that the model has no row for: on a GPU, looking it up would end
    the process.
    """
    largest = data.examples.largest_id
    if largest >= vocab_size:
        raise DataError(
            f"{data.name} holds the token id {largest}, and the model has rows for {vocab_size} "
            "tokens (vocab_size); use the model's own tokenizer, or add the tokens in Python with "
            "model.add_tokens"
        )


class _Maker:
    """Turns the rows of one source into examples, through the cache if there is one."""

    def __init__(
        self, rows: Rows, tokenizer: Tokenizer, settings: dict[str, Any], notice: Notice
    ) -> None:
        self.rows, self.tokenizer, self.settings, self.notice = rows, tokenizer, settings, notice
        self.max_length, self.on_long = settings["max_length"], settings["on_long"]

    def cached_or_made(self) -> Made:
        """(examples, counts, fingerprint)."""
        cache = default_folder()
        if cache is None or not self.rows.files or self.rows.num_bytes < MIN_CACHED_BYTES:
            return self._made(ExamplesWriter())
        most_bytes = limit_bytes()
        content = read_content(self.rows.files)
        folder = cache / cache_key(content, self.tokenizer, self.settings)
        try:
            found = self._found(folder)
            if found is None:
                with alone(folder, self._tell_of_waiting):
                    found = self._found(folder) or self._kept_in(folder, content.num_lines)
                self._prune(cache, most_bytes)
            return found
        except OSError as error:  # no permission, no room left
            self.notice(f"WARNING: prepared data are not kept, {cache} cannot be used: {error}")
            return self._made(ExamplesWriter(), content.num_lines)

    def _found(self, folder: Path) -> Made | None:
        found = read_entry(folder)
        if found is None:
            return None
        examples, index = found
        self.notice(f"{self.rows.name}: {len(examples)} prepared examples from {folder}")
        return examples, DataCounts(**index["counts"]), index["fingerprint"]

    def _kept_in(self, folder: Path, num_lines: int) -> Made:
        with NewEntry(folder) as entry:
            writer = ExamplesWriter(entry.partial)
            examples, counts, fingerprint = self._made(writer, num_lines)
            index = {"counts": asdict(counts), "fingerprint": fingerprint, "files": writer.files}
            entry.publish(index)
        examples.in_use = hold(folder)
        return examples, counts, fingerprint

    def _tell_of_waiting(self) -> None:
        self.notice(f"{self.rows.name}: another process is preparing the same; waiting for it")

    def _prune(self, cache: Path, most_bytes: int) -> None:
        gone, gone_bytes = prune(cache, most_bytes)
        if gone:
            self.notice(
                f"{gone} older prepared data sets ({gone_bytes / GIB:.2f} GiB) deleted from "
                f"{cache}, which may take {most_bytes / GIB:g} GiB (SLOTH_CACHE_GIB)"
            )

    def _made(self, writer: ExamplesWriter, num_lines: int = 0) -> Made:
        try:
            return self._written(writer, num_lines, by_prefixes=False)
        except MaskDisagreement as error:
            if not self.rows.can_reread:
                raise DataError(
                    f"{error}; give a list or a file, to be read a second time"
                ) from error
            self.notice(f"{error}; all rows are rendered again, up to each turn")
            return self._written(ExamplesWriter(writer.folder), num_lines, by_prefixes=True)

    def _written(self, writer: ExamplesWriter, num_lines: int, by_prefixes: bool) -> Made:
        counts = DataCounts()
        encoder = RowEncoder(
            self.tokenizer,
            self.settings["train_on"],
            self.settings["columns"],
            by_prefixes,
            counts.add_malformed if self.settings["skip_bad"] else None,
            self.settings["pairs"],
        )
        for encoded in encoder.encode(self._watched(num_lines)):
            counts.add_row(encoded)
            for number, kept in enumerate(self._kept(encoded, counts)):
                counts.examples += 1
                counts.tokens += len(kept.tokens)
                counts.trained_tokens += kept.num_trained
                writer.add(kept, begins_row=number == 0)
        counts.by_prefixes = encoder.shapes.num_by_prefixes
        if not counts.rows:
            why = "holds no rows"
            if counts.malformed:
                first = "; ".join(counts.malformed_first)
                why = f"holds {counts.malformed} rows, all of them malformed; first {first}"
            raise DataError(f"{self.rows.name} {why}")
        if not counts.examples:
            raise DataError(
                f"{self.rows.name}: nothing to train on in {counts.rows} rows; "
                f"{self._why_nothing(counts)}"
            )
        examples, fingerprint = writer.finish()
        return examples, counts, fingerprint

    def _watched(self, num_lines: int) -> Iterator[Placed]:
        """The rows, told about now and then. num_lines: about how many, 0 if unknown."""
        for number, placed in enumerate(self.rows.read()):
            if number and number % PROGRESS_ROWS == 0:
                share = f" of about {num_lines} ({number / num_lines:.0%})" if num_lines else ""
                self.notice(f"preparing {self.rows.name}: {number} rows{share}")
            yield placed

    def _kept(self, encoded: Encoded, counts: DataCounts) -> list[Example]:
        """What is kept of a row's examples: of a pair both, or neither."""
        fitted = [self._fitted(example, counts, encoded.where) for example in encoded.examples]
        kept = [example for part in fitted for example in part]
        if self.settings["pairs"] and not all(fitted):
            counts.dropped_with_other += len(kept)
            return []
        return kept

    def _fitted(self, example: Example, counts: DataCounts, where: str) -> list[Example]:
        """What is kept of an example; the rest is counted."""
        length, limit = len(example.tokens), self.max_length
        counts.longest = max(counts.longest, length)
        if not example.num_trained:
            counts.truncated += length > limit and self.on_long == "truncate"
            counts.dropped_by_mask += 1
            return []
        if length <= limit:
            return [example]
        if self.on_long == "error":
            raise DataError(
                f"{where} has {length} tokens, more than max_length={limit}; raise max_length, or "
                "choose on_long='truncate', 'split' or 'drop'"
            )
        if self.on_long == "drop":
            counts.dropped_by_length += 1
            return []
        if self.on_long == "split":
            pieces = [piece for piece in _pieces(example, limit) if piece.num_trained]
            counts.split += 1
            counts.pieces += len(pieces)
            return pieces
        counts.truncated += 1
        counts.cut_tokens += length - limit
        cut = Example(example.tokens[:limit], example.labels[:limit])
        if cut.num_trained:
            return [cut]
        counts.dropped_by_truncation += 1
        return []

    def _why_nothing(self, counts: DataCounts) -> str:
        causes = []
        if counts.dropped_by_truncation:
            causes.append(
                f"truncation: {counts.dropped_by_truncation} lost every trained token to "
                f"max_length={self.max_length} (the longest has {counts.longest} tokens); raise "
                "max_length"
            )
        if counts.dropped_by_length:
            causes.append(
                f"length: {counts.dropped_by_length} were dropped for more than "
                f"max_length={self.max_length} tokens (the longest has {counts.longest}); raise "
                "max_length, or choose on_long='truncate' or 'split'"
            )
        if counts.dropped_by_mask:
            causes.append(
                f"mask: {counts.dropped_by_mask} hold nothing that is trained (chat rows need a "
                "message with role assistant, other rows a text)"
            )
        return "; ".join(causes)


def _pieces(example: Example, limit: int) -> Iterator[Example]:
    """Pieces of at most `limit` tokens. The first token of a piece is no target, so each begins
    with the last one of the piece before: every target stays one, once.
    """
    for start in range(0, len(example.tokens) - 1, limit - 1):
        end = start + limit
        yield Example(example.tokens[start:end], example.labels[start:end])
