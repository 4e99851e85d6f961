"""Masks: which tokens of a row are trained, against masks written out by hand."""

from __future__ import annotations

import json

import pytest

from sloth.constants import IGNORE_INDEX
from sloth.data.dataset import load_data
from sloth.data.encode import encode_row
from sloth.errors import DataError, TokenizerMissing
from tests.train.fakes import FakeTokenizer, reasoning


def trained_texts(example, tokenizer) -> list[str]:
    """The trained spans, decoded."""
    spans, open_ = [], False
    for token, label in zip(example.tokens, example.labels, strict=True):
        assert label in (IGNORE_INDEX, token), "a label sits at its own token's index"
        if label == IGNORE_INDEX:
            open_ = False
            continue
        if not open_:
            spans.append([])
        spans[-1].append(token)
        open_ = True
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def encoded(row, tokenizer=None):
    tokenizer = tokenizer or FakeTokenizer()
    examples = encode_row(tokenizer, row, "data[0]")
    return [trained_texts(example, tokenizer) for example in examples], examples, tokenizer


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def test_chat_trains_every_assistant_turn_with_its_end_token_and_nothing_else():
    messages = [
        say("system", "be kind"),
        say("user", "a"),
        say("assistant", "one"),
        say("user", "assistant\none"),
        say("assistant", "two\n"),
    ]
    spans, (example,), tokenizer = encoded({"messages": messages})
    assert spans == [["one<|end|>", "two\n<|end|>"]]
    assert example.tokens == tokenizer.encode(tokenizer.chat.render(messages), False)
    assert example.tokens.count(tokenizer.bos_id) == 1
    last_trained = [label for label in example.labels if label != IGNORE_INDEX][-1]
    assert last_trained in tokenizer.stop_ids


def test_chat_without_an_end_token_keeps_the_white_space_that_ends_a_turn():
    def plain(messages, for_generation):
        return "".join(f"{m['role']}: {m['content']}\n\n" for m in messages) + (
            "assistant: " if for_generation else ""
        )

    row = {"messages": [say("user", "a"), say("assistant", "b")]}
    assert encoded(row, FakeTokenizer(plain))[0] == [["b\n\n"]]


def test_template_that_rewrites_earlier_turns_gives_one_example_per_turn():
    messages = [
        say("user", "a"),
        say("assistant", "b", thought="hm"),
        say("user", "c"),
        say("assistant", "d", thought="so"),
    ]
    spans, examples, tokenizer = encoded({"messages": messages}, FakeTokenizer(reasoning))
    # The opened <think> is given by the generation prompt, so it is not trained.
    assert spans == [["hm</think>b<|end|>"], ["so</think>d<|end|>"]]
    second = tokenizer.decode(examples[1].tokens, skip_special_tokens=False)
    assert "hm" not in second and second.startswith("<s><|start|>user\na<|end|>")


def test_generation_prompt_that_the_turn_does_not_keep_costs_no_trained_text():
    row = {"messages": [say("user", "a"), say("assistant", "<b>")]}
    assert encoded(row, FakeTokenizer(reasoning))[0] == [["<b><|end|>"]]


def test_template_that_rewrites_what_came_before_is_met_as_it_was_asked():
    def counted(messages, for_generation):
        return f"{len(messages)}:" + "".join(m["content"] for m in messages)

    row = {"messages": [say("user", "a"), say("assistant", "b")]}
    spans, (example,), tokenizer = encoded(row, FakeTokenizer(counted))
    assert spans == [["b"]] and tokenizer.decode(example.tokens) == "1:ab"


def test_prompt_completion_trains_the_completion_and_end_of_text():
    spans, (example,), tokenizer = encoded({"prompt": "ask:", "completion": "yes"})
    assert spans == [["yes</s>"]]
    assert tokenizer.decode(example.tokens, False) == "<s>ask:yes</s>"
    assert encoded({"prompt": "ask:", "completion": "yes</s>"})[0] == [["yes</s>"]]


def test_prompt_completion_keeps_the_prompts_own_tokens_when_they_would_merge():
    class Merging(FakeTokenizer):
        def encode(self, text, add_special_tokens=True):
            return super().encode(text.replace(": y", "#"), add_special_tokens)

    spans, (example,), tokenizer = encoded({"prompt": "q: ", "completion": "yes"}, Merging())
    assert spans == [["yes</s>"]]
    assert example.tokens[:4] == tokenizer.encode("q: ")


def test_a_tokenizer_that_appends_end_of_text_does_not_put_it_after_the_prompt():
    class Appending(FakeTokenizer):
        def encode(self, text, add_special_tokens=True):
            ids = super().encode(text, add_special_tokens)
            return [*ids, self.eos_id] if add_special_tokens else ids

    row = {"prompt": "ask:", "completion": "yes"}
    _, (example,), tokenizer = encoded(row, Appending())
    assert tokenizer.decode(example.tokens, False) == "<s>ask:yes</s>"
    _, (example,), _ = encoded({"text": "ask"}, Appending())
    assert tokenizer.decode(example.tokens, False) == "<s>ask</s>"


def test_prompt_and_completion_as_messages_train_the_completions_turns_only():
    row = {
        "prompt": [say("user", "a"), say("assistant", "b"), say("user", "c")],
        "completion": [say("assistant", "d")],
    }
    assert encoded(row)[0] == [["d<|end|>"]]


def test_text_trains_everything_and_end_of_text():
    spans, (example,), tokenizer = encoded({"text": "abc"})
    assert spans == [["<s>abc</s>"]]
    assert example.num_trained == 4  # the first token is never a target


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (7, r"expected an object, got a int"),
        ({"question": "a"}, r"expected .messages.*found 'question'"),
        ({}, r"no field at all"),
        ({"prompt": "a"}, r"'completion' is missing"),
        ({"prompt": "a", "completion": 3}, r"completion: expected a text"),
        ({"prompt": "a", "completion": [say("user", "b")]}, r"completion: expected a text, like"),
        ({"text": None}, r"text: expected a text, got null"),
        ({"messages": []}, r"messages: expected a non-empty list of messages, got an empty list"),
        ({"messages": "hi"}, r"got a text"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\].role: expected"),
        ({"messages": [say("user", 3)]}, r"messages\[0\].content: expected a text, got a int"),
        ({"messages": [say("user", "a")], "tools": {}}, r"tools: expected a list"),
    ],
)
def test_malformed_row_is_refused_with_place_field_and_expectation(row, said):
    with pytest.raises(DataError, match=rf"^data\[0\].*{said}"):
        encoded(row)


def test_chat_row_without_a_template_is_refused():
    tokenizer = FakeTokenizer()
    tokenizer.chat = None
    with pytest.raises(TokenizerMissing, match="no chat template"):
        encoded({"messages": [say("user", "a"), say("assistant", "b")]}, tokenizer)


def test_text_row_without_an_end_of_text_token_is_refused():
    tokenizer = FakeTokenizer()
    tokenizer.eos_id = None
    with pytest.raises(DataError, match="no end-of-text token"):
        encoded({"text": "a"}, tokenizer)


def weather_call():
    called = {"name": "get_weather", "arguments": {"city": "Ulm"}}
    return say("assistant", "", tool_calls=[{"type": "function", "function": called}])


def with_calls(messages, for_generation):
    text = "".join(
        f"<|start|>{m['role']}\n{m['content']}{json.dumps(m.get('tool_calls') or '')}<|end|>"
        for m in messages
    )
    return text + "<|start|>assistant\n" * for_generation


def needs_words(messages, for_generation):
    try:
        return "".join("<|start|>" + m["content"] for m in messages)
    except TypeError as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error


def test_a_call_that_the_template_does_not_write_is_refused_and_one_that_it_does_is_trained():
    messages = [say("user", "rain?"), weather_call(), say("tool", "no"), say("assistant", "No.")]
    with pytest.raises(DataError, match=r"data\[0\].*'get_weather' is called.*knows tools"):
        encoded({"messages": messages})
    messages[1]["content"] = None
    with pytest.raises(DataError, match=r"refuses the messages: .*; a message is a tool call"):
        encoded({"messages": messages}, FakeTokenizer(needs_words))
    messages[1]["content"] = ""
    (spans,), _, _ = encoded({"messages": messages}, FakeTokenizer(with_calls))
    assert "get_weather" in spans[0] and len(spans) == 2


@pytest.mark.parametrize("shape", [lambda tool: tool, lambda tool: {"function": tool}])
def test_rows_whose_tools_the_template_leaves_out_are_counted(shape):
    tools = [shape({"name": "get_weather", "parameters": {}})]
    row = {"messages": [say("user", "rain?"), say("assistant", "No.")], "tools": tools}
    for named, expected in (({}, 1), ({"messages": [say("user", "get_weather?")]}, 0)):
        messages = named.get("messages", []) + row["messages"]
        counts = load_data([{**row, "messages": messages}], FakeTokenizer(), 512).counts
        assert counts.lacks_tools == expected
        assert any("tools" in text for text in counts.warnings()) == bool(expected)
