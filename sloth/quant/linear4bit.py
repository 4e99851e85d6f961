"""A projection whose matrix is stored in NF4: plain buffers, unpacked when it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sloth.kernels.ops.lora_linear import Base
from sloth.kernels.ops.nf4 import (
    BLOCKSIZE,
    NESTED_BLOCKSIZE,
    NF4Weight,
    dynamic_map,
    nf4_dequantize,
)
from sloth.linear import Projection
from sloth.quant.nf4 import quantize_nf4


class Linear4bit(Projection):
    """Frozen NF4 matrix [out, in] with an optional bias and a LoRA slot.

    weight: uint8 codes [ceil(n / 2), 1]. absmax: uint8 [blocks], or fp32 without double
    quantization. nested_absmax: fp32; offset: fp32 0-dim; both None without it. The buffers are
    kept out of `state_dict`: a checkpoint's form is bitsandbytes', written by `save_base`.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        num_elements = in_features * out_features
        num_blocks = -(-num_elements // BLOCKSIZE)
        self._register("weight", torch.zeros((num_elements + 1) // 2, 1, dtype=torch.uint8))
        self._register("absmax", torch.zeros(num_blocks, dtype=torch.uint8))
        self._register("nested_absmax", torch.zeros(-(-num_blocks // NESTED_BLOCKSIZE)))
        self._register("offset", torch.zeros(()))
        self.source_dtype = torch.float32
        self.dense_cache: Tensor | None = None

    def _register(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def base(self) -> Base:
        """The codes; the dense copy while one is kept."""
        return self.nf4 if self.dense_cache is None else self.dense_cache

    @property
    def address(self) -> int:
        return (self.weight if self.dense_cache is None else self.dense_cache).data_ptr()

    @property
    def nf4(self) -> NF4Weight:
        """The stored matrix."""
        is_nested = self.nested_absmax is not None
        return NF4Weight(
            self.weight,
            self.absmax,
            (self.out_features, self.in_features),
            self.source_dtype,
            self.nested_absmax,
            self.offset,
            dynamic_map(self.weight.device) if is_nested else None,
        )

    def load_nf4(self, weight: NF4Weight) -> None:
        """Take over codes and scales. Raises ValueError for another shape or block size."""
        expected = ((self.out_features, self.in_features), BLOCKSIZE, NESTED_BLOCKSIZE)
        given = (tuple(weight.shape), weight.blocksize, weight.nested_blocksize)
        if given != expected:
            raise ValueError(f"NF4 weight has shape and block sizes {given}, expected {expected}")
        self._register("weight", weight.codes)
        self._register("absmax", weight.absmax)
        self._register("nested_absmax", weight.nested_absmax)
        self._register("offset", weight.offset)
        self.source_dtype = weight.dtype

    def quantize_(self, dense: Tensor) -> None:
        """Store a dense matrix [out, in] as NF4 with double quantization."""
        self.load_nf4(quantize_nf4(dense))

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Unpack once and compute from the copy until `drop_dense`."""
        self.dense_cache = nf4_dequantize(self.nf4, dtype)

    def drop_dense(self) -> None:
        """Compute from the codes again."""
        self.dense_cache = None
