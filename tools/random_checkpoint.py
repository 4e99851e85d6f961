"""Write a Hugging Face folder of random weights in a real model's shape, for speed and memory
figures.

    python tools/random_checkpoint.py llama-3.1-8b FOLDER            # bf16 shards
    python tools/random_checkpoint.py llama-3.1-8b FOLDER --nf4      # bitsandbytes 4-bit
    python tools/random_checkpoint.py llama-3.1-70b FOLDER --nf4 --config-only

The last one writes config.json alone: `random_model` makes the weights on the GPU, where the disk
would not hold them.

Weights are N(0, 1/sqrt(in)), norms 1, biases 0: the loss starts near log(vocabulary) and gradients
are of ordinary size. Random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sloth.formats.checkpoint import write_safetensors
from sloth.kernels.fp8 import BaseCompute
from sloth.kernels.ops.nf4 import NF4Weight, dynamic_map, nf4_code
from sloth.linear import Linear, Projection
from sloth.model import Model
from sloth.models import ARCHITECTURES
from sloth.models.decoder import RMSNorm
from sloth.quant.bnb import bnb_quantization_config, bnb_tensors
from sloth.quant.linear4bit import Linear4bit
from sloth.quant.nf4 import quantize_nf4
from tools.shapes import SHAPES, hf_config


def random_tensors(config: dict[str, Any], nf4: bool, device: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in bf16, or its NF4 files, one at a time. config: config.json's."""
    config_class, decoder = ARCHITECTURES[config["model_type"]]
    with torch.device("meta"):
        network: nn.Module = decoder(config_class.from_hf(config))
    generator = torch.Generator(device).manual_seed(0)
    for path, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape = f"{path}.{leaf}", parameter.shape
            if len(shape) == 1:
                yield name, torch.full(shape, _neutral(module), dtype=torch.bfloat16)
                continue
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
            weight.normal_(0, shape[1] ** -0.5, generator=generator)
            if nf4 and isinstance(module, Projection) and path != "lm_head":
                for key, tensor in bnb_tensors(name, quantize_nf4(weight)).items():
                    yield key, tensor.cpu()
            else:
                yield name, weight.cpu()


def random_model(
    folder: Path, device: str, level: str = "auto", base_compute: BaseCompute = None
) -> Model:
    """A model of a folder's config.json with random weights made on the device: NF4 codes all
    equally likely, with the scale that gives N(0, 1/sqrt(in)) its width; the rest in bf16.

    level, base_compute: as for `sloth.load`. Raises ValueError for a config of dense weights.
    """
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" not in config:
        raise ValueError(f"{folder} is of dense weights; random ones are made in 4 bits only")
    config_class, decoder = ARCHITECTURES[config["model_type"]]
    with torch.device(device):
        network = decoder(config_class.from_hf(config), _in_4_bits).bfloat16()
        for path, module in network.named_modules():
            if isinstance(module, Linear4bit):
                _randomise(module)
            elif isinstance(module, RMSNorm):
                module.weight.data.fill_(_neutral(module))
            elif path.endswith(("embed_tokens", "lm_head")):
                module.weight.data.normal_(0, module.weight.shape[1] ** -0.5)
    return Model(
        *(network, config, None),
        name=folder.name,
        is_quantized=True,
        frozen_base=True,
        requested_level=level,
        base_compute=base_compute,
    )


def _in_4_bits(path: str, inputs: int, outputs: int, bias: bool) -> Projection:
    return (Linear if path == "lm_head" else Linear4bit)(inputs, outputs, bias)


def _randomise(module: Linear4bit) -> None:
    shape = module.out_features, module.in_features
    codes = torch.randint(256, module.weight.shape, dtype=torch.uint8)
    root_mean_square = nf4_code(codes.device).square().mean().sqrt()
    scale = module.in_features**-0.5 / root_mean_square
    # The nested scales are 0, so every block's scale is the offset.
    blocks, nested = torch.zeros_like(module.absmax), torch.zeros_like(module.nested_absmax).float()
    nested_map = dynamic_map(codes.device)
    module.load_nf4(NF4Weight(codes, blocks, shape, torch.bfloat16, nested, scale, nested_map))


def _neutral(module: nn.Module) -> float:
    """What a norm's weight is stored as where it changes nothing; 0 for a bias."""
    return 1.0 - module.offset if isinstance(module, RMSNorm) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nf4", action="store_true", help="bitsandbytes 4-bit instead of bf16")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--config-only", action="store_true", help="no weights: `random_model`")
    args = parser.parse_args()
    config = hf_config(args.shape)
    if args.layers:
        config["num_hidden_layers"] = args.layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: args.layers]
    args.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.config_only:
        write_safetensors(args.folder, random_tensors(config, args.nf4, device))
    written = config | {"dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    if args.nf4:
        written["quantization_config"] = bnb_quantization_config(torch.bfloat16)
    (args.folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
