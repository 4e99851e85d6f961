"""The only file that imports transformers, peft, bitsandbytes and trl: sloth's judges."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from tests.tiny_configs import GGUF_TYPES, TINY_LLAMA

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


def hf_ties(model_type: str, text: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a wrapper's config ties the head where it does not say so: it, and its text model."""
    config = AutoConfig.for_model(model_type, text_config=dict(text))
    return config.tie_word_embeddings, config.get_text_config().tie_word_embeddings


@torch.no_grad()
def hf_wrapper_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, T, V] of a multimodal model that is shown text alone, in eager mode."""
    return hf_model(folder, dtype)(tokens).logits


@torch.no_grad()
def _randomise(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)


def hf_gguf_model(path: Path) -> Any:
    """A GGUF file as Hugging Face's own loader reads it: an eager model in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def hf_gguf_logits(path: Path, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of a GGUF file as Hugging Face's own loader reads it, in fp32."""
    return hf_gguf_model(path)(tokens).logits


@torch.no_grad()
def hf_greedy(model: Any, tokens: list[int], num_new: int, stop_ids: Sequence[int]) -> list[int]:
    """The likeliest continuation, up to and without a stop id, by Hugging Face's `generate`."""
    found = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False,
        max_new_tokens=num_new,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )[0, len(tokens) :].tolist()
    return found[:-1] if found and found[-1] in stop_ids else found


def llama_cpp(path: Path, tokens: list[int], texts: list[str], adapter: Path | None = None) -> Any:
    """(logits [T, V] of `tokens`, ids of each text) of a GGUF file by llama.cpp itself.

    Skips the test without llama-cpp-python, which is compiled on installation.
    """
    with _llama_cpp_model(path, adapter) as model:
        model.eval(tokens)
        ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
        return torch.tensor(model.scores[: len(tokens)]).float(), ids


def llama_cpp_greedy(path: Path, tokens: list[int], num_new: int) -> list[int]:
    """The likeliest continuation by llama.cpp itself, past any end, from its cache.

    Skips the test without llama-cpp-python.
    """
    found: list[int] = []
    with _llama_cpp_model(path) as model:
        for _ in range(num_new):
            model.eval(found[-1:] or tokens)
            found.append(int(model.scores[model.n_tokens - 1].argmax()))
    return found


@contextmanager
def _llama_cpp_model(path: Path, adapter: Path | None = None) -> Iterator[Any]:
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
        yield model
    finally:
        model.close()


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Hugging Face's model in eager mode. Loaded in `dtype`, so that inv_freq stays fp32."""
    reads_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    kind = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


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
    config = LoraConfig(task_type="CAUSAL_LM", **{"init_lora_weights": False} | settings)
    model = get_peft_model(hf_model(base_folder), config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "tokens_delta" in name:  # which start as the base has them
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def resized_hf_folder(base_folder: Path, folder: Path, num_rows: int) -> Path:
    """A model whose vocabulary Hugging Face has resized."""
    model = hf_model(base_folder)
    model.resize_token_embeddings(num_rows)
    model.save_pretrained(folder)
    return folder


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


def save_bnb_folder(dense_folder: Path, folder: Path, **changes: Any) -> Path:
    """Quantize a dense folder with Hugging Face and bitsandbytes (NF4, double quantization)."""
    from transformers import BitsAndBytesConfig

    usual = dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    settings = BitsAndBytesConfig(**usual | changes)
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


def trl_preference(
    objective: str, base_folder: Path, adapter_folder: Path, batch: Any, beta: float
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """(loss, gradients of the adapter by sloth's names, rewards) of TRL's own trainer.

    batch: tokens and labels [2 pairs, T], chosen ones first, with their lengths. Skips the test
    without TRL. Its head is a Triton kernel for GPUs alone, so PyTorch's log-softmax stands in.
    """
    pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset
    from peft import load_peft_weights, set_peft_model_state_dict
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.trainer import utils

    class EagerHead:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *rest: Any) -> Any:
            found = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
            return found, *[torch.zeros_like(found)] * 3, torch.zeros_like(labels, dtype=torch.bool)

    kind, config = {"dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}[objective]
    adapter = LoraConfig.from_pretrained(str(adapter_folder))
    adapter.inference_mode = False
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(160)}, unk_token="t3"))
    settings = dict(bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", EagerHead)
        trainer = kind(
            model=hf_model(base_folder),
            args=config(output_dir=str(adapter_folder / "trl"), beta=beta, **settings),
            train_dataset=Dataset.from_list([{"prompt": "t5", "chosen": "t6", "rejected": "t7"}]),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, eos_token="t2", pad_token="t0"
            ),
            peft_config=adapter,
        )
        model = trainer.model.eval()
        set_peft_model_state_dict(model, load_peft_weights(str(adapter_folder)))
        places = torch.arange(batch.tokens.shape[1])
        attended = (places < torch.tensor(batch.lengths)[:, None]).long()
        if objective == "dpo":
            answers = (batch.labels != -100).long()
            inputs = dict(input_ids=batch.tokens, attention_mask=attended, completion_mask=answers)
            loss = trainer.compute_loss(model, inputs)
            told = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        else:
            halves = zip(*(x.chunk(2) for x in (batch.tokens, attended, batch.labels)), strict=True)
            names = ("input_ids", "attention_mask", "labels")
            inputs = {
                f"{side}_{name}": part
                for side, parts in zip(("chosen", "rejected"), halves, strict=True)
                for name, part in zip(names, parts, strict=True)
            }
            loss, told = trainer.get_batch_loss_metrics(model, inputs)
        loss.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), gradients, {name.removeprefix("eval_"): v for name, v in told.items()}
