"""Everything a user of `sloth` may want to catch: one base class, one class per cause."""

from typing import Any


class SlothError(Exception):
    """Base of all errors that `sloth` raises on purpose."""


def one_line(error: Any, within: str = "") -> str:
    """What a pydantic ValidationError complains of, setting by setting.

    within: the block of settings that it is about, if not all of them.
    """
    parts = []
    for problem in error.errors():
        place = ".".join(str(part) for part in (within, *problem["loc"]) if part != "")
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})" if problem["loc"] else ""
        parts.append(f"{place}: {message}{given}" if place else message)
    return "; ".join(parts)


class UnknownModel(SlothError):
    """A model name that is no alias, no hub repository that can be read, and no path."""


class UnsupportedConfig(SlothError):
    """A config.json (or GGUF header) that asks for something `sloth` does not compute."""


class CheckpointMismatch(SlothError):
    """Weights that are missing, extra, misshapen, unsafe to read, or damaged."""


class KernelUnavailable(SlothError):
    """A device, kernel level or engine that was asked for by name and cannot run here."""


class AdapterMismatch(SlothError):
    """An adapter that belongs to another base model or cannot be represented."""


class NoTargets(SlothError):
    """LoRA targets that match no projection of the model."""


class DataError(SlothError):
    """Training data that cannot be used: malformed rows, nothing to train on, wrong format."""


class TokenizerMissing(SlothError):
    """A text call on a model whose folder holds no tokenizer files or no chat template."""


class OutputExists(SlothError):
    """An output folder that already holds files."""


class NonFiniteGradients(SlothError):
    """Too many steps in a row with a NaN or infinite gradient."""


class SaveFailed(SlothError):
    """A checkpoint that could not be written: disk full, no permission."""


class UploadFailed(SlothError):
    """A push to the hub that was refused: no token, no permission, no connection."""


class BudgetTooSmall(SlothError):
    """A memory budget that no plan of a training step fits into."""


class OutOfMemory(SlothError):
    """One row alone does not fit into the device's memory."""


class RankFailed(SlothError):
    """Another process of the same run failed, so this one stopped, too."""


class Interrupted(SystemExit):
    """Training was asked to stop (SIGINT, SIGTERM) and did, after saving a checkpoint.

    A SystemExit with code 128 + the signal's number, so that an uncaught one ends the process with
    the status that shells and schedulers expect: 130 or 143.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(128 + signal_number)
        self.message = message

    def __str__(self) -> str:
        return self.message
