"""The families' own chat templates, out of the models' repositories, render byte for byte as in
transformers: dates, tools, thoughts and refusals too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from sloth.errors import DataError
from sloth.text.chat import ChatTemplate
from tests.assets import llama_cpp_template
from tests.oracles import hf_render
from tests.text.families import FAMILIES
from tests.text.test_golden_chats import CHATS, TOOL_CHAT, WEATHER, assistant, user

Message = dict[str, Any]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SHIPPED = (
    "meta-llama-Llama-3.3-70B-Instruct",
    "Qwen-QwQ-32B",
    "Qwen3-Coder",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "unsloth-mistral-Devstral-Small-2507",
    "HuggingFaceTB-SmolLM3-3B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
)
TEMPLATES: dict[str, Callable[[], str]] = {
    **{name: family.template for name, family in FAMILIES.items()},
    **{name: functools.partial(llama_cpp_template, name) for name in SHIPPED},
}

NOW = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}
TWO_CALLS: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        *TOOL_CHAT[1]["tool_calls"],
        {"id": "abcdefgh2", "type": "function", "function": {"name": "now", "arguments": {}}},
    ],
}
CONVERSATIONS: dict[str, list[Message]] = {
    **CHATS,
    "question": [user('What\'s 2 < 3 & "so"? ')],
    "white space": [user(" a  b\n"), assistant("\tx \n"), user("\n\nc")],
    "tool call": TOOL_CHAT,
    "tool call after system": [{"role": "system", "content": "Use tools."}, *TOOL_CHAT, user("ok")],
    "two calls": [
        user("Rain?"),
        TWO_CALLS,
        TOOL_CHAT[2],
        {"role": "tool", "name": "now", "tool_call_id": "abcdefgh2", "content": "12:00"},
    ],
    "thoughts": [
        user("hm?"),
        {**assistant("Yes"), "reasoning_content": "one\n\ntwo"},
        user("And?"),
        {**assistant("No"), "reasoning_content": "three"},
    ],
    "thoughts in the text": [user("hm?"), assistant("<think>\nx\n</think>\n\nYes"), user("And?")],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
    "two users": [user("a"), user("b")],
    "assistant first": [assistant("a"), user("b")],
    "unknown role": [{"role": "critic", "content": "a"}],
    "nothing": [],
}
# tools, add_generation_prompt, and what templates read of their own
TOOLS = [WEATHER, NOW]
PINNED = {"date_string": "26 Jul 2024"}
SETTINGS: tuple[tuple[list[Message] | None, bool, dict[str, Any]], ...] = (
    (None, False, {}),
    (None, True, {}),
    (None, True, {"enable_thinking": False, **PINNED}),
    (TOOLS, False, {"enable_thinking": False}),
    (TOOLS, True, PINNED),
)


def rendered(render: Callable[..., str], *given: Any, **variables: Any) -> tuple[str, str]:
    """("text", what was rendered) or ("refused", why)."""
    try:
        return "text", render(*copy.deepcopy(given), **variables)
    except Exception as error:  # each side has its own types
        return "refused", str(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_byte_for_byte_as_in_transformers(name: str) -> None:
    source = TEMPLATES[name]()
    template, num_texts = ChatTemplate(source, SPECIAL), 0
    for conversation, messages in CONVERSATIONS.items():
        for tools, generation, variables in SETTINGS:
            asked = (messages, tools, generation)
            theirs = functools.partial(rendered, hf_render, source, *asked, **SPECIAL, **variables)
            kind, expected = theirs()
            got_kind, got = rendered(template.render, *asked, **variables)
            if kind == "text" and got != expected:  # a day may have ended between the two
                kind, expected = theirs()
            assert got_kind == kind, (conversation, expected, got)
            if kind == "text":
                assert got == expected, conversation
                num_texts += 1
            else:
                assert expected in got, "the template's own words are shown"
    assert num_texts >= len(SETTINGS) * 5, "nearly everything was refused"


def test_dates_are_todays_where_they_are_not_given() -> None:
    source = TEMPLATES["llama-3.2"]()
    got = ChatTemplate(source, SPECIAL).render(CHATS["system"])
    today = datetime.now()
    days = [(today - timedelta(days)).strftime("%d %b %Y") for days in (0, 1)]
    assert any(f"Today Date: {day}\n" in got for day in days)


# -- what users of these templates meet ------------------------------------------------------------


def render(name: str, messages: list[Message], **variables: Any) -> str:
    return ChatTemplate(TEMPLATES[name](), SPECIAL).render(messages, **variables)


def test_llama_3_1_always_has_a_system_block_with_dates() -> None:
    text = render("llama-3.1", [user("hi")], date_string="01 Jan 2025")
    assert text == (
        "<s><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    )


def test_gemma_2_refuses_a_system_message() -> None:
    with pytest.raises(DataError, match="refuses the messages: System role not supported"):
        render("gemma-2", CHATS["system"])


def test_gemma_3_puts_the_system_message_into_the_first_turn() -> None:
    text = render("gemma-3", CHATS["system"][:2], add_generation_prompt=True)
    assert text == ("<s><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n")


def test_qwen_2_5_has_a_system_message_of_its_own_and_qwen_3_none() -> None:
    asked = "<|im_start|>user\nhi<|im_end|>\n"
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert render("qwen-2.5", [user("hi")]) == f"<|im_start|>system\n{system}<|im_end|>\n{asked}"
    assert render("qwen-3", [user("hi")]) == asked


def test_qwen_3_drops_earlier_thoughts_and_writes_an_empty_one_on_demand() -> None:
    text = render("qwen-3", CONVERSATIONS["thoughts"])
    assert "one" not in text and "<think>\nthree\n</think>\n\nNo<|im_end|>" in text
    asked = render("qwen-3", [user("hi")], add_generation_prompt=True, enable_thinking=False)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_mistrals_versions_put_the_system_message_in_different_places() -> None:
    messages = CHATS["system"][:4]
    assert render("mistral-v1", messages) == (
        "<s> [INST] Be brief.\n\nhi [/INST] no</s> [INST] why? [/INST]"
    )
    assert render("mistral-v3", messages) == (
        "<s>[INST] hi[/INST] no</s>[INST] Be brief.\n\nwhy?[/INST]"
    )
    assert render("mistral-nemo", messages) == (
        "<s>[INST]hi[/INST]no</s>[INST]Be brief.\n\nwhy?[/INST]"
    )
    assert "[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] hi" in render("mistral-v7", messages)
