"""Chat templates that a model from the internet might bring: name -> template."""

from __future__ import annotations


def loop(count: str, body: str) -> str:
    return "{% for i in range(" + count + ") %}" + body + "{% endfor %}"


def grown(start: str, step: str) -> str:
    """`start`, put through `step` (in which X is the value so far) sixty times, and printed."""
    step = step.replace("X", "ns.x")
    return (
        "{% set ns = namespace(x=" + start + ") %}"
        "{% for i in range(60) %}{% set ns.x = " + step + " %}{% endfor %}{{ ns.x }}"
    )


LONG = "{% set s = 'a' * 1000000 %}"
MANY = "99999"
FAIL = "{{ raise_exception('nothing was reached') }}"

# Endless or exponential work.
WORK = {
    "nested loops": loop(MANY, loop(MANY, "")),
    "nested loops, filtered": loop(MANY, "{% for b in range(99999) if false %}{% endfor %}"),
    "nested loops, later": "{% if messages | length > 0 %}"
    + loop(MANY, loop(MANY, ""))
    + "{% endif %}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [range(9)] recursive %}{{ loop([range(9)] * 50) }}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "big range": loop("10 ** 9", ""),
    "many ranges": loop("500", "{% set x = range(99999) | list %}"),
    "many compares": LONG + "{% set t = 'a' * 1000000 %}" + loop(MANY, "{{ s == t }}"),
    "huge power": "{{ 9 ** 999999999 }}",
    "huge product": grown("3", "X * X"),
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "long source": "x" * 200_000,
}

# Large values, by repetition, padding, doubling or output.
MEMORY = {
    "repeat text": "{{ 'a' * 10 ** 9 }}",
    "repeat list": "{{ [1] * 10 ** 9 }}",
    "repeat, reversed": "{{ 10 ** 9 * 'a' }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent repeated": LONG + "{{ ('%(a)s' * 5000) % {'a': s} }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format repeated": LONG + "{{ ('{0}' * 5000).format(s) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000) }}",
    "indent": LONG + "{{ s.replace('a', '\\n') | indent(1000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "mapped": "{{ range(99999) | map('center', 1000000) | list }}",
    "replace": LONG + "{{ s.replace('a', s) }}",
    "replace filter": LONG + "{{ s | replace('a', s) }}",
    "join": LONG + "{{ ([s, s] * 1000) | join }}",
    "join method": LONG + "{{ s.join([''] * 100000) }}",
    "double by plus": grown("'a'", "X + X"),
    "double by tilde": grown("'a'", "X ~ X"),
    "double by join": grown("'a'", "[X, X] | join"),
    "double by format": grown("'a'", "'{0}{0}'.format(X)"),
    "double lists": grown("[1]", "X + X"),
    "nest lists": grown("[1]", "[X, X]"),
    "nest dicts": grown("1", "dict(a=X, b=X)"),
    "nest namespaces": grown("1", "namespace(a=X, b=X)") + FAIL,
    "double a block": "{% set ns = namespace(x='a') %}"
    + loop("60", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "long output": LONG + loop(MANY, "{{ s }}"),
    "long text output": loop(MANY, "x" * 100_000),
    "slices": LONG
    + "{% set ns = namespace(x=[]) %}"
    + loop(MANY, "{% set ns.x = ns.x + [s[1:]] %}"),
    "date width": "{{ strftime_now('%0999999999d') }}",
    "json indent": "{{ [[[1]]] | tojson(indent=100000000) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
}

# Ways to Python itself, or to change what was given.
ESCAPES = {
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'].dumps(1) }}",
    "attr filter": "{{ (messages | attr('__class__')).__base__ }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "init globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "change messages": "{% set _ = messages.append(1) %}",
    "change through dict": "{% set _ = dict.update(messages[0], {'role': 'x'}) %}",
    "namespace name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "import os": "{% import 'os' as os %}",
}

# Those of them that without the sandbox print what they reach, and that.
REACHES = {
    "mro": "<class",
    "globals": "1",
    "attr filter": "<class 'object'>",
    "format attribute": "<class 'list'>",
}
# Those that name what the sandbox hides, and print nothing of it.
HIDDEN = {
    "an attribute": "{{ ''.__class__ }}",
    "an item": "{{ ''['__class__'] }}",
    "the filter": "{{ messages | attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "a mapped attribute": "{{ messages | map(attribute='__class__') | join }}",
}

HOSTILE = WORK | MEMORY | ESCAPES
# Pure counting: measuring the memory of these would only take long.
MAKES_NOTHING = {
    "nested loops",
    "nested loops, filtered",
    "nested loops, later",
    "branching macro",
}
