"""The same step in Unsloth, driven through its documented calls.

--variant default keeps its default, checkpoints offloaded to the host; best turns checkpointing
off, which is its fastest setting where memory allows. Unsloth loads no model without a tokenizer,
and a folder of random weights has none, so one is made up: as many words as the model has rows,
padding at an id that no batch contains.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import ALPHA, DEVICE, TARGETS, Clock, arguments, measure
from benchmarks.data import Batch

CHECKPOINTING = {"default": "unsloth", "best": False}


def with_tokenizer(folder: Path, into: Path) -> Path:
    """A folder of links to a checkpoint's files, beside a word-level tokenizer of its size."""
    for path in folder.iterdir():
        (into / path.name).symlink_to(path.resolve())
    if (folder / "tokenizer.json").exists():
        return into
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    names = {0: "<unk>", 1: "<s>", 2: "</s>", size - 1: "<pad>"}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(size)}
    special = [
        {"id": i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, name in sorted(names.items())
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 131072,
    }
    (into / "tokenizer.json").write_text(json.dumps(tokenizer))
    (into / "tokenizer_config.json").write_text(json.dumps(settings))
    return into


def run(work: Path) -> None:
    """Load, attach, measure; `work` takes the tokenizer and what Unsloth compiles."""
    args = arguments(__doc__ or "", tuple(CHECKPOINTING))
    # Read when unsloth is imported: it patches transformers and asks the hub for statistics.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(work / "compiled")
    from unsloth import FastLanguageModel

    (work / "model").mkdir()
    folder = with_tokenizer(args.folder, work / "model")
    checkpointing = CHECKPOINTING[args.variant]
    clock = Clock()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=args.length,
        dtype=torch.bfloat16,
        load_in_4bit=args.dtype == "nf4",
        load_in_16bit=args.dtype == "bf16",
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
    )
    model.train()
    load_s = clock.seconds()
    trainable = [p for p in model.parameters() if p.requires_grad]

    def loss_of(batch: Batch) -> Tensor:
        packing = {}
        if batch.positions is not None:
            lengths = torch.tensor(batch.lengths, dtype=torch.int32, device=DEVICE)
            packing = {"position_ids": batch.positions, "packed_seq_lengths": lengths}
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss: Tensor = model(input_ids=batch.tokens, labels=batch.labels, **packing).loss
        return loss

    measure("Unsloth", args, loss_of, trainable, load_s, args.variant)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        run(Path(work))


if __name__ == "__main__":
    main()
