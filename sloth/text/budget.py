"""What a chat template may use up: a budget of steps and a limit on the size of a value.

Steps are counted, not timed, so a template passes or fails the same way on every machine. Values
are sized before they are made where that is possible. A list or dict counts with everything it
holds, as often as it holds it: x = [x, x] thirty times over is a small object that prints as a
gigabyte.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

from sloth.errors import DataError

# Two nested loops over 600 items, or 0.3 s; for each byte of input MAX_STEPS grows by four.
MAX_STEPS = 400_000
# Of one value or the output, beyond four times the size of the input.
MAX_VALUE_BYTES = 2 * 2**20
MAX_WIDTH = 1000
MAX_JSON_INDENT = 16  # each level of nesting holds a text of so many characters a level
MAX_INTEGER_BITS = 4096

_BYTES_PER_STEP = 32
_ITEMS_PER_STEP = 4
_BYTES_SEARCHED_PER_STEP = 256  # of what a container holds: each part is compared, not written
_PAIRS_PER_STEP = 1024  # of a character with a character, where Python compares all with all
_ITEM_BYTES = 64  # a small object and the reference to it
_WIDE_PERCENT = re.compile(r"%[^A-Za-z%]*(\*|\d{4,})")
_WIDE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(\{|\d{4,})")


def stopped(reason: str) -> DataError:
    """The error of a template that goes too far."""
    return DataError(f"the chat template was stopped: {reason}")


class Budget:
    """Steps left for one rendering of `given`, the template's variables."""

    def __init__(self, given: Any) -> None:
        self._sizes: dict[
            int, tuple[int, Any]
        ] = {}  # id -> size, and the object to keep the id taken
        self._most_bytes = sys.maxsize
        self._input_bytes = self.size_of(given)
        self._most_bytes = MAX_VALUE_BYTES + 4 * self._input_bytes
        self._most_steps = self.steps = MAX_STEPS + 4 * self._input_bytes
        self._largest = 0

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise stopped(f"it took more than {self._most_steps} steps of work")

    def tick(self, weight: int) -> bool:
        """One pass through a body; dearer once there are large values it may compare or search."""
        self.spend(weight * (1 + self._largest // 4096))
        return True

    def allow(self, num_bytes: int) -> None:
        """Pay for `num_bytes` that are about to be written."""
        if num_bytes > self._most_bytes:
            raise stopped(f"it makes a value of {num_bytes} bytes, more than {self._most_bytes}")
        self._largest = max(self._largest, num_bytes - self._input_bytes)
        self.spend(1 + num_bytes // _BYTES_PER_STEP)

    def size_of(self, value: Any) -> int:
        """Bytes of a value with everything in it; a container seen before is not walked again."""
        if isinstance(value, str | bytes):
            return sys.getsizeof(value)
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise stopped("it makes a huge number")
        if not isinstance(value, dict | list | tuple | set | frozenset):
            return _ITEM_BYTES
        known = self._sizes.get(id(value))
        if known is not None:
            return known[0]
        items: Iterable[Any] = (
            (*value.keys(), *value.values()) if isinstance(value, dict) else value
        )
        size = _ITEM_BYTES + sum(_ITEM_BYTES + self.size_of(item) for item in items)
        if size > self._most_bytes:
            raise stopped(f"it makes a value of {size} bytes, more than {self._most_bytes}")
        self._sizes[id(value)] = size, value
        return size

    def write(self, value: Any) -> None:
        """Pay for turning a value, with everything in it, into text."""
        self.allow(self.size_of(value))

    def written(self, value: Any) -> str:
        """A value as text, paid for."""
        self.write(value)
        return str(value)

    def bounded(self, parts: Iterable[str]) -> Iterator[str]:
        """Parts of a text that is made bit by bit, up to the largest value allowed."""
        length = 0
        for part in parts:
            length += len(part)
            self.spend(1 + len(part) // _BYTES_PER_STEP)
            if length > self._most_bytes:
                raise stopped(f"it makes a value of more than {self._most_bytes} bytes")
            yield part

    def look(self, value: Any) -> None:
        """Pay for one pass over a value's items or characters."""
        if isinstance(value, str | bytes):
            self.spend(1 + len(value) // _BYTES_PER_STEP)
        elif isinstance(value, Sized):
            self.spend(1 + len(value) // _ITEMS_PER_STEP)
        else:
            self.spend(1)

    def searched(self, value: Any) -> Any:
        """Pay for a search through a value, before an `in`, and return it."""
        self.look(value)
        if not isinstance(value, str | bytes | dict):
            self.spend(self.size_of(value) // _BYTES_SEARCHED_PER_STEP)
        return value

    def compare_all(self, text: Any, other: Any) -> None:
        """Pay for comparing each character of one text with each of another."""
        if isinstance(other, str | bytes):
            self.spend(1 + len(text) * min(len(text), len(other)) // _PAIRS_PER_STEP)

    def made(self, value: Any) -> Any:
        """Pay for a value the template has made and return it; a generator pays as it goes."""
        if isinstance(value, GeneratorType):
            return self.paid(value)
        size = self.size_of(value)
        if isinstance(value, str):
            self.allow(size)
        else:
            self._largest = max(self._largest, size - self._input_bytes)
            self.look(value)
        return value

    def paid(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            yield self.made(value)

    def joined(self, parts: Iterable[Any], separator: str = "") -> list[Any]:
        """The parts as a list, their joined text paid for."""
        found = list(parts)
        if all(isinstance(part, str) for part in found):
            letter = 1 if separator.isascii() and all(map(str.isascii, found)) else 4
            self.allow(letter * (sum(map(len, found)) + len(separator) * len(found)))
        else:
            self.allow(sum(map(self.size_of, found)) + 4 * len(separator) * len(found))
        return found


BUDGET: ContextVar[Budget] = ContextVar("chat template budget")


# str methods whose numbers are widths, that search backwards, or that strip.
_WIDTH_METHODS = ("center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill")
_BACKWARD_METHODS = ("rfind", "rindex", "rpartition", "rsplit")
_STRIP_METHODS = ("lstrip", "rstrip", "strip")
# Methods that no chat template needs and whose work cannot be told from their input.
_BLOCKED_METHODS = ("encode", "maketrans", "translate")


# -- operators and methods that must be looked at before they run ---------------------------------


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse or pay for what +, *, ** and % are about to make."""
    budget = BUDGET.get()
    if operator == "%" and isinstance(left, str):
        check_percent(left, right)
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        budget.joined((left, right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                budget.allow((sys.getsizeof(value) - sys.getsizeof(type(value)())) * max(times, 0))
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * abs(right) if operator == "**" else bits + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise stopped("it makes a huge number")


def check_percent(text: str, values: Any) -> None:
    """text % values: no width of the template's making, and each place may hold all the values."""
    if _WIDE_PERCENT.search(text):
        raise stopped("it formats with a width of its own making")
    budget = BUDGET.get()
    budget.allow(sys.getsizeof(text) + text.count("%") * budget.size_of(values))


def check_format(text: str, *values: Any) -> None:
    """text.format(*values)."""
    if _WIDE_FORMAT.search(text):
        raise stopped("it formats with a width of its own making")
    budget = BUDGET.get()
    budget.allow(sys.getsizeof(text) + text.count("{") * sum(map(budget.size_of, values)))


def check_replace(text: str, old: Any = None, new: Any = None) -> None:
    """text.replace(old, new)."""
    if isinstance(old, str) and isinstance(new, str):
        letter = 1 if text.isascii() and new.isascii() else 4
        BUDGET.get().allow(letter * (len(text) + text.count(old) * len(new)))


def check_strip(text: str, *characters: Any) -> None:
    """text.strip(characters): Python looks for each character of the text among them."""
    budget = BUDGET.get()
    budget.look(text)
    for given in characters:
        budget.compare_all(text, given)


def check_method(owner: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse or pay for what a method of str is about to make; returns the arguments to give it."""
    budget = BUDGET.get()
    if name in _BLOCKED_METHODS:
        raise stopped(f"the method {name} is not allowed")
    if name in _WIDTH_METHODS:
        check_widths(name, args)
    if name == "expandtabs":
        budget.allow(len(owner) + owner.count("\t") * MAX_WIDTH)
    elif name == "replace":
        check_replace(owner, *args[:2])
    elif name == "join" and args:
        return (budget.joined(budget.paid(args[0]), owner), *args[1:])
    elif name in _STRIP_METHODS:
        check_strip(owner, *args[:1])
    elif name in _BACKWARD_METHODS:  # unlike find, these may compare all with all
        budget.look(owner)
        budget.compare_all(owner, args[0] if args else None)
    else:
        budget.look(owner)
    return args


def check_widths(where: str, arguments: Iterable[Any], most: int = MAX_WIDTH) -> None:
    """Numbers that become padding or counts."""
    for argument in arguments:
        if isinstance(argument, int | float) and not abs(argument) <= most:
            raise stopped(f"{where} with {argument}, at most {most} is allowed")
        if isinstance(argument, str) and len(argument) > most:
            raise stopped(f"{where} with a text of {len(argument)} characters")
