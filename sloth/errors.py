"""Everything a user of `sloth` may want to catch: one base class, one class per cause."""


class SlothError(Exception):
    """Base of all errors that `sloth` raises on purpose."""


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
