"""Jinja for templates that came with a download: no way out, and bounded in time and memory.

On top of jinja's own sandbox (no internals, no mutation), every loop turn, call and produced
character is paid for from a budget, and single operations that could explode are looked at first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

__all__ = ["BudgetExceeded", "Sandbox", "render"]

MAX_STEPS = 1_000_000
MAX_ARGUMENT = 10_000  # whole numbers handed to functions and filters, other than `range`
MAX_INTEGER_BITS = 256

_REFUSED_FILTERS = frozenset(
    {"filesizeformat", "forceescape", "pprint", "random", "striptags"}
    | {"urlencode", "urlize", "wordwrap", "xmlattr"}
)
_REFUSED_METHODS = frozenset(
    {"center", "encode", "expandtabs", "format_map", "ljust"}
    | {"maketrans", "rjust", "translate", "zfill"}
)
_WIDE_FORMAT = re.compile(r"[%{][^%}]*\d{4}")


class BudgetExceeded(jinja2.TemplateError):
    """A template does more than any conversation needs."""


class _Budget:
    def __init__(self, num_characters: int) -> None:
        self.steps = MAX_STEPS
        self.characters = num_characters

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise BudgetExceeded(f"it takes more than {MAX_STEPS} steps")

    def produce(self, num_characters: int) -> None:
        self.characters -= num_characters
        if self.characters < 0:
            raise BudgetExceeded("it makes far more text than it was given")


_NO_INPUT = 2**20
_current: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


def _budget() -> _Budget:
    return _current.get() or _Budget(_NO_INPUT)  # constants folded when a template is compiled


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render within a budget that grows with the size of the variables.

    Raises `BudgetExceeded`, or whatever the template raises.
    """
    token = _current.set(_Budget(_NO_INPUT * 4 + 64 * _num_characters(variables)))
    try:
        return "".join(template.generate(variables))
    finally:
        _current.reset(token)


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_num_characters(key) + _num_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_num_characters, value))
    return 8


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that chat templates expect, with a budget. See the module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        self.filters = {
            name: _bounded_filter(name, function)
            for name, function in self.filters.items()
            if name not in _REFUSED_FILTERS
        }
        self.filters |= {
            "tojson": _bounded_filter("tojson", _to_json),
            "_turns": _turns,
            "_join": _join,
            "_emit": _emit,
        }
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _REFUSED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"it reads the unsafe attribute {attribute!r}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget()
        budget.step()
        if operator == "*":
            for item, count in ((left, right), (right, left)):
                if isinstance(item, str | list | tuple) and isinstance(count, int):
                    budget.produce(len(item) * max(count, 0))
        if operator == "**" and not (_is_small(left, 32) and _is_small(right, 6)):
            raise BudgetExceeded("it takes a large power")
        if operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INTEGER_BITS:
            raise BudgetExceeded("it makes a number of too many digits")
        _pay(result)
        return result

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        _budget().step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check_text_method(function.__name__, owner, args)
        elif getattr(function, "__name__", "") in ("format", "format_map"):
            _check_format(str(getattr(function, "__wrapped__", "")), args)
        if function is not jinja2.sandbox.safe_range:
            _check_arguments([*args, *kwargs.values()])
        result = super().call(context, function, *args, **kwargs)
        _pay(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with its template checked first."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        template = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(template, [*args, *kwargs.values()])
            return inner(*args, **kwargs)

        return bounded


# ---------------------------------------------------------------- what costs


class _Metered(NodeTransformer):
    """Rewrites loops, concatenations and outputs so that they pay."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        node.iter = _through("_turns", node.iter)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
        self.generic_visit(node)
        return _through("_join", jinja2.nodes.List(node.nodes, lineno=node.lineno))

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            _through(
                "_emit",
                jinja2.nodes.Const(item.data, lineno=item.lineno)
                if isinstance(item, jinja2.nodes.TemplateData)
                else item,
            )
            for item in node.nodes
        ]
        return node


def _through(name: str, node: Any) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _turns(context: Any, items: Iterable[Any]) -> Iterable[Any]:
    if isinstance(items, jinja2.Undefined):
        return items
    if isinstance(items, str | list | tuple | dict | range):
        _budget().step(len(items))  # the loop keeps its length
        return items
    return _counted(items)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget().step()
        yield item


@jinja2.pass_context
def _join(context: Any, items: list[Any]) -> str:
    texts = [str(item) for item in items]
    _budget().produce(sum(map(len, texts)))
    return "".join(texts)


@jinja2.pass_context
def _emit(context: Any, value: Any) -> Any:
    _budget().step()
    text = str(value)
    _budget().produce(len(text))
    return text


def _pay(result: Any) -> None:
    if isinstance(result, str | list | tuple | dict):
        _budget().produce(len(result))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _budget().step()
        values = [*args, *kwargs.values()]
        _check_arguments(values)
        texts = [value for value in values if isinstance(value, str)]
        if name == "format" and texts:
            _check_format(texts[0], values)
        if name == "replace" and len(texts) > 1:
            _check_text_method("replace", texts[0], texts[1:])
        if name in ("indent", "center", "truncate") and texts:
            numbers = [value for value in values if isinstance(value, int)]
            prefix = max([4, *numbers, *map(len, texts[1:])])
            _budget().produce(len(texts[0]) + prefix * (1 + texts[0].count("\n")))
        if name == "join":
            separator = texts[-1] if texts else ""
            sized = [value for value in values if isinstance(value, list | tuple | str)]
            _budget().produce(len(separator) * max(map(len, sized), default=0))
        result = function(*args, **kwargs)
        _pay(result)
        return result

    return bounded


def _check_arguments(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
            raise BudgetExceeded(f"it passes {value}, which is above {MAX_ARGUMENT}, to a function")


def _check_text_method(name: str, text: str, args: Any) -> None:
    if name == "replace" and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        count = text.count(old) if old else len(text) + 1
        _budget().produce(len(text) + count * len(new))
    if name == "join" and args and isinstance(args[0], list | tuple | str | dict):
        _budget().produce(len(text) * len(args[0]))


def _check_format(template: str, values: Iterable[Any]) -> None:
    if _WIDE_FORMAT.search(template):
        raise BudgetExceeded("it formats to a width of thousands")
    _check_arguments(values)
    for value in values:
        if isinstance(value, tuple | list):
            _check_arguments(value)


def _is_small(value: Any, bits: int) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= bits)


# ---------------------------------------------------------------- what templates expect


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration is an instance attribute)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace may not hold the name {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 32:
        raise BudgetExceeded(f"it indents JSON by {indent}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"\d{3}", pattern):
        raise BudgetExceeded("it formats the time with a long pattern")
    return datetime.now().strftime(pattern)
