"""Turns that begin, or answer, what a template writes otherwise; and words that it leaves out."""

from __future__ import annotations

import pytest

from sloth.data.dataset import load_data
from sloth.data.masks import Conversation
from sloth.errors import DataError
from sloth.text.chat import ChatTemplate
from tests.assets import LLAMA_CPP, asset
from tests.data.test_masks import _FOLDER, FAMILIES, SPECIAL, chat, encoded, spans
from tests.train.fakes import FakeTokenizer

# A default system text, as Qwen's; the first message decides, so none is given to generation.
DEFAULT_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|start|>system\nBe good.<|end|>\n"
    "{% endif %}" + FAMILIES["qwen"].replace("<think>\n\n</think>\n\n", "")
)
# The system text stands in the last message, if that is the user's, as in Mistral's templates.
MOVING_SYSTEM = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %} "
    "{{ m.content | trim }}{{ eos_token }}{% else %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% endif %}{% endfor %}"
)


def with_template(source):
    tokenizer = FakeTokenizer()
    tokenizer.chat = ChatTemplate(source, SPECIAL)
    return tokenizer


@pytest.mark.parametrize("content", ["hello", " hello", "Xq", "Yq", ""])
def test_a_first_turn_of_the_assistants_trains_its_words_and_not_what_stands_before(content):
    """Not the header, the beginning-of-text or a default system text."""
    row = chat("a", "b")
    row["messages"].insert(0, {"role": "assistant", "content": content})
    for source, written in (
        (FAMILIES["llama"], f"{content.strip()}<|end|>"),
        (FAMILIES["mistral"], f"{content}</s>"),
        (DEFAULT_SYSTEM, f"{content}<|end|>"),
    ):
        tokenizer = with_template(source)
        rows, _, _ = encoded(tokenizer, [row] * 5)  # of the first row, and by what was learned
        for examples in rows:
            (found,) = [spans(example, tokenizer) for example in examples]
            assert found[0] == written and len(found) == 2


def test_a_system_text_that_moves_is_met_where_generation_meets_it():
    """One example a turn: what generation is given, and the answer as the template writes it."""
    tokenizer = with_template(MOVING_SYSTEM)
    row = chat("a", "b", "c", " d", system="s")
    rows, num_by_prefixes, _ = encoded(tokenizer, [row] * 5)
    for examples in rows:
        whole = [tokenizer.decode(e.tokens, skip_special_tokens=False) for e in examples]
        assert whole == [
            "<s>[INST] s\n\na[/INST] b</s>",
            "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST] d</s>",
        ]
        assert [spans(example, tokenizer) for example in examples] == [[" b</s>"], [" d</s>"]]
    assert num_by_prefixes == 5
    ((example,),), _, _ = encoded(tokenizer, [row], train_on="last")
    assert spans(example, tokenizer) == [" d</s>"]
    (examples,), num_by_prefixes, _ = encoded(tokenizer, [chat("a", "b", "c", "d")])
    assert [spans(example, tokenizer) for example in examples] == [[" b</s>", " d</s>"]]


def test_what_is_asked_is_not_changed_by_the_answer_or_the_row_is_refused():
    """Of a template that drops what was asked, no example is what the model would meet."""
    dropping = "{{ messages[-1].content }}{{ eos_token }}"
    with pytest.raises(DataError, match=r"data\[0\].*writes messages\[:1\] in another way"):
        encoded(with_template(dropping), [chat("ask", "b")])


# Writes what follows a reasoning block alone, as DeepSeek-R1's, and begins one when it is asked.
DROPS_REASONING = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)


def test_words_that_a_template_leaves_out_are_counted_and_said():
    thought = "<think>\nhm\n</think>\n\nyes"
    rows = [chat("a", thought), chat("a", "yes"), chat("a", thought, "c", thought)]
    data = load_data(rows, with_template(DROPS_REASONING), 99)
    assert (data.counts.turns, data.counts.unwritten) == (4, 3)
    (said,) = [text for text in data.counts.warnings() if "leaves words out" in text]
    assert said.startswith(
        "of 3 of 4 assistant turns the chat template leaves words out (some drop"
    )
    keeping = FAMILIES["llama"].replace("assistant\n\n{%", "assistant\n\n<think>\n{%")
    for source in (keeping, FAMILIES["mistral"]):
        assert load_data(rows, with_template(source), 99).counts.unwritten == 0


def test_a_system_text_in_nemos_template_is_met_where_generation_meets_it():
    source = asset(LLAMA_CPP, f"{_FOLDER}/mistralai-Mistral-Nemo-Instruct-2407.jinja")
    template = ChatTemplate(source.read_text(encoding="utf-8"), SPECIAL)
    messages = chat("q", "r", "s", " t ", "u", "v", system="be kind")["messages"]
    turns = Conversation(template, messages, None, "").renderings((2, 4, 6))
    for index, turn in zip((2, 4, 6), turns, strict=True):
        given = template.render(messages[:index], add_generation_prompt=True)
        ((start, end),) = turn.spans
        assert "be kind" in given and turn.text[:start] == given and end == len(turn.text)
        assert turn.text[start:] == f"{messages[index]['content']}</s>"


def test_a_template_that_refuses_messages_is_quoted_once():
    source = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError) as caught:
        encoded(with_template(source), [chat("a", "b")])
    assert str(caught.value) == "data[0]: the chat template refuses the messages: no system here"
