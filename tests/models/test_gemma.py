"""Gemma: scaled embeddings, norms of 1 + w, GeGLU, wide heads."""

from __future__ import annotations

import pytest
import torch

from sloth.models.decoder import Embedding
from sloth.models.gemma import GemmaConfig
from tests.models.common import LINEAR, ArchitectureTests


class TestGemma(ArchitectureTests):
    model_type = "gemma"
    variants = {
        "wide_heads": dict(head_dim=256, num_key_value_heads=1, tie_word_embeddings=True),
        "untied": dict(head_dim=32, tie_word_embeddings=False, attention_bias=True),
        "linear": dict(head_dim=16, tie_word_embeddings=True, rope_parameters=LINEAR),
        # sqrt(96) = 9.798 is 9.8125 in bf16: the factor must be rounded before it is applied
        "odd_scale": dict(head_dim=24, tie_word_embeddings=True, hidden_size=96),
    }
    unread = dict(hidden_act="silu", hidden_activation="relu", use_bidirectional_attention=True)
    defects = dict(rms_norm_eps=1e-2)


def test_the_legacy_activation_name_means_the_tanh_form():
    base = dict(
        model_type="gemma",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    plain = GemmaConfig.from_hf(base)
    assert GemmaConfig.from_hf(base | dict(hidden_act="gelu", hidden_activation=None)) == plain
    assert plain.to_hf()["hidden_act"] == "gelu_pytorch_tanh"
    assert plain.head_dim == 256 and plain.tie_word_embeddings


@pytest.mark.parametrize(("dim", "rounded"), [(640, 25.25), (1152, 34.0), (3072, 55.5)])
def test_the_embedding_scale_is_rounded_to_the_embeddings_dtype(dim: int, rounded: float):
    embedding = Embedding(2, dim, dim**0.5).to(torch.bfloat16)
    with torch.no_grad():
        embedding.weight.fill_(1.0)
        assert embedding(torch.tensor([1]))[0, 0].item() == rounded
