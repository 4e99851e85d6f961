"""Chat templates render as Hugging Face does, and a hostile one ends at once with a clear error."""

# ruff: noqa: E501 - a template reads better on one line

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest

from sloth.errors import DataError
from sloth.text import chat
from sloth.text.chat import ChatTemplate
from tests.oracles import hf_render
from tests.text.hostile_templates import ESCAPES, HIDDEN, HOSTILE, MAKES_NOTHING, REACHES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": 'What\'s 2 < 3 & "so"?'},
    {"role": "assistant", "content": "It is true: 2 < 3.  "},
    {"role": "user", "content": "gr\u00fc\u00df dich \U0001f600"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's the <weather>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS = [
    {"role": "user", "content": "Rain in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo", "n": 1.5}}}],
    },
    {"role": "tool", "name": "weather", "content": "yes"},
    {"role": "assistant", "content": "Yes.", "reasoning": "The tool says so."},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
]

TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
{{- '<|begin|>system\\nHelp.<|end|>\\n' }}
    {%- endif %}
{{- '<|begin|>' + message['role'] + '\\n' + (message['content'] or '') + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|begin|>assistant\\n' }}{% endif %}""",
    "bracketed": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}
{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{% for m in rest %}
  {% if m['role'] == 'user' %}
[Q] {{ system ~ ' ' if loop.index0 == 0 and system else '' }}{{ m['content'] | trim }} [/Q]
  {% elif m['role'] == 'assistant' %}
    {% generation %} {{ m['content'] }}{{ eos_token }}{% endgeneration %}
  {% else %}{% continue %}{% endif %}
{% endfor %}
{{- '[A]' if add_generation_prompt }}""",
    "lists": """{% set ns = namespace(seen=0, names=[]) %}
{% for m in messages | reverse %}{% set ns.seen = ns.seen + 1 %}
{% set ns.names = ns.names + [m.role | upper] %}
{% if ns.seen >= 3 %}{% break %}{% endif %}{% endfor %}
{{ ns.names | join(', ') }} {{ ns.seen }} {{ messages | length }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | map(attribute='role') | unique | join('/') }}
{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | list }}
{%- for m in messages if m.role == 'user' %} {{ loop.index }}/{{ loop.length }}{{ loop.last }}{%
endfor %} {{ dict(a=1, b=[1, 2]) | tojson }} {{ dict(a=1).items() | list }} {{ (1, 2)[0] }} {{ [3,
1, 2] | sort }} {%- for key, value in {'x': 1, 'y': 2}.items() %}{{ key }}={{ value }};{% endfor
%}""",
    "values": """{{ none }} {{ true }} {{ 1.0 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ -3 }} {{ 1
    == 1.0 }}
{{ 'a' * 3 }} {{ 'a%sb%d' % ('x', 4) }} {{ '{}-{:>4}'.format('a', 7) }} {{ "x" | center(5) }}|
{{ undefined_name }}|{{ undefined_name | default('d') }}|{{ messages[0].nothing is defined }}
{{ 'a,b,c'.split(',')[::-1] }} {{ ' x '.strip() }} {{ 'abc'[1:] }} {{ 'abc'[-1] }} {{ 'Ab'.lower()
}} {{ 'a-b'.replace('-', '+') }} {{ 'abc'.startswith('ab') }} {{ '1' | int + 1 }} {{ 'q' in 'qwe' }}
{{ 'line\\nline' | indent(2) }} {{ [1, 2, 3] | sum }} {{ 3.14159 | round(2) }} {{ 'a' | capitalize
}} {{ ','.join(['a', 'b']) }} {{ range(3) | list }} {{ 'x' ~ 1 ~ none }} {{ "<&>" | escape }} {{
"<&>" }}""",
    "macros": """{% macro show(text, mark='*') %}{{ mark }}{{ text | trim }}{{ mark }}{% endmacro %}
{% macro outer() %}({{ caller() }}){% endmacro %}
{% for m in messages %}{{ show(m.content or '-') }}{{ show('x', mark='#') }}
{% call outer() %}{{ m.role }}{% endcall %}{% endfor %}
{% set block %}{{ messages | length }} messages{% endset %}{{ block | upper }}
{% filter upper %}shout {{ messages[0].role }}{% endfilter %}
{% with a = 1 %}{{ a }}{% endwith %} {{ 'yes' if tools else 'no' }} {{ 'yes' if documents else 'no'
}} {% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}
{% for x in [] %}{% else %}empty{% endfor %}""",
    "tools": """{% if tools is not none %}{% for t in tools %}{{ t | tojson }}
{{ t.function | tojson(indent=2) }}{% endfor %}{% endif %}
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}|{{ m.thinking }}</think>{%
endif %} {% if m.tool_calls is defined and m.tool_calls %}{% for c in m.tool_calls %}
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
{% endfor %}{% endif %}{% endfor %}""",
    "parts": """{% for m in messages %}{% if m.content is string %}{{ m.content }}
{% elif m.content is iterable and m.content is not mapping %}{% for part in m.content %}
{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% else %}null{% endif %}{% endfor
%}""",
    "whitespace": "\n  {%- if true %}\n\n  a  \n {% endif -%}\n\n {# note #}\n b\n\n",
    "dates": """{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y')
    %}{% endif %}
Today Date: {{ date_string }} {{ enable_thinking | default(true) }}""",
}


@pytest.mark.parametrize("conversation", [PLAIN, CALLS, PARTS], ids=["plain", "calls", "parts"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_byte_for_byte_as_hugging_face(
    name: str, conversation: list[dict[str, Any]]
) -> None:
    needs_text = name in ("bracketed", "chatml", "macros")
    if needs_text and conversation is not PLAIN:
        pytest.skip("the template adds text to the content")
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    for tools in (None, TOOLS):
        for generation in (False, True):
            expected = hf_render(TEMPLATES[name], conversation, tools, generation, **SPECIAL)
            assert template.render(conversation, tools, generation) == expected


def test_date_and_other_variables_can_be_pinned() -> None:
    template = ChatTemplate(TEMPLATES["dates"])
    text = template.render([], date_string="26 Jul 2024", enable_thinking=False)
    assert text == "Today Date: 26 Jul 2024 False"
    assert time.strftime("%Y") in template.render([])


def test_special_tokens_and_variables_come_in_that_order() -> None:
    template = ChatTemplate("{{ bos_token }}{{ x }}", {"bos_token": "<s>"})
    assert template.render([], x=1) == "<s>1"
    assert template.render([], bos_token="<b>", x=1) == "<b>1"


def test_tool_use_template_is_taken_when_tools_are_given() -> None:
    template = ChatTemplate("plain", named={"tool_use": "with tools", "rag": "other"})
    assert template.render([]) == "plain"
    assert template.render([], tools=TOOLS) == "with tools"


def test_messages_are_left_as_they_are() -> None:
    before = json.dumps(CALLS)
    ChatTemplate(TEMPLATES["tools"]).render(CALLS, TOOLS)
    assert json.dumps(CALLS) == before


@pytest.mark.parametrize(
    "source, says",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "line 1"),
        ("{{ messages[0].a.b }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ 'x' | no_such_filter }}", "no_such_filter"),
    ],
)
def test_faults_of_a_template_are_data_errors(source: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        ChatTemplate(source).render(PLAIN)


def test_a_message_that_is_no_object_is_refused() -> None:
    with pytest.raises(DataError, match="role and content"):
        ChatTemplate("x").render(["hello"])  # type: ignore[list-item]


def test_long_conversations_stay_within_the_budget() -> None:
    """Quadratic templates over a thousand messages, and megabytes of text, are honest work."""
    quadratic = (
        "{% for m in messages %}{% set ns = namespace(n=0) %}{% for o in messages %}"
        "{% if o.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
        "{% if loop.index0 == messages | length - 1 %}{{ ns.n }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 40}] * 600
    assert ChatTemplate(quadratic).render(messages) == "600"
    huge = [{"role": "user", "content": "\u4e2d" * 2_000_000}]
    chatml = TEMPLATES["chatml"]
    assert ChatTemplate(chatml).render(huge) == hf_render(chatml, huge)


MOST_SECONDS = 1.0
MOST_BYTES = 100 * 2**20


@pytest.mark.parametrize("name", HOSTILE)
def test_row_23_hostile_template_ends_quickly(name: str) -> None:
    messages = [dict(message) for message in PLAIN]
    began = time.process_time()
    with pytest.raises(DataError) as caught:
        ChatTemplate(HOSTILE[name]).render(messages)
    seconds = time.process_time() - began
    assert seconds < MOST_SECONDS, f"{seconds:.2f} s"
    assert len(str(caught.value)) < 1000
    assert messages == PLAIN


OTHERWISE = {
    "change through dict": "has no attribute 'update'",  # `dict` is a function, not the class
    "import os": "no loader",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_row_23_the_sandbox_is_what_stops_an_escape(name: str, monkeypatch: Any) -> None:
    """Named by its error; and without its check, these templates reach what they are after."""
    with pytest.raises(DataError, match=OTHERWISE.get(name, "what the sandbox forbids")):
        ChatTemplate(ESCAPES[name]).render(PLAIN)
    if name in REACHES:
        monkeypatch.setattr(chat._Environment, "is_safe_attribute", lambda *rest: True)
        assert REACHES[name] in ChatTemplate(ESCAPES[name]).render(PLAIN)


@pytest.mark.parametrize("name", HIDDEN)
def test_row_23_what_the_sandbox_hides_prints_as_nothing(name: str, monkeypatch: Any) -> None:
    assert ChatTemplate(HIDDEN[name]).render(PLAIN) == ""
    monkeypatch.setattr(chat._Environment, "is_safe_attribute", lambda *rest: True)
    assert "<class" in ChatTemplate(HIDDEN[name]).render(PLAIN)


@pytest.mark.parametrize("name", sorted(set(HOSTILE) - MAKES_NOTHING))
def test_row_23_hostile_template_takes_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            ChatTemplate(HOSTILE[name]).render(PLAIN)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MOST_BYTES, f"{peak_bytes / 2**20:.0f} MiB"
