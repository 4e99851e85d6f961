"""Whole measured processes of the benchmark suite, on tiny models and a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.report import disagreement, merge, render
from benchmarks.train import sloth_step
from sloth.quant.bnb import bnb_quantization_config
from tests.oracles import WHOLE_BLOCKS, save_tiny

STEP = ["--dtype", "bf16", "--batch", "1", "--length", "24", "--steps", "1", "--rank", "4"]


def test_dora_is_measured_on_the_step_of_lora(tmp_path: Path) -> None:
    """The same first loss and gradient norm of the factors, as B is zero; its lengths trained."""
    folder = str(save_tiny("llama", tmp_path / "base", num_hidden_layers=1))
    rows = []
    for who in ("sloth", "sloth-dora"):
        module, *options = run.program(who)
        found, why = run.Processes(None, 300).run([module, folder, *options, *STEP], is_peer=False)
        assert why is None, why
        rows.append({"who": who, **found[-1]})
    assert disagreement(rows) is None
    lora, dora = (row["trained_parameters"] for row in rows)
    # q, k, v, o, gate, up and down
    assert dora - lora == 4 * 32 + 2 * 32 + 2 * 32 + 64 + 96 + 96 + 64


def test_transformers_attention_is_eager_where_it_allows_no_other(tmp_path: Path) -> None:
    folder = str(save_tiny("gemma2", tmp_path / "base", num_hidden_layers=1, head_dim=32))
    module, *options = run.program("hf")
    found, why = run.Processes(None, 300).run([module, folder, *options, *STEP], is_peer=True)
    assert why is None, why
    assert "attention eager" in found[-1]["setting"]


def test_a_start_is_measured_from_both_kinds_of_files(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "base", num_hidden_layers=1))
    shape = ["--quant", "nf4", "--batch", "1", "--length", "24"]
    command = ["benchmarks.train.startup", folder, *shape]
    found, why = run.Processes(None, 300).run(command, is_peer=False)
    assert why is None, why
    row = {"who": "sloth", "model": "tiny", "source": "bf16", "kernels": "cold", **found[-1]}
    assert row["load_s"] > 0 and row["first_step_s"] > 0
    again = row | {"load_s": row["load_s"] + 1, "kernels": "warm"}
    failed = {"who": "sloth", "model": "tiny", "source": "nf4", "kernels": "cold", "failed": "a|b"}
    parts = [
        {"gpu": "H100", "runs": [], "train": [], "kernels": [], "startup": [one]}
        for one in (row, again, failed | {"batch": 1, "length": 24})
    ]
    results = merge([*parts, {"gpu": "H100", "runs": [], "train": [], "kernels": []}])
    text = render(results)
    assert "## Start-up" in text and "failed: a/b" in text
    assert f"| tiny | 1x24 | bf16 | cold | {row['load_s']:.1f} |" in text


def test_random_weights_are_computed_as_asked(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base", **WHOLE_BLOCKS)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dense weights"):
        sloth_step.model_of(tmp_path, "auto")
    config["quantization_config"] = bnb_quantization_config(torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    levels = {}
    for variant in ("auto", "ops", "fp8", "dora"):
        model = sloth_step.model_of(tmp_path, variant).add_lora()
        levels[variant] = model.level, model.network.base_compute
    assert levels == {
        "auto": ("fused", None),
        "ops": ("ops", None),
        "fp8": ("fused", "fp8"),
        "dora": ("fused", None),
    }
