"""The README's table of supported models, made from the tables that loading goes by.

    python -m tools.models_table            # print it
    python -m tools.models_table --write    # put it into README.md, between its two markers

What the code knows is read from it: the model types, which have a fused twin, which GGUF
architecture they are written as, and of which multimodal models the text tower is loaded. Only the
names people know the models by stand here; a type without one, or an alias nobody knows, fails.
"""

from __future__ import annotations

from sloth.formats.gguf_archs import arch_of_model
from sloth.formats.hub import ALIASES
from sloth.formats.wrapper import WRAPPERS
from sloth.kernels.dispatch import TWINS
from sloth.models import ARCHITECTURES
from tools.readme import between, command

BEGIN = "<!-- models: python -m tools.models_table --write -->"
END = "<!-- end of models -->"
COMMAND = "python -m tools.models_table --write"

# model_type -> (what it is called, aliases to try).
KNOWN_AS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": (
        "Llama 1, 2, 3, 3.1, 3.2, 3.3, CodeLlama, TinyLlama, SmolLM2, Yi, R1-Distill-Llama",
        ("llama-3.2-1b", "llama-3.1-8b", "smollm2-135m"),
    ),
    "mistral": (
        "Mistral 7B v0.1-v0.3, Nemo 12B, Small 22B and 24B, Codestral, Devstral, Magistral",
        ("mistral-7b", "mistral-nemo-12b"),
    ),
    "ministral": ("Ministral 8B", ()),
    "ministral3": ("Ministral 3: 3B, 8B, 14B", ()),
    "qwen2": (
        "Qwen 2 and 2.5 with Coder and Math, QwQ, R1-Distill-Qwen",
        ("qwen2.5-0.5b", "qwen2.5-7b"),
    ),
    "qwen3": ("Qwen 3: 0.6B to 32B, 2507 releases", ("qwen3-0.6b", "qwen3-8b")),
    "gemma": ("Gemma 2B, 7B, CodeGemma", ()),
    "gemma2": ("Gemma 2: 2B, 9B, 27B", ("gemma-2-2b", "gemma-2-9b")),
    "gemma3_text": ("Gemma 3: 270M, 1B", ("gemma-3-270m", "gemma-3-1b")),
    "smollm3": ("SmolLM3 3B", ()),
    "gemma3": ("Gemma 3: 4B, 12B, 27B, text tower", ()),
    "mistral3": ("Mistral Small 3.1 and 3.2, Ministral 3, text tower", ()),
}


def table() -> str:
    """Markdown: a row for each model type, multimodal ones last."""
    lines = [
        "| `model_type` | checkpoints | aliases | fused twin | GGUF in, out |",
        "|---|---|---|---|---|",
    ]
    for model_type in [*ARCHITECTURES, *WRAPPERS]:
        assert model_type in KNOWN_AS, f"{model_type} needs a name in KNOWN_AS of {__file__}"
        names, aliases = KNOWN_AS[model_type]
        strangers = set(aliases) - set(ALIASES)
        assert not strangers, f"{strangers} are no aliases; see sloth.formats.hub.ALIASES"
        arch = arch_of_model(model_type)
        as_text = "as its text model" if model_type in WRAPPERS else ""
        cells = [
            f"`{model_type}`",
            names,
            ", ".join(f"`{alias}`" for alias in aliases),
            "yes" if model_type in TWINS else as_text,
            f"`{arch.name}`" if arch else as_text,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rewritten(readme: str) -> str:
    """The README's text with the table as it is now."""
    return between(readme, BEGIN, END, table())


if __name__ == "__main__":
    command(__doc__ or "", table, rewritten)
