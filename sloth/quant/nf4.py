"""Quantizing to NF4: which of 16 quantiles each weight is nearest to, and its block's scale.

    absmax_b = max |w| over block b;   y = w * (1 / absmax_b);   code = number of thresholds below y
    double quantization: z = absmax - mean(absmax);  q = nearest of 256 map entries to z * (1 / max
    |z|)

The thresholds are the fp32 midpoints of neighbouring codebook entries. Multiplying by the
reciprocal, not dividing, is what the CUDA implementation of bitsandbytes does: a division flips one
code in 8 million. An exact tie between two map entries goes to the even index, again as on CUDA.
Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sloth.kernels.ops.nf4 import (
    BLOCKSIZE,
    NESTED_BLOCKSIZE,
    NF4Weight,
    dynamic_map,
    nf4_code,
    nf4_reciprocal,
)

# Elements quantized at a time, so that a load needs little beside the tensor itself: whole blocks.
_SLICE = 2**20

# The code of 0, which fills the missing half of an odd last byte.
_ZERO_CODE = 7


def quantize_nf4(weight: Tensor, double_quant: bool = True) -> NF4Weight:
    """A dense matrix [out, in] in fp32, fp16 or bf16 -> NF4, on its own device.

    Codes are bit-equal to bitsandbytes'. Raises ValueError for another shape, dtype, or a weight
    that is not finite (its block would have no scale).
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"NF4 takes a matrix of fp32, fp16 or bf16, got {weight.dtype} {list(weight.shape)}"
        )
    slices = [_quantize_slice(part) for part in weight.detach().flatten().split(_SLICE)]
    packed = torch.cat([codes for codes, _ in slices])[:, None]
    absmax = torch.cat([scales for _, scales in slices])
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("the weight holds NaN or infinite values; NF4 cannot represent them")
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return NF4Weight(packed, absmax, shape, weight.dtype)
    offset = absmax.mean()
    entries = dynamic_map(weight.device)
    quantized, nested_absmax = _quantize_scales(absmax - offset, entries)
    return NF4Weight(packed, quantized, shape, weight.dtype, nested_absmax, offset, entries)


def _quantize_slice(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(packed codes [ceil(n / 2)], fp32 scales [blocks]) of a run of whole blocks."""
    blocks = _blocks(flat.float(), BLOCKSIZE)
    absmax = blocks.abs().amax(1)
    codes = _codes(blocks * _reciprocal(absmax)[:, None]).flatten()[: len(flat)]
    if len(codes) % 2:
        codes = F.pad(codes, (0, 1), value=_ZERO_CODE)
    return codes[::2] << 4 | codes[1::2], absmax


def _blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [ceil(n / size), size], padded with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _reciprocal(absmax: Tensor) -> Tensor:
    """1 / absmax, 0 for an all-zero block, so that its codes are those of 0."""
    return torch.where(absmax > 0, nf4_reciprocal(absmax), 0.0)


def _codes(scaled: Tensor) -> Tensor:
    """Index of the nearest codebook entry, uint8; a value on a threshold takes the lower one."""
    code = nf4_code(scaled.device)
    thresholds = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled, thresholds, out_int32=True, right=False).to(torch.uint8)


def _quantize_scales(z: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 map indices [n], fp32 scale per 256 of them)."""
    blocks = _blocks(z, NESTED_BLOCKSIZE)
    largest = blocks.abs().amax(1)
    scaled = (blocks * _reciprocal(largest)[:, None]).flatten()[: len(z)]
    thresholds = (entries[:-1] + entries[1:]) / 2
    below = torch.bucketize(scaled, thresholds, out_int32=True, right=False)
    above = torch.bucketize(scaled, thresholds, out_int32=True, right=True)
    # They differ on an exact tie between indices `below` and `below + 1`: take the even one.
    index = torch.where((below != above) & (below % 2 == 1), above, below)
    return index.to(torch.uint8), largest
