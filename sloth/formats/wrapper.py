"""Multimodal checkpoints: their text tower, read as the text model it is, and what is left out.

Their config.json nests the text model's under `text_config`, and their tensors carry a prefix that
changed over the years: `language_model.model.layers`, `model.language_model.layers`, or none. For
text alone the tower computes what the text model does; the vision tower and the projector into
the text model are left out, by name and never in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

from torch import Tensor

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.models.config import KeyReader

# model_type of a wrapper -> that of its text_config, where the file does not say.
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}

# What wrappers say of images, and of the head (`_is_tied`).
_IMAGE_KEYS = """
    boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index
    mm_tokens_per_image multimodal_projector_bias projector_hidden_act spatial_merge_size
    tie_word_embeddings vision_config vision_feature_layer
""".split()
# Said of the whole model: above the text model's own, which files often leave at its defaults.
_SHARED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")

_TIED, _HEAD = "tie_word_embeddings", "lm_head.weight"

_LEFT_OUT = ("vision_tower.", "multi_modal_projector.")
# On disk -> in the text model. A name without any of them is the text model's own.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
    "model.language_model.": "model.",
}
# In the text model -> in Transformers' class of the whole model, whose head stands outside.
_TEXT, _WHOLE = "model.", "model.language_model."


class Source(Protocol):
    """Tensors by name."""

    names: Any

    def tensor(self, name: str) -> Tensor: ...


def text_config(
    config: dict[str, Any], ignore: Iterable[str] = (), names: Collection[str] | None = None
) -> dict[str, Any]:
    """The text model's config.json inside a wrapper's.

    names: of the text model's tensors if they are known; the head is tied where none of them is
    its own, whatever the config says. Raises UnsupportedConfig.
    """
    keys = KeyReader(config, ignore)
    text = keys.take("text_config")
    if not isinstance(text, dict):
        raise UnsupportedConfig(f"text_config is a {type(text).__name__}, expected an object")
    for key in _IMAGE_KEYS:
        keys.take(key, None)
    keys.finish()
    shared = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    kind = {"model_type": WRAPPERS[keys.model_type]}
    tied = _is_tied(config, text) if names is None else _HEAD not in names
    return kind | text | shared | {_TIED: tied}


def _is_tied(config: dict[str, Any], text: dict[str, Any]) -> bool | None:
    """Whether the head is the embedding, by config.json alone; None for the text model's default.

    The two levels contradict each other in many files. The text model's own word counts, as up to
    Transformers 4; since 5 the wrapper's class says true of itself wherever a file does not, and
    writes that into files with a head of their own. Ministral 3 says true of its 3B text model and
    nothing elsewhere, Mistral Small nothing at all: its head is not tied, as Mistral's default is.
    """
    said = (level.get(_TIED) for level in (text, config))
    return next((value for value in said if value is not None), None)


class TextTower:
    """A wrapper's tensors under the text model's names.

    names: those of the text model. left_out: names on disk of what belongs to images. Raises
    CheckpointMismatch when two tensors come to one name.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._on_disk: dict[str, str] = {}
        self.left_out: list[str] = []
        for name in source.names:
            if is_left_out(name):
                self.left_out.append(name)
                continue
            known = text_name(name)
            if known in self._on_disk:
                raise CheckpointMismatch(
                    f"{name} and {self._on_disk[known]} are both the text model's {known}"
                )
            self._on_disk[known] = name
        self.names = {text: source.names[disk] for text, disk in self._on_disk.items()}

    def tensor(self, name: str) -> Tensor:
        """Tensor by the text model's name."""
        return self._source.tensor(self._on_disk[name])


def is_left_out(name: str) -> bool:
    """Whether a wrapper's tensor or module belongs to images alone."""
    return name.removeprefix("model.").startswith(_LEFT_OUT)


def text_name(name: str) -> str:
    """The text model's name of a wrapper's tensor or module; its own names stay."""
    for on_disk, in_text in _PREFIXES.items():
        if name.startswith(on_disk):
            return in_text + name.removeprefix(on_disk)
    return name


def whole_name(name: str) -> str:
    """The text model's tensor or module as Transformers' class of the whole model has it.

    PEFT goes by these names, whatever the files say: `model.layers.0...` is
    `model.language_model.layers.0...` there, and `lm_head` keeps its place.
    """
    return _WHOLE + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name
