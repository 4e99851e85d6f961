"""Chat templates: messages to text, by jinja2 in a sandbox whose work and memory are bounded.

A template comes with a downloaded model, so it is untrusted code. jinja2's immutable sandbox keeps
it away from Python's internals, but not from the machine: two nested loops run for hours, `'a' *
10**9` takes a gigabyte. So every render has a budget (budget.py) that is spent on all that can
grow:

    a pass of a loop, a macro call     by the size of its body: ticks put into the parsed template
    literals, slices, ~, in            measured: calls put into the parsed template
    operators, filters, calls, output  paid for before or after they run: overrides of the sandbox

Counting inside the template holds for every render and in every thread, and costs little: 0.04 ms
for a short chat on one CPU core, against 0.015 ms without and some 0.5 ms for tracing Python's
lines.

Otherwise it renders as Hugging Face does: trim_blocks, lstrip_blocks, `break` and `continue`, the
`generation` tag, `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML. This is the
only place with a jinja environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.utils import Namespace

from sloth.errors import DataError
from sloth.text.budget import (
    BUDGET,
    MAX_JSON_INDENT,
    MAX_WIDTH,
    Budget,
    check_format,
    check_method,
    check_operands,
    check_percent,
    check_replace,
    check_strip,
    check_widths,
    stopped,
)

MAX_SOURCE_CHARS = 128 * 1024  # the longest of 70 known templates has 17,000

_NODES_PER_STEP = 16
_STEPS_PER_CALL = 8  # calling a macro takes jinja2 as long as 8 passes of an empty loop
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Filters that no chat template needs and whose work cannot be told from their input.
_BLOCKED_FILTERS = "filesizeformat pprint random striptags urlize wordwrap xmlattr".split()
# Filters that touch the items of their input, but do not turn them into text.
_LOOKING_FILTERS = (
    "attr batch count d default dictsort first groupby items last length list map max min reject "
    "rejectattr reverse select selectattr slice sort sum unique"
).split()
# Filters whose numbers are widths or counts.
_WIDTH_FILTERS = ("batch", "center", "indent", "round", "slice")

Message = dict[str, Any]


class ChatTemplate:
    """A model's chat template.

    source: jinja2 text. special_tokens: bos_token and the like, which templates write by name.
    named: other templates of the model; "tool_use" is taken when tools are given.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str] | None = None,
        named: dict[str, str] | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.named = dict(named or {})
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, special tokens included: encode it without adding any.

        tools: JSON schemas. add_generation_prompt: end with what begins an assistant's turn.
        variables: what the template may read beside, such as `date_string` to pin a date, or
        `enable_thinking`. Raises DataError when the template refuses the messages, is faulty, or
        works too much.
        """
        source = self.source if tools is None else self.named.get("tool_use", self.source)
        given = {
            **self.special_tokens,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        token = BUDGET.set(Budget(given))
        try:
            if source not in self._compiled:
                self._compiled[source] = _compile(source)
            return self._compiled[source].render(given)
        except DataError:
            raise
        except SecurityError as error:
            raise DataError(f"the chat template does what the sandbox forbids: {error}") from error
        except RecursionError as error:
            raise DataError("the chat template is nested too deeply") from error
        except Exception as error:  # a template can raise whatever its data make Python raise
            raise DataError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}"
            ) from error
        finally:
            BUDGET.reset(token)


def _with_reasoning(message: Message) -> Message:
    """Reasoning goes by three names; templates read the first, some the second."""
    if not isinstance(message, dict):
        raise DataError(f"a chat message is an object with role and content, got {message!r:.80}")
    found = (message.get(key) for key in _REASONING_KEYS)
    reasoning = next((value for value in found if value is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


# -- what templates find under a name -------------------------------------------------------------


class _TemplateNamespace(Namespace):
    """namespace(). It does not print what it holds: a chain of them would print exponentially."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with an underscore: {name}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """dict(), without the class, whose methods would change what they are given."""
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise DataError(f"the chat template refuses the messages: {message}")


def _strftime_now(form: str) -> str:
    if len(form) > MAX_WIDTH or re.search(r"\d{3}", form):
        raise stopped("it formats a date with a width of its own making")
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    check_widths("tojson", separators or ())
    if indent is None:
        return encoder.encode(value)
    check_widths("tojson", [indent], MAX_JSON_INDENT)
    return "".join(BUDGET.get().bounded(encoder.iterencode(value)))


# -- the sandbox ----------------------------------------------------------------------------------


class _Limits(Extension):
    """What `_instrument` calls from inside a template, and the `generation` tag.

    jinja2 gives every call the variables of the loop around it as keywords: `scope`.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """{% generation %} marks what the assistant says; here it only scopes its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("passed"), [], [], body).set_lineno(line)

    def passed(self, caller: Any, **scope: Any) -> str:
        return caller()

    def tick(self, weight: int, **scope: Any) -> bool:
        return BUDGET.get().tick(weight)

    def made(self, value: Any, **scope: Any) -> Any:
        return BUDGET.get().made(value)

    def searched(self, value: Any, **scope: Any) -> Any:
        return BUDGET.get().searched(value)

    def texts(self, *values: Any, **scope: Any) -> str:
        return "".join(map(str, BUDGET.get().joined(values)))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Limits, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
        )
        self.globals = {
            "range": safe_range,
            "dict": _dict,
            "namespace": _TemplateNamespace,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {
            name: _limited_filter(name, function)
            for name, function in (self.filters | {"tojson": _tojson}).items()
            if name not in _BLOCKED_FILTERS
        }
        self.tests = self.tests | {"in": lambda item, where: item in BUDGET.get().searched(where)}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        """jinja2's joining of what a template, macro or block wrote."""
        return "".join(BUDGET.get().joined(parts))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _instrument(template)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return BUDGET.get().made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, _Limits):
            return function(*args, **kwargs)
        if isinstance(owner, list | tuple | range):  # they have count and index
            BUDGET.get().searched(owner)
        elif isinstance(owner, str | bytes | int):
            args = check_method(owner, function.__name__, args)
        return BUDGET.get().made(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, *args, *kwargs.values())
            return wrapped(*args, **kwargs)

        return limited


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    """Every {{ output }} passes here; taking the context keeps jinja2 from folding constants."""
    BUDGET.get().write(value)
    return value


def _limited_filter(name: str, function: Any) -> Any:
    """`function` with its input, its arguments and its result paid for."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @jinja2.pass_context
    def limited(context: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        if name in _WIDTH_FILTERS:
            check_widths(name, (*args, *kwargs.values()))
        if name == "join":
            separator = str(args[0] if args else kwargs.get("d", ""))
            value = budget.joined(budget.paid(value), separator)
        elif name == "replace":
            named = dict(zip(("old", "new"), args, strict=False)) | kwargs
            given = {key: budget.written(text) for key, text in named.items()}
            check_replace(str(value), given.get("old"), given.get("new"))
        elif name == "trim":
            check_strip(str(value), *args, *kwargs.values())
        elif name == "format":
            check_percent(str(value), args or kwargs)
        elif name == "indent":
            budget.allow((1 + str(value).count("\n")) * MAX_WIDTH)
        elif name in _LOOKING_FILTERS or isinstance(value, GeneratorType):
            budget.look(value)
        else:
            budget.write(value)
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(wants, ())
        return budget.made(function(*first, value, *args, **kwargs))

    return limited


# -- putting the limits into a template -----------------------------------------------------------


def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE_CHARS:
        raise DataError(
            f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}"
        )
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is no valid jinja2: line {error.lineno}: {error}"
        ) from error
    except (SyntaxError, MemoryError) as error:
        raise DataError(f"the chat template is nested too deeply: {error}") from error


def _limit(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(
        nodes.ExtensionAttribute(_Limits.identifier, name), list(arguments), [], None, None
    )


def _instrument(template: nodes.Template) -> None:
    """Put a tick into every body that can run more than once, and measure what literals build.

    A tick costs by the size of the body, so a long body cannot hide work behind few passes.
    """
    bodies: list[Any] = list(
        template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))
    )
    for body in bodies:
        steps = 1 + sum(1 for _ in body.find_all(nodes.Node)) // _NODES_PER_STEP
        is_loop = isinstance(body, nodes.For)
        weight = nodes.Const(steps if is_loop else steps + _STEPS_PER_CALL)
        body.body.insert(0, nodes.ExprStmt(_limit("tick", weight)).set_lineno(body.lineno))
        if is_loop and body.test is not None:
            body.test = nodes.And(_limit("tick", weight), body.test)
    _replace_expressions(template)


def _replace_expressions(node: nodes.Node) -> None:
    """Measure what list, tuple, dict and slice expressions make; pay for ~ and `in` beforehand."""
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_expressions(value)
            setattr(node, field, _replaced(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_expressions(item)
                    value[index] = _replaced(item)


def _replaced(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _limit("texts", *node.nodes).set_lineno(node.lineno)
    if isinstance(node, nodes.Operand) and node.op in ("in", "notin"):
        node.expr = _limit("searched", node.expr)
    builds = isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    )
    if builds and getattr(node, "ctx", "load") == "load":
        return _limit("made", node).set_lineno(node.lineno)  # type: ignore[arg-type]
    return node
