"""NF4 against bitsandbytes: codes, scales and dequantised values bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from sloth.errors import CheckpointMismatch, UnsupportedConfig
from sloth.kernels.ops.lora_linear import dense_weight
from sloth.kernels.ops.nf4 import dynamic_map, nf4_absmax, nf4_code, nf4_dequantize
from sloth.quant.bnb import STATE_KEY, bnb_tensors, read_bnb
from sloth.quant.linear4bit import Linear4bit
from sloth.quant.nf4 import quantize_nf4
from tests.oracles import bnb_quantize, snap_to_bins
from tests.tolerance import NF4_FLIPS_IN_FP32

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 64), (256, 192), (3, 64), (100, 128), (1, 2), (63, 100), (7, 9)]


def weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.view(torch.uint8).tolist())).hexdigest()


def test_tables_are_bitsandbytes_own():
    assert sha256(nf4_code(CPU)).startswith("8501941daa1b")
    assert sha256(dynamic_map(CPU)).startswith("e732639a65f4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype):
    source = weight(shape, dtype)
    ours, (codes, absmax, _) = quantize_nf4(source, double_quant=False), bnb_quantize(source)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert ours.shape == shape and ours.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (256, 192), (3, 64), (100, 128)])
def test_dequantised_values_equal_bitsandbytes(shape, dtype):
    source = weight(shape, dtype)
    _, _, expected = bnb_quantize(source)
    assert torch.equal(nf4_dequantize(quantize_nf4(source, double_quant=False), dtype), expected)


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (512, 384)])
def test_double_quantization_equals_bitsandbytes_cpu_through_its_65536_bins(shape):
    source = weight(shape, torch.float32)
    ours = quantize_nf4(source)
    absmax, nested_absmax, offset = bnb_quantize(source, double=True)[1]
    assert torch.equal(ours.nested_absmax, nested_absmax)
    assert torch.equal(ours.offset, offset)
    plain = quantize_nf4(source, double_quant=False).absmax
    z = plain - offset
    scaled = z * (1 / nested_absmax).repeat_interleave(256)[: len(z)]
    assert torch.equal(snap_to_bins(scaled, dynamic_map(CPU)), absmax)
    # Without the bins' rounding the two differ only where a value sits next to a threshold.
    assert (ours.absmax.int() - absmax.int()).abs().max() <= 1


def test_double_quantization_takes_the_nearest_entry_and_the_even_one_on_a_tie():
    entries = dynamic_map(CPU).double()
    ours = quantize_nf4(weight((256, 128), torch.float32))
    plain = quantize_nf4(weight((256, 128), torch.float32), double_quant=False).absmax
    scaled = (plain - ours.offset) * (1 / ours.nested_absmax).repeat_interleave(256)[: len(plain)]
    nearest = (scaled.double()[:, None] - entries).abs().argmin(1)
    assert torch.equal(ours.absmax.long(), nearest)


def test_nested_scales_are_rounded_before_the_offset_is_added():
    ours = quantize_nf4(weight((256, 256), torch.float32))
    product = dynamic_map(CPU)[ours.absmax.int()] * ours.nested_absmax.repeat_interleave(256)
    assert torch.equal(nf4_absmax(ours), product + ours.offset)


def test_all_zero_blocks_stay_zero_and_non_finite_weights_are_refused():
    source = weight((4, 64), torch.float32)
    source[1] = 0
    assert torch.equal(nf4_dequantize(quantize_nf4(source, False), torch.float32)[1], source[1])
    source[2, 5] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_nf4(source)


@pytest.mark.parametrize("bad", [torch.zeros(64), torch.zeros(8, 8, dtype=torch.int8)])
def test_what_is_no_matrix_of_floats_is_refused(bad):
    with pytest.raises(ValueError, match="matrix"):
        quantize_nf4(bad)


@pytest.mark.parametrize("double", [False, True])
def test_file_entries_round_trip(double):
    ours = quantize_nf4(weight((64, 128), torch.bfloat16), double)
    tensors = bnb_tensors("p.weight", ours)
    again = read_bnb("p.weight", tensors.__getitem__, tensors)
    assert torch.equal(dense_weight(again, torch.float32), dense_weight(ours, torch.float32))
    assert (again.shape, again.dtype) == (ours.shape, ours.dtype)


def test_codes_stored_as_bf16_are_the_same_bytes():
    ours = quantize_nf4(weight((64, 128), torch.bfloat16))
    tensors = bnb_tensors("p.weight", ours)
    tensors["p.weight"] = tensors["p.weight"].flatten().view(torch.bfloat16)[:, None]
    assert torch.equal(read_bnb("p.weight", tensors.__getitem__, tensors).codes, ours.codes)


def test_foreign_and_damaged_entries_are_refused():
    tensors = bnb_tensors("p.weight", quantize_nf4(weight((64, 128), torch.float32)))

    def read(**changes: torch.Tensor | None):
        entries = {**tensors, **{f"p.weight{key}": value for key, value in changes.items()}}
        entries = {key: value for key, value in entries.items() if value is not None}
        return read_bnb("p.weight", entries.__getitem__, entries)

    with pytest.raises(CheckpointMismatch, match="absmax"):
        read(**{".absmax": None})
    with pytest.raises(CheckpointMismatch, match="bytes"):
        read(**{"": torch.zeros(5, 1, dtype=torch.uint8)})
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        read(**{f".{STATE_KEY}": torch.zeros(4, dtype=torch.uint8)})
    with pytest.raises(UnsupportedConfig, match="codebook"):
        read(**{".quant_map": torch.zeros(16)})
    state = bytes(tensors[f"p.weight.{STATE_KEY}"].tolist()).replace(b'"nf4"', b'"fp4"')
    with pytest.raises(UnsupportedConfig, match="quantized as .'fp4', 64, 256."):
        read(**{f".{STATE_KEY}": torch.tensor(list(state), dtype=torch.uint8)})


def test_linear4bit_refuses_a_weight_of_another_shape():
    with pytest.raises(ValueError, match="shape"):
        Linear4bit(64, 64).load_nf4(quantize_nf4(weight((64, 128), torch.float32)))


def test_the_dense_copy_changes_nothing_and_goes():
    module = Linear4bit(128, 64)
    module.quantize_(weight((64, 128), torch.float32))
    x = weight((3, 128), torch.float32, seed=1)
    before = module(x)
    module.keep_dense(torch.float32)
    assert torch.equal(module(x), before) and module.dense_cache is not None
    module.drop_dense()
    assert torch.equal(module(x), before) and module.dense_cache is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (63, 100), (7, 64)])
def test_gpu_quantizes_and_dequantises_as_bitsandbytes_does_there(shape, dtype):
    source = weight(shape, dtype).cuda()
    ours = quantize_nf4(source)
    codes, (absmax, nested_absmax, offset), dense = bnb_quantize(source, double=True)
    flipped = int((ours.codes != codes).sum())
    assert flipped <= (NF4_FLIPS_IN_FP32 * source.numel() if dtype == torch.float32 else 0)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.nested_absmax, nested_absmax) and torch.equal(ours.offset, offset)
    assert torch.equal(nf4_dequantize(replace(ours, codes=codes), dtype), dense)


@pytest.mark.gpu
def test_gpu_dequantises_more_than_2_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    rows, cols = 2**16 + 1, 2**15
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    source = weight((64, cols), torch.bfloat16).cuda()
    small = quantize_nf4(source, double_quant=False)
    repeats = -(-rows // 64)
    codes = small.codes.repeat(repeats, 1)[: rows * cols // 2]
    absmax = small.absmax.repeat(repeats)[: rows * cols // 64]
    big = type(small)(codes, absmax, (rows, cols), torch.bfloat16)
    dense = nf4_dequantize(big, torch.bfloat16)
    expected = nf4_dequantize(small, torch.bfloat16)
    assert torch.equal(dense[:64], expected)
    assert torch.equal(dense[-65:-1], expected)
    assert torch.equal(dense[-1], expected[0])
