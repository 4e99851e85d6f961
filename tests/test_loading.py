"""Loading: what a load gives, what it refuses, and how much memory it takes on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import sloth
from sloth import errors
from sloth.lora import projections
from sloth.quant.linear4bit import Linear4bit
from tests.oracles import WHOLE_BLOCKS, bnb_logits, hf_logits, save_bnb_folder, save_tiny_llama
from tests.tolerance import FP32_CHAIN

TOKENS = torch.randint(3, 160, (1, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("loading") / "base", **WHOLE_BLOCKS)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def logits(model: sloth.Model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a single-file folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_dense_load_trains_everything_and_runs_ops(folder):
    model = sloth.load(folder, device="cpu")
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    assert (
        model.dtype == torch.float32 and model.level == "ops" and "trainable" in model.level_reason
    )
    assert sloth.load(str(folder), device="cpu").add_lora().level == "fused"


def test_nf4_load_trains_nothing_until_lora_and_runs_fused(folder):
    model = sloth.load(folder, quant="nf4", device="cpu")
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert model.is_quantized and model.level == "fused"
    kinds = {path: type(module) for path, module in projections(model.network).items()}
    assert kinds.pop("lm_head").__name__ == "Linear"
    assert set(kinds.values()) == {Linear4bit}


def test_explicit_fused_with_a_trainable_base_is_refused(folder):
    with pytest.raises(errors.KernelUnavailable, match="trainable"):
        sloth.load(folder, level="fused", device="cpu")


@pytest.mark.parametrize("level", ["reference", "ops", "fused"])
def test_levels_agree_on_nf4(folder, level):
    auto = sloth.load(folder, quant="nf4", device="cpu")
    assert_close(
        logits(sloth.load(folder, quant="nf4", level=level, device="cpu")),
        logits(auto),
        **FP32_CHAIN,
    )


def test_bitsandbytes_folder_stays_4bit_and_matches_hugging_face(folder, tmp_path):
    saved = save_bnb_folder(folder, tmp_path / "bnb")
    model = sloth.load(saved, device="cpu")
    assert model.is_quantized
    assert_close(logits(model), bnb_logits(saved, TOKENS), **FP32_CHAIN)


def test_dynamic_bitsandbytes_folder_is_read_tensor_by_tensor(folder, tmp_path):
    saved = save_bnb_folder(folder, tmp_path / "bnb")
    dense = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def leave_one_dense(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]
        tensors[name] = dense[name]

    rewrite(saved, leave_one_dense)
    kinds = projections(sloth.load(saved, device="cpu").network)
    assert not isinstance(kinds[name.removesuffix(".weight")], Linear4bit)
    assert isinstance(kinds["model.layers.0.mlp.down_proj"], Linear4bit)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(bnb_4bit_quant_type="fp4"), "stored in FP4"),
        (dict(llm_int8_skip_modules=[]), "lm_head is stored in 4 bits"),
    ],
)
def test_other_4_bit_folders_are_refused_by_their_name(folder, tmp_path, changes, words):
    saved = save_bnb_folder(folder, tmp_path / "bnb", **changes)
    with pytest.raises(errors.UnsupportedConfig, match=words):
        sloth.load(saved, device="cpu")


def test_unknown_name_offers_the_nearest_alias():
    with pytest.raises(errors.UnknownModel, match="llama-3.2-1b"):
        sloth.load("lama-3.2-1b")


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(errors.UnknownModel, match=r"config\.json"):
        sloth.load(tmp_path)


def test_unsupported_model_type_is_refused_by_name(copy):
    edit_config(copy, model_type="mamba")
    with pytest.raises(errors.UnsupportedConfig, match="mamba.*llama.*gemma3 and mistral3"):
        sloth.load(copy)


def test_unknown_config_key_is_named_with_the_way_out(copy):
    edit_config(copy, my_new_setting=1)
    with pytest.raises(errors.UnsupportedConfig, match="my_new_setting"):
        sloth.load(copy)
    sloth.load(copy, ignore_config=["my_new_setting"], device="cpu")


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "gptq"],
)
def test_other_quantizations_are_refused(copy, settings):
    edit_config(copy, quantization_config=settings)
    with pytest.raises(errors.UnsupportedConfig, match="quantized|quantization_config='gptq'"):
        sloth.load(copy)


def test_missing_tensor_is_named(copy):
    rewrite(copy, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(errors.CheckpointMismatch, match=r"layers\.2\.mlp\.up_proj"):
        sloth.load(copy)


def test_extra_tensor_is_named(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.mystery.weight": torch.zeros(2)}))
    with pytest.raises(errors.CheckpointMismatch, match="mystery"):
        sloth.load(copy)


def test_misshapen_tensor_is_named_with_both_shapes(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(errors.CheckpointMismatch, match=r"model\.norm.*\[3\].*\[64\]"):
        sloth.load(copy)


def test_old_rotary_buffers_are_passed_over(copy):
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(copy, lambda tensors: tensors.update({key: torch.zeros(16)}))
    assert_close(logits(sloth.load(copy, device="cpu")), hf_logits(copy, TOKENS), **FP32_CHAIN)


def test_a_head_stored_beside_a_tied_config_is_used(copy):
    edit_config(copy, tie_word_embeddings=True)
    model = sloth.load(copy, device="cpu")
    assert not model.network.tied


def test_a_head_without_an_embedding_to_be_tied_to_is_refused_by_name(copy):
    edit_config(copy, tie_word_embeddings=True)
    rewrite(copy, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(errors.CheckpointMismatch, match=r"missing tensors: model\.embed_tokens"):
        sloth.load(copy, device="cpu")


def test_cuda_asked_for_and_absent_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.KernelUnavailable, match="CUDA"):
        sloth.load(folder, device="cuda")


@pytest.mark.parametrize("bad", [{"dtype": "int8"}, {"quant": "int4"}])
def test_bad_arguments_are_named(folder, bad):
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        sloth.load(folder, **bad)


def test_unknown_level_is_refused(folder):
    with pytest.raises(errors.KernelUnavailable, match="warp"):
        sloth.load(folder, level="warp", device="cpu")


def test_what_cannot_run_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(errors.KernelUnavailable, match="warp"):
        sloth.load(tmp_path / "nothing", level="warp")
    with pytest.raises(errors.KernelUnavailable, match="base_compute='fp8' runs on CUDA"):
        sloth.load(tmp_path / "nothing", base_compute="fp8", device="meta")


@pytest.mark.parametrize(
    "wrong", [{"device": "gpu"}, {"device": "cpu", "dtype": 3}, {"device": "cpu", "dtype": "half"}]
)
def test_a_device_or_dtype_that_is_none_is_refused_with_those_that_are(folder, wrong):
    with pytest.raises(ValueError, match="is unknown; known: auto, "):
        sloth.load(folder, **wrong)


def test_folder_without_tokenizer_loads_and_only_text_calls_raise(folder):
    model = sloth.load(folder, device="cpu")
    logits(model)
    with pytest.raises(errors.TokenizerMissing):
        model.generate("hello")
    with pytest.raises(errors.TokenizerMissing):
        _ = model.tokenizer


def test_loaded_weights_do_not_map_the_file(copy):
    model = sloth.load(copy, device="cpu")
    before = logits(model)
    (copy / "model.safetensors").write_bytes(b"\0" * (copy / "model.safetensors").stat().st_size)
    assert torch.equal(logits(model), before)


PEAK_SCRIPT = """
import sys, threading, time
import sloth, torch
from sloth.loading import load

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

quant = sys.argv[3] if len(sys.argv) > 3 else None
load(sys.argv[2], device="cpu", quant=quant)  # imports and caches, paid for beforehand
peak, stop, before = 0, threading.Event(), anonymous()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], device="cpu", quant=quant)
stop.set(); thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "quant"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, "nf4"),
        (torch.bfloat16, "nf4"),
    ],
)
def test_peak_memory_of_a_load_is_the_model_plus_one_tensor(folder, tmp_path, dtype, quant):
    big = save_tiny_llama(
        tmp_path / "big", hidden_size=512, intermediate_size=4096, vocab_size=8192
    )
    file = big / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    stored = {name: 4.0 for name in tensors}
    if quant:  # half a byte a weight, one a block of 64; embedding, head and norms stay dense
        stored |= {name: 0.5 + 1 / 64 for name in tensors if "_proj" in name}
    model_bytes = sum(stored[name] * tensor.numel() for name, tensor in tensors.items())
    largest_bytes = max(tensor.numel() * 4 for tensor in tensors.values())
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK_SCRIPT), big, folder, *([quant] * bool(quant))],
        capture_output=True,
        text=True,
        check=True,
        # What is freed goes back to the system at once: else the allocator keeps up to 30 MB of it.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    slack_bytes = 4 * 2**20  # thread stacks and Python objects
    assert model_bytes * 0.9 < int(run.stdout) < model_bytes + largest_bytes + slack_bytes


def test_row_24_nothing_that_a_folder_brings_along_is_run(tmp_path):
    """Code, pickles, and config keys that name code: the model loads, or says why not."""
    folder, canary = save_tiny_llama(tmp_path / "model"), tmp_path / "canary"
    touch = f"import pathlib; pathlib.Path({str(canary)!r}).touch()"
    for name in ("modeling_evil.py", "__init__.py", "sitecustomize.py", "sloth.py"):
        (folder / name).write_text(touch)
    pickle = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "evil.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(pickle)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "model_file": "modeling_evil.py"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="auto_map|model_file"):
        assert sloth.load(folder, device="cpu").level == "ops"
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    with pytest.raises(errors.CheckpointMismatch, match="pickle"):
        sloth.load(folder, device="cpu")
    assert not canary.exists()
