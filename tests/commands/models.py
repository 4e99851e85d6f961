"""A tiny model as a folder that every command can load: weights, and a tokenizer of characters."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.oracles import save_tiny_llama

SPECIALS = ("<pad>", "<s>", "</s>")  # the ids that the tiny configs give them
TEXTS = [{"text": "one two three " * n} for n in (1, 3, 9, 2, 5, 14, 4, 1, 7, 6, 11)]


def save_tiny_model(folder: Path) -> Path:
    """A random tiny Llama that reads ASCII, a token each character."""
    return save_tokenizer(save_tiny_llama(folder))


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of characters beside a tiny model."""
    letters = [chr(code) for code in range(32, 127)]
    ids = {text: index for index, text in enumerate([*SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "pad_token": SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_texts(path: Path) -> Path:
    """The rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return path
