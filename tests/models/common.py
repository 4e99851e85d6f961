"""What every architecture is held to, against Hugging Face's eager mode on tiny random models.

A test file subclasses `ArchitectureTests` and names variants of one model type, which together
switch on every feature of it. Sequences are longer than the windows and than the lengths from which
scaled rotary tables and query scales act. `defects` shows the tests' own sharpness: a changed
setting must change the logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import sloth
from sloth.errors import UnsupportedConfig
from sloth.infer.decode import FixedStep
from sloth.infer.generate import generate_tokens
from sloth.lora import projections
from sloth.models import ARCHITECTURES
from sloth.models.cache import KVCache
from tests.oracles import hf_logits, hf_model, peft_model, save_tiny
from tests.tolerance import FP32_CHAIN

LEVELS = ("reference", "ops")
LENGTH = 70
Folders = dict[str, Path]

# Scalings that act within LENGTH tokens.
YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32
)
LINEAR: dict[str, Any] = dict(rope_type="linear", rope_theta=1e4, factor=4.0)


def random_tokens(batch: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(3, 160, (batch, length), generator=torch.Generator().manual_seed(seed))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def assert_bit_equal(model: sloth.Model, folder: Path, tokens: Tensor) -> None:
    """Logits are Hugging Face's to the bit; else the message says where they part."""
    ours, theirs = model.logits(tokens), hf_logits(folder, tokens, model.dtype)
    if torch.equal(ours, theirs):
        return
    held: list[Tensor] = []
    layers = model.network.model.layers
    hooks = [layer.register_forward_hook(lambda *given: held.append(given[-1])) for layer in layers]
    model.logits(tokens)
    for hook in hooks:
        hook.remove()
    expected = hf_model(folder, model.dtype)(tokens, output_hidden_states=True).hidden_states
    # The last of Hugging Face's is behind the final norm.
    pairs = zip(held, expected[1:-1], strict=False)
    parted = [i for i, (left, right) in enumerate(pairs) if not torch.equal(left, right)]
    where = f"from layer {parted[0]} on" if parted else "in the last layer or behind it"
    largest = (ours.float() - theirs.float()).abs().max().item()
    raise AssertionError(
        f"{model.dtype}, {list(tokens.shape)} tokens: logits differ by up to {largest:.2g}, hidden "
        f"states {where}. Equal in fp32 and not in bf16, an order of casts is another: look at a "
        "norm's product with its weight, and at the dtype of cos and sin"
    )


class ArchitectureTests:
    """Subclass it as Test<Arch>; pytest runs each test for each variant.

    variants: name -> settings beside the tiny sizes of `tests.oracles.save_tiny`, "model_type"
    among them where a file serves several. unread: settings that must be refused, beside a made-up
    key. defects: setting -> another value of it, on the first variant.
    """

    model_type: ClassVar[str]
    variants: ClassVar[dict[str, dict[str, Any]]]
    unread: ClassVar[dict[str, Any]] = {}
    defects: ClassVar[dict[str, Any]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", self.variants)

    @pytest.fixture(scope="class")
    @classmethod
    def folders(cls, tmp_path_factory: pytest.TempPathFactory) -> Folders:
        root = tmp_path_factory.mktemp(cls.model_type)
        return {
            name: save_tiny(folder=root / name, **{"model_type": cls.model_type} | settings)
            for name, settings in cls.variants.items()
        }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_reference_logits_equal_hugging_face_bit_for_bit(self, folders, variant, dtype):
        tokens = random_tokens()
        model = sloth.load(folders[variant], level="reference", dtype=dtype, device="cpu")
        assert_bit_equal(model, folders[variant], tokens)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_reference_logits_of_short_rows_equal_hugging_face_bit_for_bit(self, tmp_path, dtype):
        """Few rows round as operands lie, which heads that share no keys leave to the model."""
        first = next(iter(self.variants.values()))
        settings = {"model_type": self.model_type} | first
        settings |= {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 16}
        folder = save_tiny(folder=tmp_path / "m", **settings)
        model = sloth.load(folder, level="reference", dtype=dtype, device="cpu")
        for length in (2, 3, 5, 8, 11):
            assert_bit_equal(model, folder, random_tokens(2, length))

    @pytest.mark.parametrize("level", LEVELS)
    def test_loss_and_every_gradient_match_hugging_face(self, folders, variant, level):
        tokens = random_tokens()
        labels = tokens.clone()
        labels[0, :20] = -100
        theirs = hf_model(folders[variant])
        expected = theirs(tokens, labels=labels)
        expected.loss.backward()
        model = sloth.load(folders[variant], level=level, dtype="float32", device="cpu")
        loss = model.loss(tokens, labels)
        loss.backward()
        assert_close(loss, expected.loss, **FP32_CHAIN)
        with torch.no_grad():
            assert_close(model.logits(tokens), expected.logits, **FP32_CHAIN)
        ours = {name: p.grad for name, p in model.network.named_parameters()}
        assert ours.keys() == {name for name, _ in theirs.named_parameters()}
        for name, parameter in theirs.named_parameters():
            assert parameter.grad.abs().max() > 0, name
            assert_close(
                ours[name], parameter.grad, **FP32_CHAIN, msg=lambda m, name=name: f"{name}: {m}"
            )

    @pytest.mark.parametrize("level", LEVELS)
    def test_prefill_equals_decode_past_the_window(self, folders, variant, level):
        tokens = random_tokens(2, 50)
        network = sloth.load(folders[variant], level=level, device="cpu").network
        with torch.no_grad():
            whole = network(tokens)
            cache = KVCache(network.config.num_hidden_layers, 50)
            parts = [network(tokens[:, :5], cache=cache), network(tokens[:, 5:35], cache=cache)]
            parts += [network(tokens[:, i : i + 1], cache=cache) for i in range(35, 50)]
        assert_close(torch.cat(parts, 1), whole, **FP32_CHAIN)

    @pytest.mark.parametrize("level", LEVELS)
    def test_steps_on_a_fixed_cache_equal_the_whole(self, folders, variant, level):
        tokens, padding = random_tokens(2, 50), 3
        network = sloth.load(folders[variant], level=level, device="cpu").network
        documents = torch.ones(2, 35, dtype=torch.long)
        documents[1, :padding] = 0
        positions = torch.arange(35).repeat(2, 1)
        positions[1] = (positions[1] - padding).clamp(min=0)
        with torch.no_grad():
            alone = network(tokens[1:, padding:])[0, 35 - padding :]
            whole = torch.stack((network(tokens[:1])[0, 35:], alone))
            cache = KVCache(network.config.num_hidden_layers, 50)
            cache.extend_documents(documents)
            network(tokens[:, :35], positions, cache)
            step = FixedStep(network, cache, positions[:, -1:] + 1)
            parts = [step(tokens[:, i : i + 1]) for i in range(35, 50)]
        assert_close(torch.stack(parts, 1), whole, **FP32_CHAIN)

    def test_a_padded_batch_decodes_as_each_prompt_alone(self, folders, variant):
        network = sloth.load(folders[variant], device="cpu").network
        prompts = [random_tokens(1, length)[0].tolist() for length in (23, 3, 40)]
        together = list(generate_tokens(network, prompts, 6))
        for row, prompt in enumerate(prompts):
            alone = list(generate_tokens(network, [prompt], 6))
            assert [step[row] for step in together] == [step[0] for step in alone]

    @pytest.mark.parametrize("level", LEVELS)
    def test_packed_documents_are_blind_to_each_other(self, folders, variant, level):
        positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
        tokens = random_tokens(1)
        model = sloth.load(folders[variant], level=level, device="cpu")
        with torch.no_grad():
            packed = model.logits(tokens, positions)
            apart = [hf_logits(folders[variant], t) for t in (tokens[:, :30], tokens[:, 30:])]
            assert_close(packed, torch.cat(apart, 1), **FP32_CHAIN)
            for mine in (slice(0, 30), slice(30, 70)):
                other = (tokens + 7) % 150
                other[:, mine] = tokens[:, mine]
                assert torch.equal(model.logits(other, positions)[:, mine], packed[:, mine])

    def test_config_round_trips(self, folders, variant):
        given = read_config(folders[variant])
        config_class, decoder = ARCHITECTURES[given["model_type"]]
        config = config_class.from_hf(given)
        assert config_class.from_hf(config.to_hf()) == config
        with torch.device("meta"):
            assert decoder(config).model_type == given["model_type"]
        assert config.to_hf()["architectures"] == given["architectures"]

    def test_settings_it_does_not_compute_are_refused_by_name(self, folders):
        given = read_config(folders[next(iter(self.variants))])
        config_class, _ = ARCHITECTURES[self.model_type]
        for key, value in ({"hidden_wobble": 1, "attention_dropout": 0.1} | self.unread).items():
            with pytest.raises(UnsupportedConfig, match=key):
                config_class.from_hf(given | {key: value})

    def test_each_setting_changes_the_logits(self, folders, tmp_path):
        name = next(iter(self.variants))
        tokens = random_tokens()
        with torch.no_grad():
            right = sloth.load(folders[name], level="reference", device="cpu").logits(tokens)
            shutil.copy(folders[name] / "model.safetensors", tmp_path)
            for key, value in self.defects.items():
                config = read_config(folders[name])
                assert config[key] != value
                (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
                wrong = sloth.load(tmp_path, level="reference", device="cpu").logits(tokens)
                assert not torch.allclose(wrong, right, **FP32_CHAIN), key

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saved_folder_equals_the_loaded_one(self, folders, variant, dtype, tmp_path):
        model = sloth.load(folders[variant], level="reference", dtype=dtype, device="cpu")
        saved = model.save_base(tmp_path / "saved")
        source = load_file(folders[variant] / "model.safetensors")
        again = load_file(saved / "model.safetensors")
        assert again.keys() == source.keys()
        assert all(torch.equal(again[name], source[name].to(dtype)) for name in source)
        tokens = random_tokens(1)
        assert torch.equal(
            hf_logits(saved, tokens, dtype), hf_logits(folders[variant], tokens, dtype)
        )

    def test_adapter_on_every_projection_agrees_with_peft(self, folders, variant, tmp_path):
        model = sloth.load(folders[variant], level="ops", device="cpu")
        model.add_lora(targets="all-linear", r=4)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in projections(model.network).values():
                if module.lora_B is not None:
                    module.lora_B.weight.normal_(std=0.1, generator=generator)
        model.save_adapter(tmp_path / "adapter")
        tokens = random_tokens()
        with torch.no_grad():
            theirs = peft_model(folders[variant], tmp_path / "adapter")(tokens).logits
            assert_close(model.logits(tokens), theirs, **FP32_CHAIN)
        assert not torch.allclose(theirs, hf_logits(folders[variant], tokens), **FP32_CHAIN)
