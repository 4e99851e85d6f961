"""Write a Hugging Face folder of random weights in a real model's shape, for speed and memory
figures.

    python tools/random_checkpoint.py llama-3.1-8b FOLDER            # bf16 shards
    python tools/random_checkpoint.py llama-3.1-8b FOLDER --nf4      # bitsandbytes 4-bit

Weights are N(0, 1/sqrt(in)), norms 1: the loss starts near log(vocabulary) and gradients are of
ordinary size. Random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sloth.formats.checkpoint import write_safetensors
from sloth.linear import Projection
from sloth.models.llama import LlamaConfig, LlamaDecoder
from sloth.quant.bnb import bnb_quantization_config, bnb_tensors
from sloth.quant.nf4 import quantize_nf4

_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _llama(hidden: int, layers: int, heads: int, ffn: int, tied: bool = False) -> dict:
    return dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=_LLAMA3_ROPE,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, tied=True),
    "llama-3.1-8b": _llama(4096, 32, 32, 14336),
    "llama-3.1-70b": _llama(8192, 80, 64, 28672),
}


def random_tensors(config: LlamaConfig, nf4: bool, device: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in bf16, or its NF4 files, one at a time."""
    with torch.device("meta"):
        network: nn.Module = LlamaDecoder(config)
    generator = torch.Generator(device).manual_seed(0)
    for path, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape = f"{path}.{leaf}", parameter.shape
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
                continue
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
            weight.normal_(0, shape[1] ** -0.5, generator=generator)
            if nf4 and isinstance(module, Projection) and path != "lm_head":
                for key, tensor in bnb_tensors(name, quantize_nf4(weight)).items():
                    yield key, tensor.cpu()
            else:
                yield name, weight.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nf4", action="store_true", help="bitsandbytes 4-bit instead of bf16")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    args = parser.parse_args()
    settings = dict(SHAPES[args.shape])
    if args.layers:
        settings["num_hidden_layers"] = args.layers
    config = LlamaConfig.from_hf(settings)
    args.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_safetensors(args.folder, random_tensors(config, args.nf4, device))
    written = config.to_hf() | {"dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    if args.nf4:
        written["quantization_config"] = bnb_quantization_config(torch.bfloat16)
    (args.folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
