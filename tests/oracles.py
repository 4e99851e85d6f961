"""The only file that imports transformers, peft and bitsandbytes: sloth's judges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
)

# Every size differs from its neighbours so that a swapped dimension cannot pass: head_dim is not
# hidden / heads, two query heads share one kv head.
TINY_LLAMA: dict[str, Any] = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# name -> settings beside TINY_LLAMA; original lengths are short so that every scaling is active.
LLAMA_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_biased": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "no_gqa": dict(num_key_value_heads=4, head_dim=16),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "dynamic": dict(
        max_position_embeddings=32,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    ),
    "llama3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "yarn": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "yarn_mscale": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=8.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=1.2,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        )
    ),
}


# bitsandbytes' CPU kernel unpacks row by row and is wrong where a row is no multiple of the block
# of 64 (its CUDA kernel and its quantizer go over the flat matrix), so what it judges has such
# rows.
WHOLE_BLOCKS: dict[str, Any] = dict(intermediate_size=128)


def save_tiny_llama(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random tiny Llama as a Hugging Face folder, with weights that show norm, bias and RoPE
    bugs.

    The default initialisation (std 0.02, norms 1, biases 0) hides them.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **settings}))
    _randomise(model)
    model.save_pretrained(folder)
    return folder


# model_type -> settings beside TINY_LLAMA; sizes as Hugging Face's GGUF loader needs them, which
# takes head sizes and query scales of some types from its own defaults.
_GEMMA: dict[str, Any] = dict(head_dim=256, tie_word_embeddings=True)
GGUF_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": dict(head_dim=16),
    "qwen3": dict(head_dim=128, tie_word_embeddings=True),
    "gemma": _GEMMA,
    "gemma2": dict(**_GEMMA, sliding_window=16, query_pre_attn_scalar=256),
    "gemma3_text": dict(
        **_GEMMA, sliding_window=16, query_pre_attn_scalar=256, num_hidden_layers=7
    ),
    "smollm3": dict(head_dim=16, num_hidden_layers=5),
}


def save_tiny(model_type: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random tiny model of any type as a Hugging Face folder, in fp32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type, **{**TINY_LLAMA, **GGUF_TYPES.get(model_type, {}), **settings}
    )
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model)
    model.save_pretrained(folder)
    return folder


def save_tiny_wrapper(model_type: str, folder: Path, text: dict[str, Any]) -> Path:
    """A random tiny multimodal model; text: settings of its text model, model_type among them."""
    torch.manual_seed(0)
    kinds = {"gemma3": "siglip_vision_model", "mistral3": "pixtral"}
    vision = dict(
        model_type=kinds[model_type],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = AutoConfig.for_model(
        model_type, text_config={**TINY_LLAMA, **text}, vision_config=vision
    )
    model = AutoModelForImageTextToText.from_config(config)
    _randomise(model.model.language_model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def hf_wrapper_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, T, V] of a multimodal model that is shown text alone, in eager mode."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()(tokens).logits


@torch.no_grad()
def _randomise(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)


@torch.no_grad()
def hf_gguf_logits(path: Path, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of a GGUF file as Hugging Face's own loader reads it, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()(tokens).logits


def llama_cpp(path: Path, tokens: list[int], texts: list[str], adapter: Path | None = None) -> Any:
    """(logits [T, V] of `tokens`, ids of each text) of a GGUF file by llama.cpp itself.

    Skips the test without llama-cpp-python, which is compiled on installation.
    """
    binding = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model = binding.Llama(
        str(path),
        n_ctx=128,
        n_threads=1,
        logits_all=True,
        verbose=False,
        lora_path=None if adapter is None else str(adapter),
    )
    try:
        model.eval(tokens)
        ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
        return torch.tensor(model.scores[: len(tokens)]).float(), ids
    finally:
        model.close()


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Hugging Face's model in eager mode. Loaded in `dtype`, so that inv_freq stays fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def hf_logits(
    folder: Path,
    tokens: Tensor,
    dtype: torch.dtype = torch.float32,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits [B, T, V] of Hugging Face's eager mode."""
    return hf_model(folder, dtype)(tokens, position_ids=positions).logits


def peft_model(base_folder: Path, adapter_folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's view of an adapter on a base; its warnings of missing or unexpected keys fail."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(hf_model(base_folder, dtype), adapter_folder).eval()
    texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if "missing" in text or "unexpected" in text], texts
    return model


def save_peft_adapter(base_folder: Path, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """A random (not zero) PEFT adapter on a base, saved; returns the PEFT model."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = get_peft_model(hf_model(base_folder), config).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def bnb_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of a bitsandbytes 4-bit folder as Hugging Face loads it, in fp32 on the CPU.

    bitsandbytes' CPU product has its own kernels, so the comparison is made on its dequantised
    weights.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    ).eval()
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            dense = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
            dense.weight.data = weight.reshape(module.out_features, module.in_features)
            if module.bias is not None:
                dense.bias.data = module.bias.data.float()
            model.set_submodule(path, dense)
    return model(tokens).logits


def save_bnb_folder(dense_folder: Path, folder: Path) -> Path:
    """Quantize a dense folder with Hugging Face and bitsandbytes (NF4, double quantization)."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def bnb_quantize(weight: Tensor, double: bool = False) -> tuple[Tensor, Any, Tensor]:
    """(codes, scales, dequantised) of a matrix by bitsandbytes on the weight's own device.

    scales: fp32 absmax, or with double quantization (uint8 absmax, nested absmax, offset).
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    dense = dequantize_4bit(codes, state)
    if not double:
        return codes, state.absmax, dense
    return codes, (state.absmax, state.state2.absmax, state.offset), dense


def snap_to_bins(scaled: Tensor, entries: Tensor) -> Tensor:
    """The 8-bit code of bitsandbytes' CPU build: the value is first put in one of 65,536 bins."""
    bins = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int()
    snapped = -1 + 2 * bins.double() / 65535
    return (snapped[:, None] - entries.double()).abs().argmin(1).to(torch.uint8)


def hf_render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """A chat template as Hugging Face's tokenizers render it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return rendered[0]


def hf_tokenizer(folder: Path) -> Any:
    """Hugging Face's tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
