"""Rows 4, 5 and 6 with the families' real tokenizers: a conversation has the same ids in training,
in chat, in transformers and, for Mistral, in mistral-common; one beginning of text; every answer
ends where generation stops.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from sloth.data.encode import RowEncoder
from sloth.errors import DataError
from sloth.infer.text import encode_prompt
from sloth.text.tokenizer import Tokenizer
from tests.oracles import hf_tokenizer
from tests.text.families import FAMILIES, MISTRAL_FILES, mistral_chat_ids

Message = dict[str, Any]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


CHATS: dict[str, list[Message]] = {
    "one turn": [user("hello world"), assistant("Hi!")],
    "two turns": [
        user("What's 2 < 3?"),
        assistant("It is true: 2 < 3.\n\n  - yes"),
        user("gr\u00fc\u00df dich \U0001f600\nnew line"),
        assistant("\u4f60\u597d"),
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        user("hi"),
        assistant("no"),
        user("why?"),
        assistant("so"),
    ],
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "It's the <weather>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Oslo"}
TOOL_CHAT: list[Message] = [
    user("Rain?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "weather", "arguments": ARGUMENTS},
            }
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "yes"},
    assistant("Yes."),
]
DATE = {"date_string": "26 Jul 2024"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("family") / request.param
    return request.param, FAMILIES[request.param].write(folder)


@functools.lru_cache(maxsize=1)  # tests come family by family
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@functools.lru_cache(maxsize=1)  # tests come family by family
def theirs(folder: Path) -> Any:
    return hf_tokenizer(folder)


def rendered_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int] | None:
    """Ids of a conversation; None where the template refuses it."""
    assert tokenizer.chat is not None
    try:
        text = tokenizer.chat.render(messages)
    except DataError:
        return None
    return tokenizer.encode(text, add_special_tokens=False)


def drops_its_system_message(name: str, chat: str) -> bool:
    """Whether the template writes the system message for as long as no answer follows."""
    return name == "mistral-nemo" and chat == "system"


@pytest.mark.parametrize("chat", CHATS)
def test_row_4_training_chat_and_transformers_give_the_same_ids(
    family: tuple[str, Path], chat: str
) -> None:
    name, folder = family
    tokenizer, messages = ours(folder), CHATS[chat]
    ids = rendered_ids(tokenizer, messages)
    assert (ids is None) == (name == "gemma-2" and chat == "system")
    if ids is None:
        return
    assert tokenizer.bos_id is None or (ids.count(tokenizer.bos_id), ids[0]) == (
        1,
        tokenizer.bos_id,
    )
    (row,) = RowEncoder(tokenizer).encode([("data[0]", {"messages": messages})])
    asked = encode_prompt(tokenizer, messages[:-1])
    if drops_its_system_message(name, chat):  # trained as it is asked, with the system message
        assert row.examples[-1].tokens[: len(asked)] == asked
    else:
        assert row.examples[-1].tokens == ids and not row.has_double_bos
    assert tokenizer.bos_id is None or asked.count(tokenizer.bos_id) == 1
    if FAMILIES[name].hf_can_read:
        hf = theirs(folder)
        assert ids == hf.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert asked == hf.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
    if name in MISTRAL_FILES:
        assert asked == mistral_chat_ids(MISTRAL_FILES[name], messages[:-1])


@pytest.mark.parametrize("chat", CHATS)
def test_row_5_every_answer_ends_in_a_stop_token_inside_the_loss(
    family: tuple[str, Path], chat: str
) -> None:
    name, folder = family
    tokenizer, messages = ours(folder), CHATS[chat]
    if rendered_ids(tokenizer, messages) is None:
        with pytest.raises(DataError, match="refuses the messages"):
            list(RowEncoder(tokenizer).encode([("data[0]", {"messages": messages})]))
        return
    (row,) = RowEncoder(tokenizer).encode([("data[0]", {"messages": messages})])
    answers = [message for message in messages if message["role"] == "assistant"]
    assert (row.turns, row.unstopped) == (len(answers), 0)
    for example in row.examples:
        trained = [token for token in example.labels if token >= 0]
        assert trained[-1] in tokenizer.stop_ids
    last = [token for token in row.examples[-1].labels if token >= 0]
    assert answers[-1]["content"] in tokenizer.decode(last)


def test_row_6_stop_ids_are_the_models_own(family: tuple[str, Path]) -> None:
    name, folder = family
    tokenizer, stops = ours(folder), FAMILIES[name].stops
    assert {text: tokenizer.id_of(text) for text in stops} == stops
    assert set(tokenizer.stop_ids) == set(stops.values())


def test_mistrals_tool_calls_have_mistral_commons_ids(family: tuple[str, Path]) -> None:
    name, folder = family
    if name not in MISTRAL_FILES or name == "mistral-v1":
        pytest.skip("not a tokenizer of Mistral's that knows tools")
    chat = ours(folder).chat
    assert chat is not None
    messages = [*TOOL_CHAT, user("ok")]
    ids = ours(folder).encode(chat.render(messages, tools=[WEATHER]), add_special_tokens=False)
    stated = copy.deepcopy(messages)
    stated[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(ARGUMENTS)
    assert ids == mistral_chat_ids(MISTRAL_FILES[name], stated, [WEATHER])
