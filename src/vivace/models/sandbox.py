"""Jinja for templates that came with a download: no way out, and bounded in time and memory.

On top of jinja's own sandbox (no internals, no mutation), everything that takes time or makes text
is paid for from a budget: loop turns, calls, produced characters, and what filters, comparisons and
slices read. Operations that could explode are looked at before they run.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from vivace.models.sandbox_budget import (
    BudgetExceeded,
    budget,
    check_integer,
    count_characters,
    print_text,
    spending,
)
from vivace.models.template_functions import (
    GenerationTag,
    Namespace,
    raise_exception,
    strftime_now,
    to_json,
)

__all__ = ["BudgetExceeded", "compile_template", "render"]

MAX_ARGUMENT = 10_000  # whole numbers handed to functions and filters, other than `range`

_REFUSED_FILTERS = frozenset(
    {"filesizeformat", "forceescape", "pprint", "random", "striptags"}
    | {"urlencode", "urlize", "wordwrap", "xmlattr"}
)
_REFUSED_METHODS = frozenset(
    {"center", "encode", "expandtabs", "format_map", "ljust"}
    | {"maketrans", "rjust", "translate", "zfill"}
)
_REFUSED_TESTS = frozenset({"lower", "upper"})  # they print what they are given
# Filters that look at the first item at most, and those that look at each item once.
_CHEAP_FILTERS = frozenset(
    {"abs", "attr", "count", "d", "default", "first", "float", "last", "length", "round", "safe"}
)
_SHALLOW_FILTERS = frozenset(
    {"batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"}
    | {"slice"}
)
_COMPARING_FILTERS = frozenset({"dictsort", "groupby", "max", "min", "sort", "sum", "unique"})
_ITERATING_FILTERS = _SHALLOW_FILTERS | _COMPARING_FILTERS | {"join"}
_COMPARING_TESTS = frozenset(
    {"==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in"}
    | {"le", "lessthan", "lt", "ne"}
)
_WIDE_FORMAT = re.compile(r"[%{][^%}]*\d{4}")


def compile_template(source: str) -> jinja2.Template:
    """Raises `jinja2.TemplateError`, or whatever else a template that is no template raises."""
    with spending():
        return Sandbox().from_string(source)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Render within a budget that grows with the size of the variables.

    Raises `BudgetExceeded`, or whatever the template raises.
    """
    with spending(count_characters(variables)):
        return "".join(template.generate(variables))


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that chat templates expect, with a budget. See the module."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, GenerationTag],
        )
        self.filters = {
            name: _bounded_filter(name, function)
            for name, function in self.filters.items()
            if name not in _REFUSED_FILTERS
        }
        self.filters |= {
            "tojson": _bounded_filter("tojson", to_json),
            "_turns": _turns,
            "_join": _join,
            "_emit": _emit,
            "_read": _read,
            "_among": _among,
            "_key": _key,
            "_cut": _cut,
        }
        self.tests = {name: t for name, t in self.tests.items() if name not in _REFUSED_TESTS}
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _REFUSED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"it reads the unsafe attribute {attribute!r}")

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, _key(None, argument))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        paid = budget()
        paid.step()
        check_integer(left)
        check_integer(right)
        if operator == "*":
            for item, count in ((left, right), (right, left)):
                if isinstance(item, str | list | tuple) and isinstance(count, int):
                    paid.produce(len(item) * max(count, 0))
        if operator == "**" and not (_is_small(left, 32) and _is_small(right, 6)):
            raise BudgetExceeded("it takes a large power")
        if operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        result = super().call_binop(context, operator, left, right)
        paid.pay_result(result)
        return result

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        paid = budget()
        paid.step()
        paid.work(len(args) + len(kwargs))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            args = _check_text_method(name, owner, args)
        elif isinstance(owner, list | tuple | range) or name == "changed":
            paid.read(owner, *args)  # searches compare
        elif isinstance(owner, dict):
            paid.read(*args)
        elif name in ("format", "format_map"):
            _check_format(str(getattr(function, "__wrapped__", "")), args)
        if function is not jinja2.sandbox.safe_range:
            _check_arguments([*args, *kwargs.values()])
        result = super().call(context, function, *args, **kwargs)
        paid.pay_result(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with its template checked first."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        template = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            for _, _, spec, _ in string.Formatter().parse(template):
                if spec and "{" in spec:
                    raise BudgetExceeded("it formats with widths that come from values")
            _check_format(template, [*args, *kwargs.values()])
            return inner(*args, **kwargs)

        return bounded


# ---------------------------------------------------------------- what costs


class _Metered(NodeTransformer):
    """Rewrites loops, outputs and whatever reads values through so that they pay."""

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

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Compare:
        self.generic_visit(node)
        node.expr = _read_node(node.expr)
        for operand in node.ops:
            is_search = operand.op in ("in", "notin")
            operand.expr = _read_node(operand.expr, "_among" if is_search else "_read")
        return node

    def visit_Test(self, node: jinja2.nodes.Test) -> jinja2.nodes.Test:
        self.generic_visit(node)
        if node.name in _COMPARING_TESTS:
            node.node = _read_node(node.node)
            node.args = [_read_node(item) for item in node.args]
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> jinja2.nodes.Pair:
        self.generic_visit(node)
        node.key = _read_node(node.key, "_key")
        return node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, jinja2.nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        none = jinja2.nodes.Const(None, lineno=node.lineno)
        return _through("_cut", node.node, *(bound or none for bound in bounds))


def _through(name: str, node: Any, *args: Any) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _read_node(node: Any, name: str = "_read") -> Any:
    return node if isinstance(node, jinja2.nodes.Const) else _through(name, node)


@jinja2.pass_context
def _read(context: Any, value: Any) -> Any:
    budget().read(value)
    return value


@jinja2.pass_context
def _among(context: Any, value: Any) -> Any:
    """What something is searched in; a dictionary is not read for that."""
    if not isinstance(value, dict):
        budget().read(value)
    return value


@jinja2.pass_context
def _key(context: Any, value: Any) -> Any:
    """Keys are hashed and shown in messages, which for nested values has no bound."""
    if not isinstance(value, str | int | float | jinja2.Undefined | None):
        raise SecurityError("it uses a key that is neither text nor a number")
    return value


@jinja2.pass_context
def _cut(context: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = slice(start, stop, step)
    if isinstance(value, str | list | tuple):
        budget().produce(len(range(len(value))[part]) + 1)
    return value[part]


@jinja2.pass_context
def _turns(context: Any, items: Iterable[Any]) -> Iterable[Any]:
    if isinstance(items, jinja2.Undefined):
        return items
    if isinstance(items, str | list | tuple | dict | range):
        budget().step(len(items))  # the loop keeps its length
        return items
    return _counted(items)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget().step()
        yield item


@jinja2.pass_context
def _join(context: Any, items: list[Any]) -> str:
    return "".join(map(print_text, items))


@jinja2.pass_context
def _emit(context: Any, value: Any) -> Any:
    budget().step()
    return print_text(value)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    num_passed = int(getattr(function, "jinja_pass_arg", None) is not None)

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget().step()
        passed, rest = args[:num_passed], args[num_passed:]
        if rest and name not in _CHEAP_FILTERS:
            is_lazy = hasattr(rest[0], "__next__") or isinstance(rest[0], range)
            is_taken = is_lazy and name in _ITERATING_FILTERS
            value = budget().take(rest[0]) if is_taken else rest[0]
            rest = (value, *rest[1:])
            _pay_filter(name, value, [*rest[1:], *kwargs.values()])
        _check_arguments([*rest, *kwargs.values()])
        result = function(*passed, *rest, **kwargs)
        budget().pay_result(result)
        return result

    return bounded


def _pay_filter(name: str, value: Any, options: list[Any]) -> None:
    """Pay for what a filter will do with a value, before it does."""
    paid = budget()
    if name in _SHALLOW_FILTERS:
        count, price = paid.glance(value), paid.read(*options)
        paid.work(count * max(price - len(options), 0))  # for a test that reads its argument
        return
    paid.read(value, *options)
    if name in _COMPARING_FILTERS:
        if name == "sum" and any(isinstance(item, list | tuple) for item in options):
            raise BudgetExceeded("it sums lists")
        return
    if not isinstance(value, str):
        paid.print(value)
    texts = [value if isinstance(value, str) else "", *(o for o in options if isinstance(o, str))]
    if name == "format":
        _check_format(texts[0], options)
    if name in ("replace", "trim"):
        _check_text_method("strip" if name == "trim" else name, texts[0], texts[1:])
    if name in ("indent", "truncate"):
        numbers = [item for item in options if isinstance(item, int)]
        prefix = max([4, *numbers, *map(len, texts[1:])])
        paid.produce(len(texts[0]) + prefix * (1 + texts[0].count("\n")))
    if name == "join" and isinstance(value, str | list | tuple | dict):
        paid.produce(max(map(len, texts[1:]), default=0) * len(value))


def _check_arguments(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
            raise BudgetExceeded(f"it passes {value}, which is above {MAX_ARGUMENT}, to a function")


def _check_text_method(name: str, text: str, args: Any) -> Any:
    """Pay for a method of a string, before it runs; returns its arguments."""
    paid = budget()
    if name == "join" and args:
        items = args[0] if isinstance(args[0], str | list | tuple | dict) else paid.take(args[0])
        paid.produce(len(text) * len(items))
        paid.print(items)
        return (items, *args[1:])
    price = paid.read(text, *args)
    if name.endswith("strip"):
        paid.work(price * sum(len(arg) for arg in args if isinstance(arg, str)))
    if name == "replace" and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        count = text.count(old) if old else len(text) + 1
        paid.produce(len(text) + count * len(new))
    return args


def _check_format(template: str, values: Iterable[Any]) -> None:
    if _WIDE_FORMAT.search(template):
        raise BudgetExceeded("it formats to a width of thousands")
    values = list(values)
    budget().print(values)
    budget().produce(template.count("{") * max(map(_length, values), default=0))
    _check_arguments(values)
    for value in values:
        if isinstance(value, tuple | list):
            _check_arguments(value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _is_small(value: Any, bits: int) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= bits)
