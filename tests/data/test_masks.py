"""Masks of any template: one rendering gives what prefixes give, turns end in a stop token inside
the loss, one beginning-of-text; with templates of the four families' shapes and, where the archive
is at hand, those that models come with.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sloth
from sloth.constants import IGNORE_INDEX
from sloth.data import masks
from sloth.data.dataset import load_data
from sloth.data.encode import RowEncoder
from sloth.data.masks import Conversation, MaskDisagreement, TemplateShapes
from sloth.errors import DataError
from sloth.formats.gguf import GGUFFile
from sloth.text.chat import ChatTemplate
from sloth.text.tokenizer import Tokenizer
from tests.assets import LLAMA_CPP, asset, smollm2
from tests.oracles import hf_tokenizer, save_tiny
from tests.train.fakes import FakeTokenizer, chatml, reasoning

# The shapes of the families' templates: what stands before, between and after; who is trimmed.
FAMILIES = {
    "llama": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} "
    "{{ m.content }}{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}<|start|>{{ role }}\n"
    "{{ (messages[0].content | trim + '\n\n') if loop.first and messages[0].role == 'system' }}"
    "{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}",
    # Writes an empty thought into the last answer only, so that earlier turns change.
    "qwen": "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def fake(family):
    tokenizer = FakeTokenizer()
    tokenizer.chat = ChatTemplate(FAMILIES[family], SPECIAL)
    return tokenizer


def chat(*contents, system=None):
    opening = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": opening + turns}


def spans(example, tokenizer):
    """The trained spans, decoded with their special tokens."""
    found, run = [], []
    for token, label in [*zip(example.tokens, example.labels, strict=True), (0, IGNORE_INDEX)]:
        if label != IGNORE_INDEX:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return found


def encoded(tokenizer, rows, **settings):
    encoder = RowEncoder(tokenizer, **settings)
    found = list(encoder.encode((f"data[{i}]", row) for i, row in enumerate(rows)))
    return [row.examples for row in found], encoder.shapes.num_by_prefixes, found


# -- row 2: the mask of every family ---------------------------------------------------------------

GOLDEN = {
    "llama": [["b<|end|>", "d<|end|>"]],
    "mistral": [[" b</s>", " d</s>"]],
    "gemma": [["b<|end|>", "d<|end|>"]],
    "qwen": [["<think>\n\n</think>\n\nb<|end|>"], ["<think>\n\n</think>\n\nd<|end|>"]],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_row_2_mask_of_every_family_equals_one_written_by_hand(family):
    """The same from the first row, by prefixes, and from a later one, by what was learned."""
    tokenizer = fake(family)
    row = chat("a", "b", "c", "d", system="s")
    rows, num_by_prefixes, _ = encoded(tokenizer, [row] * 9)
    for examples in rows:
        assert [spans(example, tokenizer) for example in examples] == GOLDEN[family]
    assert num_by_prefixes == masks.LEARN_AT - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_last_trains_the_last_turn_alone_and_everything_all(family):
    tokenizer, row = fake(family), chat("a", "b", "c", "d")
    ((last,),), _, _ = encoded(tokenizer, [row], train_on="last")
    assert spans(last, tokenizer) == GOLDEN[family][-1][-1:]
    ((whole,),), _, _ = encoded(tokenizer, [row], train_on="everything")
    assert whole.labels == whole.tokens
    completion = {"prompt": "a", "completion": "b"}
    ((example,),), _, _ = encoded(tokenizer, [completion], train_on="everything")
    assert example.labels == example.tokens


def test_a_turn_of_weight_0_is_read_and_not_trained():
    tokenizer, row = fake("llama"), chat("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    ((example,),), _, _ = encoded(tokenizer, [row])
    assert spans(example, tokenizer) == ["d<|end|>"]


TEXTS = st.text(alphabet="ab \n<|>ustartendmodelasingZqxW[]/0123", max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(
        st.tuples(st.booleans(), st.lists(TEXTS, min_size=2, max_size=5)), min_size=5, max_size=9
    ),
)
def test_row_2_one_rendering_gives_the_masks_of_prefixes(family, talks):
    """Random chats with the template's own words in them, and the learner's marks."""
    tokenizer = fake(family)
    rows = [chat(*texts, system="ab" if has_system else None) for has_system, texts in talks]
    quick, _, _ = encoded(tokenizer, rows * 3)
    exact, num_by_prefixes, _ = encoded(tokenizer, rows * 3, by_prefixes=True)
    assert quick == exact and num_by_prefixes == len(rows) * 3


def test_a_row_that_its_template_treats_otherwise_is_rendered_by_prefixes():
    """White space that is trimmed is expected; a text that is replaced is not."""
    tokenizer = fake("llama")
    source = FAMILIES["llama"].replace("m.content | trim", "m.content.replace('!', '?') | trim")
    tokenizer.chat = ChatTemplate(source, SPECIAL)
    rows = [chat("a", "b")] * 5 + [chat(" a ", "\nb"), chat("a!", "b!")]
    examples, num_by_prefixes, _ = encoded(tokenizer, rows)
    assert spans(examples[-1][0], tokenizer) == ["b?<|end|>"]
    assert num_by_prefixes == masks.LEARN_AT - 1 + 1


class Shifty:
    """A template whose generation prompt depends on a content, which no whole rendering shows."""

    def render(self, messages, tools=None, add_generation_prompt=False):
        begun = "<|start|>assistant\n"
        head = begun[:-1] if messages[-1]["content"] == "odd" else begun
        return chatml(messages, False) + (head if add_generation_prompt else "")


def test_a_template_whose_prefixes_disagree_is_found_by_the_sample(monkeypatch):
    """The sample is what is asserted: with it the whole set is done again, exactly."""
    monkeypatch.setattr(masks, "CHECK_EACH", 10)
    rows, said = [chat("even", "b")] * 9 + [chat("odd", "b")] * 4, []
    tokenizer = FakeTokenizer()
    tokenizer.chat = Shifty()
    with pytest.raises(MaskDisagreement, match=r"data\[11\]"):
        encoded(tokenizer, rows)
    data = load_data(rows, tokenizer, 99, notice=said.append)
    assert spans(data.examples[-1], tokenizer) == ["\nb<|end|>"]
    assert data.counts.by_prefixes == len(rows) and "rendered again" in said[0]
    with pytest.raises(DataError, match="give a list or a file"):
        load_data(iter(rows), tokenizer, 99)


# -- row 4: beginning of text ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_row_4_a_row_has_the_beginning_that_its_template_writes(family):
    tokenizer = fake(family)
    row = chat("a", "b")
    ((example,),), _, (found,) = encoded(tokenizer, [row])
    assert example.tokens == tokenizer.encode(tokenizer.chat.render(row["messages"]), False)
    assert example.tokens.count(tokenizer.bos_id) == (family != "qwen")
    assert found.lacks_bos == (family == "qwen")


def test_row_4_a_text_that_brings_its_beginning_gets_no_second_one():
    tokenizer = FakeTokenizer()
    rows = [
        {"text": "<s>a"},
        {"prompt": "<s>a", "completion": "b"},
        {"text": "a"},
        {"prompt": "", "completion": "b"},
    ]
    for (example,) in encoded(tokenizer, rows)[0]:
        assert example.tokens[0] == tokenizer.bos_id == 0 and example.tokens.count(0) == 1


def test_row_4_a_doubled_beginning_is_counted_and_said():
    counts = load_data([{"text": "<s><s>a"}, {"text": "a"}], FakeTokenizer(), 99).counts
    assert counts.double_bos == 1
    assert counts.warnings()[0].startswith("1 rows begin with the beginning-of-text token twice")


def test_row_4_ids_equal_what_transformers_would_train_on(tmp_path):
    files = GGUFFile(smollm2()).tokenizer_files()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    ours, theirs = Tokenizer.from_folder(tmp_path), hf_tokenizer(tmp_path)
    rows = [chat("hi", " yes\n"), chat("gr\u00fc\u00df", "b", "c \U0001f600", "d", system="s")]
    for row, (example,) in zip(rows, encoded(ours, rows)[0], strict=True):
        ids = theirs.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert example.tokens == list(ids)


# -- row 5: end of turn ----------------------------------------------------------------------------


def test_row_5_end_of_turn_is_trained_though_padding_has_its_id():
    tokenizer = fake("mistral")
    assert tokenizer.pad_id == tokenizer.eos_id
    data = load_data([chat("a", "b", "c", "d"), chat("a", "b" * 30)], tokenizer, 99)
    for example in data.examples:
        ends = [i for i, t in enumerate(example.tokens) if t == tokenizer.eos_id]
        assert ends and all(example.labels[i] == tokenizer.eos_id for i in ends)
    batch = data.batch([0, 1], tokenizer.pad_id)
    padding = batch.tokens.shape[1] - len(data.examples[0].tokens)
    assert padding > 0 and (batch.labels[0, -padding:] == IGNORE_INDEX).all()
    assert data.counts.turns == 3 and not data.counts.unstopped


def test_row_5_a_turn_without_a_stop_token_is_counted_and_said():
    """The template ends a turn with a token that does not end an answer."""
    tokenizer = fake("llama")
    tokenizer.stop_ids = (tokenizer.eos_id,)
    counts = load_data([chat("a", "b", "c", "d")], tokenizer, 99).counts
    assert (counts.turns, counts.unstopped) == (2, 2)
    assert counts.warnings()[0].startswith("2 of 2 assistant turns do not end in a token that stop")


@pytest.mark.parametrize("packing", [False, True])
def test_row_5_a_model_that_learned_one_row_stops_where_the_row_does(packing, tmp_path):
    torch.manual_seed(0)
    model = sloth.load(save_tiny("llama", tmp_path / "base"), device="cpu")
    model._tokenizer = FakeTokenizer()
    rows = [chat("ask", "yes"), chat("who", "me")]
    model.train(
        rows, output=tmp_path / "run", max_steps=40, lr=3e-3, packing=packing, max_length=64
    )
    for asked, answer in (("ask", "yes"), ("who", "me")):
        prompt = [{"role": "user", "content": asked}]
        assert model.generate(prompt, max_new_tokens=12) == answer


# -- the templates that models come with -----------------------------------------------------------

_FOLDER = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/templates"
SHIPPED = {  # whether one rendering is enough, for most rows
    "meta-llama-Llama-3.1-8B-Instruct": True,
    "meta-llama-Llama-3.2-3B-Instruct": True,
    "mistralai-Mistral-Nemo-Instruct-2407": False,  # a system text moves, in half of the rows
    "Mistral-Small-3.2-24B-Instruct-2506": True,
    "google-gemma-2-2b-it": True,
    "Qwen-Qwen2.5-7B-Instruct": True,
    "Qwen-Qwen3-0.6B": True,
    "HuggingFaceTB-SmolLM3-3B": True,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": True,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_row_2_shipped_templates_one_rendering_equals_prefixes(name):
    """Whatever the first rows teach, later rows have the spans of prefixes."""
    rows = [
        chat(*(f"{word} {n}" for word in words), system=system)
        for n in range(5)
        for words in (("hi", "yes"), ("a\n", " b ", "c", "d"), ("q", "<b>", "r", "s", "t", "u"))
        for system in (None, "be kind")
    ]
    source = asset(LLAMA_CPP, f"{_FOLDER}/{name}.jinja").read_text(encoding="utf-8")
    template, shapes, num_read = ChatTemplate(source, SPECIAL), TemplateShapes(), 0
    for row in rows:
        messages = row["messages"]
        trained = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant")
        try:
            exact = Conversation(template, messages, None, "").renderings(trained)
        except DataError:
            continue  # a template may refuse a system message
        found = shapes.renderings(Conversation(template, messages, None, ""), trained)
        assert found == exact, json.dumps(messages)
        num_read += 1
    assert (num_read > 2 * shapes.num_by_prefixes > 0) == SHIPPED[name]


def test_reasoning_that_later_turns_drop_is_trained_where_it_is_met():
    tokenizer = FakeTokenizer(reasoning)
    row = chat("a", "b", "c", "d")
    row["messages"][1]["thought"] = "hm"
    (examples,), _, _ = encoded(tokenizer, [row])
    assert [spans(example, tokenizer) for example in examples] == [
        ["hm</think>b<|end|>"],
        ["d<|end|>"],
    ]
