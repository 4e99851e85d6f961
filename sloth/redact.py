"""Keeping secrets out of what is printed and written: logs, settings, cards, exports, trackers.

Hidden are strings that look like a key of a known service, passwords in URLs, and the values of
environment variables whose name says that they are one. A run's settings have no field for a token;
this is for the one that came in a prompt, a path or a message of some library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "[redacted]"
# Shorter values, such as "1" or "yes", say nothing and occur everywhere.
MIN_SECRET_CHARACTERS = 8

_KEY = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[0-9A-Z]{16}"  # AWS
    r"|xox[abpr]-[A-Za-z0-9-]{10,})"  # Slack
)
_URL_PASSWORD = re.compile(r"(://[^\s/:@]*:)[^\s/@]+@")
# Whole words at the end, as in PGPASSWORD: a TOKENIZER is none, nor are MAX_TOKENS.
_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_?KEY)(?![A-Z])"
)


class Redactor:
    """Knows the environment of the moment it was made in."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        values = {
            value
            for name, value in (os.environ if environment is None else environment).items()
            if _SECRET_NAME.search(name.upper()) and len(value) >= MIN_SECRET_CHARACTERS
        }
        # Longest first, so that a secret within another does not leave the rest standing.
        texts = sorted(values, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, texts))) if texts else None

    def text(self, text: str) -> str:
        """`text` with every secret replaced."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        return _URL_PASSWORD.sub(rf"\1{HIDDEN}@", _KEY.sub(HIDDEN, text))

    def path(self, path: Path) -> Path:
        """The same of a path."""
        return Path(self.text(str(path)))

    def value(self, value: Any) -> Any:
        """The same in every string and path of a JSON-like value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Path):
            return self.path(value)
        if isinstance(value, Mapping):
            return {name: self.value(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value
