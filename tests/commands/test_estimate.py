"""`sloth estimate`: figures without weights, for adapters and for full training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import sloth
from sloth import cli
from sloth.errors import BudgetTooSmall
from sloth.estimating import on_meta
from sloth.train.full_memory import kept_bytes, state_bytes_of
from sloth.train.masters import Masters
from sloth.train.optim import build_optimizer, make_moments, trainable
from sloth.train.trainer import Trainer
from tests.oracles import save_tiny, save_tiny_llama
from tests.train.fakes import ROWS, FakeModel

GIB = 2**30
# Llama 3.1 8B, whose parameters are 8,030,261,248.
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
NUM_8B = 8_030_261_248


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config.json of an 8B model and nothing else."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)


def storages(tensors):
    """Bytes by storage, so that views count once."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_what_autograd_keeps_is_predicted_to_the_byte(kind, dtype, tmp_path):
    folder = save_tiny(kind, tmp_path / "base")
    model = sloth.load(folder, device="cpu", dtype=dtype)
    tokens, held = torch.randint(3, 100, (2, 40)), []

    def note(tensor):
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.network.hidden_states(tokens)
    assert model.level == "ops" and hidden.requires_grad
    ropes = [t for c in model.network.contexts(hidden, None, None) for t in (c.cos, c.sin)]
    tables = {table.shape for table in ropes if table is not None}
    outside = storages(model.network.parameters())
    outside |= storages(t for t in held if t.shape in tables or not t.is_floating_point())
    kept = {place: size for place, size in storages(held).items() if place not in outside}
    final_norm = tokens.numel() * (hidden.shape[-1] * dtype.itemsize + 4)  # its input, 1 / rms
    expected = sum(kept.values()) - final_norm
    assert kept_bytes(model.network, 2, 40) == expected
    assert kept_bytes(on_meta(folder, None, dtype)[0], 2, 40) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_what_training_allocates(dtype, tmp_path):
    model = sloth.load(save_tiny_llama(tmp_path / "base"), device="cpu", dtype=dtype)
    masters = Masters(trainable(model.network))
    optimizer = build_optimizer(masters.by_name, sloth.TrainConfig())
    make_moments(optimizer, masters.by_name)
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    predicted = state_bytes_of(model.network)
    own = storages(model.network.parameters())
    assert predicted["weights"] == sum(own.values())
    apart = {**storages(masters.by_name.values()), **own}
    assert predicted["fp32 masters"] == sum(apart.values()) - sum(own.values())
    assert predicted["moments"] == sum(t.nbytes for t in moments)
    with masters.collecting_gradients():
        tokens = torch.randint(3, 100, (1, 9))
        model.loss(tokens, tokens).backward()
    gradients = [master.grad for master in masters.by_name.values()]
    assert predicted["gradients"] == sum(gradient.nbytes for gradient in gradients)


def test_full_training_of_8b_is_18_bytes_a_parameter_and_8_bits_save_6(large):
    plan = sloth.estimate(large, seq=1024, full=True)
    state = ("weights", "fp32 masters", "gradients", "moments")
    assert sum(plan.parts[name] for name in state) == pytest.approx(18 * NUM_8B / GIB)
    assert plan.predicted_gib > 18 * NUM_8B / GIB and plan.keeps == ()
    small = sloth.estimate(large, seq=1024, full=True, optimizer="adamw_8bit")
    saved = plan.predicted_gib - small.predicted_gib
    # But for matrices too small to store in 8 bits: the norms' are 4096 numbers, which is enough.
    assert saved == pytest.approx(6 * NUM_8B / GIB)
    longer = sloth.estimate(large, seq=2048, full=True)
    kept = "kept by layers"
    assert longer.parts[kept] == pytest.approx(2 * plan.parts[kept])


def test_the_command_prints_the_plan_and_whether_it_fits(large, capsys):
    command = ["estimate", large, "--seq", "2048", "--batch", "2"]
    assert cli.main([*command, "--quant", "nf4", "--memory-gib", "24", "--lora.r", "8"]) == 0
    said = capsys.readouterr().out
    lora = sloth.LoraConfig(r=8)
    plan = sloth.estimate(large, seq=2048, batch=2, quant="nf4", lora=lora, memory_gib=24)
    assert said == f"{plan}\nfits          yes\n" and plan.fits
    assert "2 x 2048 tokens: " in said and "budget 24.00 GiB" in said
    assert cli.main([*command, "--memory-gib", "12"]) == 0
    assert "fits          no; --quant nf4 would, with " in capsys.readouterr().out
    assert cli.main([*command, "--full", "--memory-gib", "80"]) == 0
    assert "fits          no; a LoRA adapter (without --full) would" in capsys.readouterr().out
    assert cli.main([*command, "--quant", "nf4", "--memory-gib", "1"]) == 0
    assert "nor would a 4-bit base, one row, or short ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--full", "--lora.r", "4"], "leave --lora.* out"),
        (["--full", "--quant", "nf4"], "4-bit weights cannot be with it"),
        (["--optimizer", "adamw_8bit"], "--optimizer has no effect without --full"),
        (["--seq", "0"], "at least one row and one token"),
    ],
)
def test_estimates_that_mean_nothing_are_refused(large, flags, said, capsys):
    assert cli.main(["estimate", large, *flags]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_full_training_that_cannot_fit_is_refused_before_weights_are_loaded(
    large, monkeypatch, capsys
):
    """The folder holds no weights, so loading them would say so."""
    monkeypatch.setattr("sloth.train.full_memory.free_host_gib", lambda: 40.0)
    command = ["train", large, "rows.jsonl", "--device", "cpu"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    needed = 16 * NUM_8B / GIB
    assert f"needs {needed:.2f} GiB" in said and "40.00 GiB are free" in said
    assert "weights 29.92, gradients 29.92, moments 59.83" in said
    assert "a LoRA adapter (--lora.r 16) needs about" in said and "with --quant nf4" in said
    for flags in (["--lora.r", "8"], ["--quant", "nf4"]):
        assert cli.main([*command, *flags]) == 2
        assert "safetensors" in capsys.readouterr().err  # it went on to the weights
    monkeypatch.setattr("sloth.train.full_memory.free_host_gib", lambda: needed + 1)
    assert cli.main(command) == 2
    assert "safetensors" in capsys.readouterr().err


def test_a_loaded_model_that_cannot_be_trained_in_full_is_refused_by_the_trainer(monkeypatch):
    model = FakeModel()
    count = sum(p.numel() for p in model.network.parameters())
    needed = 12 * count / GIB  # gradients and moments, beside weights that are there
    monkeypatch.setattr("sloth.train.full_memory.free_host_gib", lambda: needed * 0.99)
    with pytest.raises(BudgetTooSmall, match=r"full training of fake needs .*\(gradients"):
        Trainer(model, ROWS)
    Trainer(model, ROWS, lora=sloth.LoraConfig())
    monkeypatch.setattr("sloth.train.full_memory.free_host_gib", lambda: needed * 1.01)
    Trainer(model, ROWS)


def test_estimates_read_wrappers_as_their_text_model(tmp_path):
    text = {**LLAMA_8B, "model_type": "mistral", "num_hidden_layers": 2}
    whole = tmp_path / "whole"
    alone = tmp_path / "alone"
    for folder, config in (
        (whole, {"model_type": "mistral3", "text_config": text}),
        (alone, text),
    ):
        folder.mkdir()
        Path(folder / "config.json").write_text(json.dumps(config))
    assert sloth.estimate(whole, seq=64).parts == sloth.estimate(alone, seq=64).parts
