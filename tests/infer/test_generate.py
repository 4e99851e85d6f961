"""Generation: greedy equals Hugging Face's, rows independent, stops, streaming, sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sloth
from sloth.infer import generate as generate_module
from sloth.infer.decode import FixedStep
from sloth.infer.generate import dequantised_while_generating, generate_tokens
from sloth.infer.text import generate_text, is_batch, ready_to_generate, stream_text
from sloth.kernels.ops import attention as attention_module
from sloth.lora import projections
from sloth.models.cache import KVCache
from sloth.quant.linear4bit import Linear4bit
from tests.oracles import hf_model, save_tiny_llama

PROMPTS = [[5, 9, 13, 40, 77], [8], [100, 101, 102], list(range(20, 50))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("generate") / "base")


@pytest.fixture(scope="module")
def network(folder: Path):
    return sloth.load(folder, device="cpu").network


class LetterTokenizer:
    """Token i is one letter; enough of a tokenizer for the text layer."""

    stop_ids = (2,)
    chat = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in ids)


def collect(network, prompts, count, **more) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate_tokens(network, prompts, count, **more):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def test_greedy_tokens_equal_hugging_face(folder, network):
    theirs = hf_model(folder)
    for prompt, ours in zip(PROMPTS, collect(network, PROMPTS, 12), strict=True):
        answer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert ours == answer[0, len(prompt) :].tolist()


def test_a_row_does_not_depend_on_its_neighbours(network):
    together = collect(network, PROMPTS, 10)
    assert together == [collect(network, [prompt], 10)[0] for prompt in PROMPTS]


def test_padded_prompts_are_read_within_bounds_and_not_through_a_mask(folder, monkeypatch):
    """So that no GPU makes one of T x T; a step, of one query, may."""
    network, seen = sloth.load(folder, device="cpu", level="ops").network, []

    def choose(q, k, layout, softcap):
        seen.append((q.shape[2], layout.query_documents is None or layout.bounds is not None))
        return "cpu_flash"

    monkeypatch.setattr(attention_module, "choose_backend", choose)
    collect(network, PROMPTS, 3)
    prompts = [bounded for num_queries, bounded in seen if num_queries > 1]
    assert prompts and all(prompts)


def test_a_stop_id_ends_its_row_only(network):
    free = collect(network, PROMPTS, 10)
    stop = free[0][3]
    stopped = collect(network, PROMPTS, 10, stop_ids=[stop])
    for row, answer in zip(stopped, free, strict=True):
        assert row == (answer[: answer.index(stop)] if stop in answer else answer)


def test_nf4_generation_equals_its_own_logits_and_drops_the_dense_copy(folder):
    network = sloth.load(folder, quant="nf4", device="cpu").network
    answer = generate_text(network, LetterTokenizer(), ["abc"], 6, 0.0, [])[0]
    tokens = [ord(letter) for letter in "abc"]
    with torch.no_grad():
        for letter in answer:
            assert int(network(torch.tensor([tokens]))[0, -1].argmax()) == ord(letter)
            tokens.append(ord(letter))
    assert network.model.layers[0].mlp.up_proj.dense_cache is None


def varied_prompt(network) -> tuple[str, str, str]:
    """A prompt, its answer, and a stop text inside that does not begin it."""
    for first in "abcdefghijklmnopqrstuvwxyz":
        whole = generate_text(network, LetterTokenizer(), [first + "xq"], 12, 0.0, [])[0]
        mark = whole[4:6]
        if whole.find(mark) == 4 and len(set(whole)) > 3:
            return first + "xq", whole, mark
    raise AssertionError("every answer of the random model repeats itself; take another seed")


@pytest.mark.parametrize(("share", "is_dense"), [(1.01, True), (0.99, False), (None, False)])
def test_codes_stay_where_a_copy_takes_over_half_of_what_the_host_may_still_take(
    folder, monkeypatch, share, is_dense
):
    """Of what the group that a container is may take, too; and where no system says how much."""
    network = sloth.load(folder, quant="nf4", device="cpu").network
    packed = [m for m in projections(network).values() if isinstance(m, Linear4bit)]
    copies_gib = sum(m.in_features * m.out_features * 4 for m in packed) / 2**30
    free = None if share is None else 2 * copies_gib * share
    monkeypatch.setattr(generate_module, "free_host_gib", lambda: free)
    with dequantised_while_generating(network, torch.float32, rows=2):
        assert packed and all(isinstance(m.base, torch.Tensor) == is_dense for m in packed)
    assert not any(isinstance(m.base, torch.Tensor) for m in packed)


def test_stop_texts_cut_the_answer(network):
    prompt, whole, mark = varied_prompt(network)
    assert generate_text(network, LetterTokenizer(), [prompt], 12, 0.0, [mark])[0] == whole[:4]


@pytest.mark.parametrize("stops", [False, True])
def test_streamed_pieces_join_to_the_same_answer(network, stops):
    prompt, _, mark = varied_prompt(network)
    marks = [mark] if stops else []
    answer = generate_text(network, LetterTokenizer(), [prompt], 12, 0.0, marks)[0]
    pieces = list(stream_text(network, LetterTokenizer(), prompt, 12, 0.0, marks))
    assert "".join(pieces) == answer and len(pieces) > 1


def test_sampling_follows_the_seed_and_temperature(network):
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return collect(network, PROMPTS, 8, temperature=1.5)

    assert sample(1) == sample(1) != sample(2)
    assert collect(network, PROMPTS, 8, temperature=1e-4) == collect(network, PROMPTS, 8)


def test_dropout_is_off_while_generating_and_the_mode_returns(folder):
    model = sloth.load(folder, device="cpu").add_lora(sloth.LoraConfig(dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.network.train()
    answers = {
        generate_text(model.network, LetterTokenizer(), ["ab"], 8, 0.0, [])[0] for _ in "123"
    }
    assert len(answers) == 1 and model.network.training


def test_no_new_tokens_and_empty_prompts(network):
    assert generate_text(network, LetterTokenizer(), ["abc"], 0, 0.0, []) == [""]
    with pytest.raises(ValueError, match="no tokens"):
        generate_text(network, LetterTokenizer(), [""], 4, 0.0, [])
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            generate_text(network, LetterTokenizer(), ["a"], 4, temperature, [])


def test_kinds_of_prompt():
    message = {"role": "user", "content": "hi"}
    assert not is_batch("hi") and not is_batch([message])
    assert is_batch(["a", "b"]) and is_batch([[message], [message]])


@pytest.mark.parametrize("level", ["reference", "ops"])
def test_an_adapter_held_for_decoding_is_the_one_of_now(folder, level):
    """Rounded once instead of at every use, and where the level rounds at all."""
    model = sloth.load(folder, device="cpu", dtype="bfloat16", level=level)
    network, tokens = model.add_lora(r=4).network, torch.tensor(PROMPTS[:1])
    for factor in (2.0, 3.0):
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1 * factor)
        network.eval()
        with torch.no_grad():
            expected = network(tokens)
            with ready_to_generate(network, rows=2):
                assert torch.equal(network(tokens), expected)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_an_adapter_that_was_held_is_trained_again(folder: Path, quant: str | None) -> None:
    """What ran meanwhile prepared fused layers from held factors, which get no gradient."""
    model = sloth.load(folder, device="cpu", quant=quant).add_lora(r=4)
    tokens = torch.tensor([list(range(20, 50))])
    trained = [p for p in model.network.parameters() if p.requires_grad]

    def gradients() -> list[bool]:
        for parameter in trained:
            parameter.grad = None
        model.loss(tokens, tokens).backward()
        return [parameter.grad is not None for parameter in trained]

    with ready_to_generate(model.network, rows=1):
        with torch.no_grad():
            model.logprobs(tokens)
        assert all(gradients())  # a stream that waits for its reader holds them, too
        with torch.no_grad():
            model.logprobs(tokens)
    assert all(gradients())


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_step_gives_the_logits_of_an_unrecorded_one(folder, quant, dtype):
    network = sloth.load(folder, quant=quant, dtype=dtype, device="cuda").network
    tokens = torch.randint(3, 150, (3, 30), device="cuda")
    found = []
    for is_recorded in (False, True):
        cache = KVCache(network.config.num_hidden_layers, 30)
        with torch.no_grad():
            network(tokens[:, :20], cache=cache)
            step = FixedStep(network, cache, torch.full((3, 1), 20, device="cuda"))
            if is_recorded:
                step.record()
            found.append([step(tokens[:, i : i + 1]).clone() for i in range(20, 30)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_greedy_tokens_on_a_gpu_equal_those_on_a_cpu(folder, network):
    other = sloth.load(folder, dtype="float32", device="cuda").network
    assert collect(other, PROMPTS, 12) == collect(network, PROMPTS, 12)


@pytest.mark.parametrize("is_served", [True, False])
def test_one_row_reads_the_codes_where_it_can_and_several_a_copy(
    folder: Path, is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "serves", lambda base, dtype: is_served)
    network = sloth.load(folder, quant="nf4", device="cpu").network
    packed = [m for m in projections(network).values() if isinstance(m, Linear4bit)]
    for rows in (1, 2):
        with ready_to_generate(network, rows):
            copies = [module.dense_cache is not None for module in packed]
        assert copies == [rows > 1 or not is_served] * len(packed)
        assert all(module.dense_cache is None for module in packed)
