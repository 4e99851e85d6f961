"""The parts of the benchmark suite that decide what a figure means; no GPU, nothing is timed."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import prepare_rows, report, roofline, run
from benchmarks.command_line import parse_shape, program
from benchmarks.common import RESULT_MARK, find_results, percentile
from benchmarks.data import IGNORED, MEAN_LENGTH, document_lengths, packed_batch, random_batch
from benchmarks.report import DifferentGPUs, Row, disagreement, median_rows, merge, render, slug
from benchmarks.roofline import ModelShape
from sloth.models import ARCHITECTURES
from tests.train.fakes import FakeTokenizer
from tools.pack_peers import keeper
from tools.random_checkpoint import random_tensors
from tools.shapes import SHAPES, hf_config

LLAMA_8B = ModelShape.from_hf(hf_config("llama-3.1-8b"))
LLAMA_70B = ModelShape.from_hf(hf_config("llama-3.1-70b"))
GEMMA_2_9B = ModelShape.from_hf({"text_config": hf_config("gemma-2-9b")})


def train_row(who: str, ms: float = 100.0, **other: object) -> Row:
    """A row as `benchmarks.run` makes it."""
    return {
        **{"who": who, "model": "llama-3.1-8b", "dtype": "nf4", "rank": 16, "batch": 4},
        **{"length": 2048, "packed": False, "first_loss": 12.25, "gradient_norm": 0.4},
        **{"ms": ms, "ms_p95": ms, "tokens_per_s": 8192e3 / ms, "mfu": 0.5, "setting": ""},
        **{"trained_tokens_per_s": 8188e3 / ms, "peak_gib": 30.0, "reserved_gib": 31.0},
        **{"host_ms": 50.0, "load_s": 20.0, "first_step_s": 3.0},
        **other,
    }


def results(*train: Row, gpu: str = "NVIDIA H100 80GB HBM3") -> report.Results:
    ran = {"command": "python -m benchmarks.run", "ceilings": {"copy_tb_s": 3.0}, "versions": {}}
    return {"gpu": gpu, "runs": [ran], "train": list(train), "kernels": []}


# -- roofline: the numbers the design page quotes --------------------------------------------------


def test_weights_of_llama_8b() -> None:
    assert LLAMA_8B.linear_weights == pytest.approx(6.979e9, rel=1e-3)
    assert LLAMA_8B.head_weights == pytest.approx(0.525e9, rel=1e-3)
    assert LLAMA_8B.lora_parameters(16) == pytest.approx(41.9e6, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "linear", "head"),
    [
        ("llama-3.1-70b", 68.45, 1.051),
        ("mistral-7b", 6.979, 0.134),
        ("qwen2.5-7b", 6.525, 0.545),
        ("qwen3-8b", 6.946, 0.622),
        ("gemma-2-9b", 8.324, 0.918),
        ("gemma-3-12b", 10.758, 1.007),
    ],
)
def test_weights_of_other_shapes(name: str, linear: float, head: float) -> None:
    shape = ModelShape.from_hf(hf_config(name))
    assert shape.linear_weights / 1e9 == pytest.approx(linear, rel=1e-3)
    assert shape.head_weights / 1e9 == pytest.approx(head, rel=3e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_a_random_checkpoint_fills_every_parameter(name: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = hf_config(name) | small | {"num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"vocab_size": 64}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    config_class, decoder = ARCHITECTURES[config["model_type"]]
    network = decoder(config_class.from_hf(config))
    written = dict(random_tensors(config, nf4=False, device="cpu"))
    assert written.keys() == dict(network.named_parameters()).keys()
    network.load_state_dict(written)
    tokens = torch.arange(40)[None]
    loss = network.loss(tokens, tokens).item()
    assert 0.5 * math.log(64) < loss < 2 * math.log(64)
    vectors = {name for name, x in written.items() if x.dim() == 1 and not name.endswith("bias")}
    offset = network.model.norm.offset  # norms that change nothing: 1, stored less the offset
    assert all((written[name] == 1 - offset).all() for name in vectors)


@pytest.mark.parametrize(
    ("shape", "length", "gflops", "with_replay"),
    [
        (LLAMA_8B, 2048, 31.9, 46.4),
        (LLAMA_8B, 8192, 37.5, 53.6),
        (GEMMA_2_9B, 2048, 39.4, 56.8),
        (GEMMA_2_9B, 8192, 45.6, 64.7),
        (LLAMA_70B, 8192, 316, 463),
    ],
)
def test_operations_per_token(
    shape: ModelShape, length: int, gflops: float, with_replay: float
) -> None:
    assert roofline.step_flops_per_token(shape, length) / 1e9 == pytest.approx(gflops, rel=3e-3)
    replayed = roofline.step_flops_per_token(shape, length, replay=True)
    assert replayed / 1e9 == pytest.approx(with_replay, rel=3e-3)


@pytest.mark.parametrize(
    ("shape", "length", "gflops"),
    [(LLAMA_8B, 2048, 0.54), (LLAMA_8B, 131072, 34.4), (GEMMA_2_9B, 8192, 2.47)],
)
def test_attention_operations_per_token(shape: ModelShape, length: int, gflops: float) -> None:
    per_token = roofline.attention_flops(shape, [length]) / length
    assert per_token / 1e9 == pytest.approx(gflops, rel=1e-2)


def test_a_step_of_full_rows_is_tokens_times_the_per_token_formula() -> None:
    tokens = 4 * 2048
    step = roofline.step_flops(LLAMA_8B, [2048] * 4, num_trained=tokens)
    assert step == pytest.approx(tokens * roofline.step_flops_per_token(LLAMA_8B, 2048))


def test_mfu_at_the_floor_time_is_one() -> None:
    flops = roofline.step_flops(LLAMA_8B, [2048] * 4, num_trained=8192)
    assert roofline.mfu(flops, ms=330.8, product_tflops=790) == pytest.approx(1.0, rel=1e-3)


def test_untrained_tokens_earn_no_credit_for_the_head() -> None:
    all_trained = roofline.step_flops(LLAMA_8B, [8192], num_trained=8192)
    quarter = roofline.step_flops(LLAMA_8B, [8192], num_trained=2048)
    assert all_trained - quarter == 4 * LLAMA_8B.head_weights * 6144


def test_nf4_pass_of_llama_8b() -> None:
    assert roofline.nf4_bytes(LLAMA_8B.linear_weights) / 1e9 == pytest.approx(17.6, rel=5e-3)


def test_elementwise_bytes_sum_to_the_kernels_own() -> None:
    """At 8192 tokens: two norms, two additions, rotary and SwiGLU are 45, 89, 56 and 235 us."""
    forward, backward = roofline.elementwise_bytes(LLAMA_8B)
    assert forward * 8192 / 3.0e12 * 1e6 == pytest.approx(45 + 89 + 56 + 235, rel=0.1)
    assert backward > forward


# -- data ------------------------------------------------------------------------------------------


def test_document_lengths_have_the_stated_mean_and_fill_the_row() -> None:
    lengths = document_lengths(2_000_000, torch.Generator().manual_seed(0))
    assert sum(lengths) == 2_000_000
    assert sum(lengths) / len(lengths) == pytest.approx(MEAN_LENGTH, rel=0.05)


def test_a_pack_restarts_positions_and_trains_a_quarter() -> None:
    batch = packed_batch(vocabulary=1000, rows=4, length=8192, seed=0)
    assert batch.positions is not None
    starts = (batch.positions == 0).nonzero().tolist()
    expected, row, at = [], 0, 0
    for length in batch.lengths:
        expected.append([row, at])
        at += length
        row, at = (row + 1, 0) if at == 8192 else (row, at)
    assert starts == expected
    assert batch.num_tokens == sum(batch.lengths) == 4 * 8192
    assert batch.num_trained / batch.num_tokens == pytest.approx(0.25, abs=0.02)
    trained = batch.labels != IGNORED
    assert torch.equal(batch.labels[trained], batch.tokens[trained])


def test_no_document_is_trained_on_its_first_token() -> None:
    batch = packed_batch(vocabulary=1000, rows=8, length=512, seed=3)
    assert batch.positions is not None
    assert (batch.labels[batch.positions == 0] == IGNORED).all()


def test_batches_are_the_same_in_every_process_and_differ_by_seed() -> None:
    first, again = (packed_batch(1000, 1, 512, seed=1) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens) and first.lengths == again.lengths
    assert packed_batch(1000, 1, 512, seed=2).lengths != first.lengths
    assert not torch.equal(
        random_batch(1000, 1, 512, 0).tokens, random_batch(1000, 1, 512, 1).tokens
    )


# -- agreement -------------------------------------------------------------------------------------


def test_equal_training_is_accepted() -> None:
    rows = [train_row("sloth"), train_row("hf", first_loss=12.2508, gradient_norm=0.45)]
    assert disagreement(rows) is None
    assert disagreement([*rows, {"who": "unsloth", "failed": "OutOfMemoryError"}]) is None


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"first_loss": 12.26}, "losses"),
        ({"first_loss": float("nan")}, "finite"),
        ({"gradient_norm": 0.9}, "norms"),
        ({"gradient_norm": 0.0}, "zero"),
        ({"gradient_norm": float("nan")}, "zero"),
    ],
)
def test_different_training_is_refused(other: dict[str, float], word: str) -> None:
    reason = disagreement([train_row("sloth"), train_row("hf", **other)])
    assert reason is not None and word in reason


def test_products_in_8_bits_may_be_off_by_their_share_and_no_more() -> None:
    exact = [train_row("sloth"), train_row("hf", first_loss=12.252)]
    assert disagreement([*exact, train_row("sloth-fp8@30", first_loss=12.30)]) is None
    assert disagreement([train_row("sloth-fp8", first_loss=12.30)]) is None
    reason = disagreement([*exact, train_row("sloth-fp8", first_loss=12.32)])
    assert reason is not None and "sloth-fp8" in reason


def test_a_table_that_disagrees_shows_no_speed() -> None:
    text = render(results(train_row("sloth", ms=123.4), train_row("hf", first_loss=11.0)))
    assert "No speeds: first losses differ" in text and "123.4" not in text


# -- rounds, merging, tables -----------------------------------------------------------------------


def test_rounds_become_their_median_row() -> None:
    rows = [train_row("sloth", ms) for ms in (120.0, 100.0, 110.0)]
    (row,) = median_rows(rows, report.CASE_KEYS, "ms")
    assert row["ms"] == 110.0 and row["rounds"] == [100.0, 110.0, 120.0]


def test_a_failure_gives_way_to_a_figure_and_stays_without_one() -> None:
    failed = {**train_row("hf"), "failed": "OutOfMemoryError"}
    assert "failed" not in median_rows([train_row("hf"), failed], report.CASE_KEYS, "ms")[0]
    assert median_rows([failed], report.CASE_KEYS, "ms") == [failed]


def test_merging_joins_rows_runs_and_rounds() -> None:
    first = results(train_row("sloth", 100.0))
    second = results(train_row("sloth", 104.0), train_row("hf", 150.0))
    joined = merge([first, second])
    assert [row["who"] for row in joined["train"]] == ["sloth", "hf"]
    assert joined["train"][0]["rounds"] == [100.0, 104.0]
    assert len(joined["runs"]) == 2


def test_joined_rows_stand_in_the_order_they_are_read_in() -> None:
    others = ["unsloth", "sloth-fp8", "sloth@8.05", "hf-checkpoint", "sloth@24", "sloth"]
    large = [train_row(who) | {"length": 4096} for who in others]
    joined = merge([results(*large), results(train_row("sloth-dora"))])["train"]
    assert joined[0]["who"] == "sloth-dora"
    assert [row["who"] for row in joined[1:]] == [
        *("sloth", "sloth@24", "sloth@8.05", "sloth-fp8", "hf-checkpoint", "unsloth")
    ]


def test_different_gpus_are_not_merged() -> None:
    with pytest.raises(DifferentGPUs, match="H200"):
        merge([results(), results(gpu="NVIDIA H200")])


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("CPU", "cpu"),
    ],
)
def test_file_names(gpu: str, name: str) -> None:
    assert slug(gpu) == name


def test_tables_have_as_many_cells_in_every_line() -> None:
    kernel = {"op": "glu", "model": "llama-3.1-8b", "num_tokens": 8192, "case": "glu forward"}
    found = results(train_row("sloth"), {**train_row("hf"), "failed": "a | b\nc"})
    found["kernels"] = [
        {**kernel, "who": "sloth", "us": 240.0, "tb_s": 2.9, "of_ceiling": 0.97}
        | {"error_vs_fp32": 1e-3},
        {**kernel, "who": "Liger", "failed": "ModuleNotFoundError"},
    ]
    text = render(found)
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block
    assert "81,920" in text and "50.0%" in text and "97%" in text and "failed: a / b c" in text


def test_results_are_written_and_read_back(tmp_path: Path) -> None:
    markdown = run.write(results(train_row("sloth")), tmp_path)
    assert markdown == tmp_path / "h100.md"
    assert json.loads((tmp_path / "h100.json").read_text()) == results(train_row("sloth"))


# -- processes and command lines -------------------------------------------------------------------


def test_a_recorded_command_names_no_folder_of_the_machine() -> None:
    argv = ["--cases", "train", "--checkpoints", "/mnt/x", "--out", "/root/y", "--steps", "20"]
    assert run.shown_command(argv) == (
        "python -m benchmarks.run --cases train --checkpoints CHECKPOINTS --out OUT --steps 20"
    )


def test_results_are_found_among_other_output() -> None:
    output = f'Unsloth: patching\n{RESULT_MARK}{{"ms": 1}}}}\n{{"ms": 2}}\nbye'
    assert find_results(output) == [{"ms": 1}]


def test_percentiles() -> None:
    assert percentile(list(range(1, 21)), 0.95) == 19
    assert percentile([5.0], 0.95) == 5.0


def test_shapes_and_contenders_are_parsed() -> None:
    assert parse_shape("1x8192p") == (1, 8192, True)
    assert program("sloth:ops@8.05")[1:] == [
        "--variant",
        "ops",
        "--memory-gib",
        "8.05",
    ]
    assert program("sloth-fp8@30")[1:] == ["--variant", "fp8", "--memory-gib", "30"]
    assert program("sloth-dora")[1:] == ["--variant", "dora"]
    assert program("unsloth-best") == [
        "benchmarks.peers.unsloth_step",
        "--variant",
        "best",
    ]
    for text in ("2048", "4x", "4x2048q"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_shape(text)
    for who in ("axolotl", "sloth:fp8", "sloth:dora", "sloth-ops"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither sloth"):
            program(who)


def test_a_failing_process_says_why() -> None:
    rows, why = run.Processes(None, 60).run(["benchmarks.nothing"], is_peer=True)
    assert rows == [] and why is not None and "benchmarks.nothing" in why


def test_a_process_that_takes_too_long_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"import time\nprint('{RESULT_MARK}{{}}}}', flush=True)\ntime.sleep(60)"
    (tmp_path / "endless.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows, why = run.Processes(None, 3).run(["endless"], is_peer=False)
    assert rows == [{}] and why == "not done within 3 s"


def test_the_tarball_leaves_out_what_no_step_reads() -> None:
    keep = keeper("130")
    assert not keep("studio/backend/main.py")
    assert keep("unsloth/models/llama.py") and keep("torchao/_C_cutlass_90a.abi3.so")
    assert keep("bitsandbytes/libbitsandbytes_cuda130.so")
    assert not keep("bitsandbytes/libbitsandbytes_cuda124.so")
    assert not keep("bitsandbytes/libbitsandbytes_cpu.so")


# -- kernel cases ----------------------------------------------------------------------------------


def test_preparing_rows_is_timed_on_all_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_rows, "_read_model", lambda *rest: (FakeTokenizer(), None, None))
    monkeypatch.setattr("sys.argv", ["prepare_rows", "model", "--rows", "60"])
    monkeypatch.setenv("SLOTH_CACHE", "")
    prepare_rows.main()
    said = capsys.readouterr().out
    assert "60 rows, " in said and "minutes a million (from 60)" in said and "MiB above" in said
