"""Every numeric tolerance of the test suite, with its reason. No test carries a literal one.

Use as `torch.testing.assert_close(actual, expected, **tolerance.FP32_SAME_MATHS)`, or call the
function of the budget. Add yours at the end: a name that says what is compared, and why the number.
"""

from __future__ import annotations

from typing import Any

import torch

Tolerance = dict[str, Any]  # keywords of torch.testing.assert_close

# Two fp32 evaluations of the same formula that differ in summation order: a row sum of up to a few
# thousand terms of size 1 errs by some 1e-6, and a normalised gradient passes through two of them.
FP32_SAME_MATHS: Tolerance = {"rtol": 1e-5, "atol": 2e-6}

# Both sides compute in fp32 and round once to fp16, so they may land on neighbouring values: one
# unit in the last place is 2^-10 relative. The atol covers results near zero after a cancellation.
FP16_ONE_ULP: Tolerance = {"rtol": 2.0**-10, "atol": 1e-5}

# The same computation on the same numbers: only the memory layout or the extent differs.
BIT_EXACT: Tolerance = {"rtol": 0.0, "atol": 0.0}

# Share of half-precision results on which two engines may differ though they round in the same
# places: their fp32 values differ by an ulp or two, which crosses a rounding boundary of fp16 in
# 2^-12 of the elements. Rounding in another place changes a tenth of them or more.
FLIPPED_ROUNDINGS = 0.01

# fp64 evaluations of one formula in different orders.
FP64_SAME_MATHS: Tolerance = {"rtol": 1e-11, "atol": 1e-12}

# The same through every layer of a tiny network and back, where such differences add up.
FP64_CHAIN: Tolerance = {"rtol": 1e-10, "atol": 1e-11}

# A fast kernel computes in fp32 and rounds once, where the eager formula rounds after every
# operation, so its error against truth should be the smaller one. The factor leaves room for luck:
# the largest error over a tensor is one element's, and summation order moves it.
KERNEL_ERROR_FACTOR = 1.5

# In fp32 eager itself rounds to fp32 and calls exp and rsqrt of the maths library, where a kernel
# uses the GPU's approximate instructions: about two units in the last place against half a one.
FP32_KERNEL_ERROR_FACTOR = 4.0


def kernel_error_factor(dtype: torch.dtype) -> float:
    """How many times eager's error against truth a kernel that stores `dtype` may have."""
    return FP32_KERNEL_ERROR_FACTOR if dtype == torch.float32 else KERNEL_ERROR_FACTOR


def one_rounding(dtype: torch.dtype, largest: float) -> float:
    """Half a unit in the last place at `largest`: no result stored in `dtype` can promise less."""
    return torch.finfo(dtype).eps / 2 * largest


def same_maths(dtype: torch.dtype) -> Tolerance:
    """Two engines that compute in fp32 (or wider) and store `dtype`."""
    if dtype == torch.float64:
        return FP64_SAME_MATHS
    return FP32_SAME_MATHS if dtype == torch.float32 else FP16_ONE_ULP


# Whole tiny models in fp32 with another order of operations than Hugging Face's eager mode:
# measured 3e-6 to 7e-6 on logits of size 1; gradients pass through the chain twice.
FP32_CHAIN = {"rtol": 2e-4, "atol": 2e-5}

# Angles are fp32, so at position p an angle errs by up to p * 2^-24 turns of a radian, and cos and
# sin by no more; 131072 is the longest context tested.
ROPE_TABLE = {"rtol": 0.0, "atol": 131072 * 2.0**-24 * 1.5}

# The bar for an adapter in PEFT and here: fp32 logits of size 1 within 1e-5.
FP32_ADAPTER = {"rtol": 1e-5, "atol": 1e-5}

# W + s B A in fp32 on both sides; only the order of the product's sums differs.
FP32_MERGE = {"rtol": 1e-6, "atol": 1e-6}


# One step split into micro-batches against the same step whole, in fp32: the promise of issue and
# README.
ACCUMULATION = {"rtol": 1e-6, "atol": 1e-6}

# Closed formulas in Python floats, evaluated in another order.
FLOAT64_ROUNDING = 1e-12

# The mean of 220,000 values 0 or 1 / 0.6, whose deviation is 0.8 / 470: five of them.
DROPOUT_MEAN = {"rtol": 0.0, "atol": 0.01}

# The mean over hundreds of rows of losses near 12, each off by the rounding of its logits, of size
# up to 5, to bf16 (2^-9 * 5 = 0.01): 0.01 / sqrt(400) / 12 = 4e-5, five times that.
MEAN_LOSS_OF_16_BIT_LOGITS = {"rtol": 2e-4, "atol": 0.0}

# One bf16 gradient computed twice with atomic adds: the order of fp32 sums moves it by one
# rounding.
BF16_ATOMIC_SUMS = {"rtol": 2.0**-7, "atol": 2.0**-7}


def attention_error_factor(dtype: torch.dtype) -> float:
    """How many times eager's error the flash back ends may have: 2.6 was seen, 11 in fp32 (H200).

    They take the row sum of the backward from the rounded O, eager from its probabilities; and one
    query over three keys costs eager almost no error in fp32 (5e-8), a flash kernel's exp2 5e-7.
    """
    return 16.0 if dtype == torch.float32 else 4.0


# Codes that may differ from bitsandbytes' CUDA build for fp32 weights, which fall on a threshold to
# the last bit: 13 of 2e8 seen on an H200 with the hardware reciprocal, 19 with an IEEE one. 16-bit
# weights rarely can, and none of 2.7e8 did.
NF4_FLIPS_IN_FP32 = 2e-7

# Mean KL divergence (nats a token) of a merged bf16 model from the unmerged one: each weight is
# rounded once more, 2^-9 of its size, which moves logits of size 1 by some 1e-2; half its square.
MERGED_BF16_DIVERGENCE = 1e-3

# A softcapped loss: tanh(a) as 2 sigmoid(2a) - 1 errs by 2^-23 whatever the size of a, and the cap
# multiplies it; eager's tanh errs by half a unit in the last place of the result, which at a = 1/8,
# where capped logits mostly lie, is 16 times less. Seen: 5.2 times eager's error (fp16, cap 30).
SOFTCAP_ERROR_FACTOR = 16.0

# Losses of a few steps with AdamW's moments in 8 bits against 32: a code is off by up to 1.6% of
# its block's largest; eight steps moved the losses of a tiny model by up to 1.7e-4 of their size.
EIGHT_BIT_MOMENTS = {"rtol": 1e-3, "atol": 0.0}


def gguf_logit_error(quant: str) -> float:
    """RMS of a tiny model's logits' error over their own after storage in blocks of 32.

    8 bits round by 0.3% of a block's largest element, 4 bits by 7%; measured 0.023 and 0.34 over
    four layers of random matrices, which add up errors that trained ones average out.
    """
    return {"q8_0": 0.05, "q4_0": 0.5}[quant]


# RMS of a tiny model's logits' error over their own once its matrices are rounded to bf16, 2^-9 of
# their size on average, through four to seven layers: 0.007 seen.
BF16_WEIGHTS_LOGITS = 0.03

# RMS of a tiny model's logits' error over their own between llama.cpp and sloth on one f16 file:
# llama.cpp rounds activations and its cache to fp16, 2^-11; 0.0007 to 0.0023 seen over all types.
LLAMA_CPP_LOGITS = 0.01

# Sums of eight products of fp16 numbers against the same in fp32: both factors and the logits they
# come from are rounded to 2^-11 of their size.
FP16_PRODUCT = {"rtol": 2e-2, "atol": 2e-5}

# Preference losses against TRL's and against the papers' formulas in Python floats, all in fp32:
# the promise, for pytest.approx.
TRL_LOSS = {"rel": 1e-5, "abs": 1e-5}

# Sums of a few fp32 numbers of size 1 in another order.
FLOAT32_ROUNDING = 1e-6

# fp32 sums of 300 products of size 1 (so of size 17, or near 0 after a cancellation) in two orders:
# 3e-6 seen, sqrt(300) * 17 * 2^-24 = 2e-5 expected at most.
FP32_COLUMN_SUMS = {"rtol": 1e-5, "atol": 2e-5}

# Sums of 1000 products of size 1 to 8 whose fp16 factors two engines round apart now and then, by
# 2^-11 of their size: a dozen such differences of 4e-3 at most, of random sign; 1.5e-3 seen.
FP16_COLUMN_SUMS = {"rtol": 1e-3, "atol": 4e-3}

# How many times the error of the vendor's thin products ours may have. Both sum in fp32, but tensor
# cores cut off what lies below the last bit of a sum where a chain of multiply-adds rounds; for 3
# ranks the vendor takes the latter. 5.0 times seen, 7e-6 of the result (H100).
THIN_PRODUCT_ERROR_FACTOR = 8.0

# e4m3 has three bits of mantissa: half a unit in the last place is 2^-4 of an element at most.
# Below 2^-6 its steps are 2^-9, and half of one is lost at most, in units of the row's scale.
E4M3_RELATIVE, E4M3_ABSOLUTE = 2.0**-4, 2.0**-10

# RMS error of a product of two matrices of e4m3 numbers over the product's own size. Errors of
# elements are spread over +-2^-4 of their size at worst, RMS 2^-4 / sqrt(3); two factors, whose
# errors of random sign add up as the terms do: sqrt(2) times that, 0.051.
E4M3_PRODUCT = 2.0**-4 * (2 / 3) ** 0.5

# The same of a layer's output, and of its gradients: four such products follow one another on the
# longest way forward, four more on the way back; their errors add up in squares.
E4M3_LAYER = 4**0.5 * E4M3_PRODUCT
E4M3_LAYER_GRADIENT = 8**0.5 * E4M3_PRODUCT

# Cosine of an adapter's gradient in a layer with products of 8-bit floats to that without: the
# promise.
E4M3_GRADIENT_COSINE = 0.99

# Hopper adds up products of 8-bit floats with about 14 bits, and the result is rounded to bf16: RMS
# error over the size of the result against the same numbers added up in fp32.
FP8_SUMS = 2.0**-7

# Of what a layer is predicted to hold while it works, relative: small tensors that are left out.
STEP_MEMORY = 0.01
# The same with DoRA, whose sums over rows are not followed one by one.
STEP_MEMORY_DORA = 0.03

# A whole layer with DoRA in fp16 on two engines, beside the largest element of each result: what is
# rounded to fp16 differently in one step (half an ulp, 5e-4) goes through the steps after it; 1e-4
# seen.
FP16_DORA_LAYER = {"rtol": 2e-3, "atol": 2e-3}
