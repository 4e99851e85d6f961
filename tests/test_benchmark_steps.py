"""Whole measured processes of the benchmark suite, on tiny models and a CPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks import run
from benchmarks.report import disagreement
from tests.oracles import save_tiny

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
