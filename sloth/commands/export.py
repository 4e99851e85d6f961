"""`sloth export MODEL`: files for Hugging Face or GGUF programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sloth.commands.base import Loaded, Loading, ModelName, Quant, parse, show


@dataclass(frozen=True)
class Export:
    """Write MODEL with its adapter merged, or its base, as a Hugging Face folder or GGUF file."""

    model: ModelName
    merged: Path | None = None
    """Folder for the model with --adapter merged into it."""
    base: Path | None = None
    """Folder for the model without an adapter."""
    quant: Quant = None
    """Write --base in bitsandbytes 4-bit."""
    gguf: Path | None = None
    """GGUF file for the model, with --adapter merged if given; a Modelfile comes beside it."""
    gguf_quant: Literal["f16", "bf16", "q8_0", "q4_0"] | None = None
    """How --gguf is stored; f16 unless said."""
    gguf_adapter: Path | None = None
    """Folder for --adapter as a GGUF file."""
    loading: Loaded = field(default_factory=Loading)


def run(arguments: Sequence[str]) -> int:
    """Write a merged model, a base or an adapter, for Hugging Face or GGUF programs."""
    parsed = parse(Export, "export", arguments)
    if (parsed.merged, parsed.base, parsed.gguf, parsed.gguf_adapter) == (None,) * 4:
        raise ValueError(
            "nothing to export: give --merged DIR (with --adapter), --base DIR, --gguf FILE.gguf "
            "or --gguf-adapter DIR (with --adapter)"
        )
    for flag in ("merged", "gguf_adapter"):
        if getattr(parsed, flag) is not None and parsed.loading.adapter is None:
            raise ValueError(f"--{flag.replace('_', '-')} needs --adapter DIR, the adapter")
    if parsed.quant is not None and parsed.base is None:
        raise ValueError("--quant says how --base is written; give --base DIR")
    if parsed.gguf_quant is not None and parsed.gguf is None:
        raise ValueError("--gguf-quant says how --gguf is stored; give --gguf FILE.gguf")
    model = parsed.loading.load(parsed.model, None)
    if parsed.merged is not None:
        show(f"merged  {model.save_merged(parsed.merged)}")
    if parsed.base is not None:
        show(f"base    {model.save_base(parsed.base, quant=parsed.quant)}")
    if parsed.gguf is not None:
        show(f"gguf    {model.save_gguf(parsed.gguf, quant=parsed.gguf_quant or 'f16')}")
    if parsed.gguf_adapter is not None:
        show(f"adapter {model.save_adapter(parsed.gguf_adapter, format='gguf')}")
    return 0
