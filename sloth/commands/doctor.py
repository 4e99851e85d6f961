"""`sloth doctor`: what the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sloth.commands.base import parse, print_rows


@dataclass(frozen=True)
class Doctor:
    """Show what sloth finds on this machine: GPU, driver, torch, triton."""


def run(arguments: Sequence[str]) -> int:
    """What the machine has."""
    parse(Doctor, "doctor", arguments)
    from sloth.machine import describe_machine

    print_rows(describe_machine())
    return 0
