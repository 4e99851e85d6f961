"""config.json of the models that speed is measured on, by the names that benchmarks use.

From the models' own repositories; `hf_config` gives them the way sloth writes them, with every
default spelled out.
"""

from __future__ import annotations

from typing import Any

from sloth.models import ARCHITECTURES

_LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}


def _shape(
    model_type: str, hidden: int, layers: int, heads: tuple[int, int], ffn: int, **more: Any
) -> dict[str, Any]:
    """heads: of queries, of keys and values."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": ffn,
        **more,
    }


def _llama(hidden: int, layers: int, heads: int, ffn: int, tied: bool = False) -> dict[str, Any]:
    return _shape(
        *("llama", hidden, layers, (heads, 8), ffn),
        **{"vocab_size": 128256, "rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 131072, "tie_word_embeddings": tied},
    )


def _qwen(
    model_type: str, hidden: int, layers: int, heads: tuple[int, int], ffn: int, **more: Any
) -> dict[str, Any]:
    more = {"rope_theta": 1e6, "max_position_embeddings": 32768, **more}
    return _shape(model_type, hidden, layers, heads, ffn, rms_norm_eps=1e-6, **more)


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, tied=True),
    "llama-3.1-8b": _llama(4096, 32, 32, 14336),
    "llama-3.1-70b": _llama(8192, 80, 64, 28672),
    "mistral-7b": _shape(
        *("mistral", 4096, 32, (32, 8), 14336),
        **{"vocab_size": 32768, "rope_theta": 1e6, "max_position_embeddings": 32768},
        **{"rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    "qwen2.5-7b": _qwen("qwen2", 3584, 28, (28, 4), 18944, vocab_size=152064),
    "qwen3-8b": _qwen("qwen3", 4096, 36, (32, 8), 12288, vocab_size=151936, head_dim=128),
    "qwen3-0.6b": _qwen(
        *("qwen3", 1024, 28, (16, 8), 3072),
        **{"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "gemma-2-9b": _shape(
        *("gemma2", 3584, 42, (16, 8), 14336),
        **{"vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        **{"sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma-3-1b": _shape(
        *("gemma3_text", 1152, 26, (4, 1), 6912),
        **{"vocab_size": 262144, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 32768},
    ),
    "gemma-3-12b": _shape(
        *("gemma3_text", 3840, 48, (16, 8), 15360),
        **{"vocab_size": 262208, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"sliding_window": 1024, "sliding_window_pattern": 6},
        **{"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


def hf_config(name: str) -> dict[str, Any]:
    """config.json of a shape, as sloth writes it."""
    config_class, _ = ARCHITECTURES[SHAPES[name]["model_type"]]
    written: dict[str, Any] = config_class.from_hf(SHAPES[name]).to_hf()
    return written
