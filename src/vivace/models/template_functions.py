"""What chat templates expect to find beside jinja's own: functions, a filter and a tag."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.exceptions import SecurityError

from vivace.models.sandbox_budget import BudgetExceeded, print_text

__all__ = ["GenerationTag", "Namespace", "raise_exception", "strftime_now", "to_json"]


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration is an instance attribute)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
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


def to_json(
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


def raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(print_text(message))


def strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"\d{3}", pattern):
        raise BudgetExceeded("it formats the time with a long pattern")
    return datetime.now().strftime(pattern)
