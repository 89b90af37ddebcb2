"""A checkpoint's config as typed fields: every wrong value is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vivace.errors import BadFile

__all__ = ["REQUIRED", "Config", "show"]

REQUIRED: Any = object()  # the default of a field that must be there
_LARGEST = 2**31 - 1


def show(value: object) -> str:
    """A value as it may stand in a one-line message."""
    text = repr(value).replace("\n", " ")  # arrays have lines
    return text if len(text) <= 60 else text[:57] + "..."


class Config:
    """Fields of a JSON object; `null` counts as absent.

    Args:
        values: the parsed object.
        source: what to call it in messages, such as `config.json`.
    Attributes:
        names_read: the fields that were asked for so far.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source
        self.names_read: set[str] = set()

    def has(self, name: str) -> bool:
        self.names_read.add(name)
        return self.values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is there as `null`, where that means more than its absence."""
        return not self.has(name) and name in self.values

    def bad(self, name: str, wanted: str) -> BadFile:
        """The error for a field: what it is and what was expected."""
        value = self.values.get(name)
        is_there = f"is {show(value)}" if name in self.values else "is missing"
        return BadFile(f"{self.source}: field '{name}' {is_there}: expected {wanted}")

    def _value(self, name: str, default: Any, wanted: str) -> Any:
        self.names_read.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.bad(name, wanted)
        return default

    def integer(
        self, name: str, default: Any = REQUIRED, low: int = 1, high: int = _LARGEST
    ) -> Any:
        wanted = f"a whole number from {low} to {high}"
        value = self._value(name, default, wanted)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some tools write 4096.0
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, wanted)
        return value

    def number(
        self, name: str, default: Any = REQUIRED, low: float = 0.0, high: float = 1e30
    ) -> Any:
        """A finite number above `low` and at most `high`."""
        wanted = f"a number above {low:g} and at most {high:g}"
        value = self._value(name, default, wanted)
        if value is default:
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(_as_float(value)) or not low < value <= high:
            raise self.bad(name, wanted)
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        wanted = f"a list of {count} numbers above 0"
        value = self._value(name, REQUIRED, wanted)
        if not isinstance(value, list) or len(value) != count:
            raise self.bad(name, wanted)
        items = Config({name: None}, self.source)
        for item in value:
            items.values = {name: item}
            items.number(name)
        return tuple(float(item) for item in value)

    def integers(self, name: str, low: int = 0) -> tuple[int, ...] | None:
        """A list of whole numbers from `low`, or None where there is none."""
        wanted = f"a list of whole numbers from {low}"
        value = self._value(name, None, wanted)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.bad(name, wanted)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= _LARGEST:
                raise self.bad(name, wanted)
        return tuple(value)

    def boolean(self, name: str, default: Any = False) -> Any:
        value = self._value(name, default, "true or false")
        if value is not default and not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._value(name, default, "a string")
        if value is not default and not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def section(self, name: str) -> Config | None:
        """A nested object, or None where there is none."""
        value = self._value(name, None, "an object")
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.bad(name, "an object")
        return Config(value, f"{self.source}: {name}")

    def required_section(self, name: str) -> Config:
        """A nested object that must be there."""
        section = self.section(name)
        if section is None:
            raise self.bad(name, "an object")
        return section

    def sections(self, name: str, count: int) -> tuple[Config, ...]:
        """A list of `count` nested objects."""
        wanted = f"a list of {count} objects"
        value = self._value(name, REQUIRED, wanted)
        is_list = isinstance(value, list) and len(value) == count
        if not is_list or not all(isinstance(item, Mapping) for item in value):
            raise self.bad(name, wanted)
        return tuple(
            Config(item, f"{self.source}: {name}[{index}]") for index, item in enumerate(value)
        )

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; empty where there is none."""
        value = self._value(name, (), "a token id or a list of them")
        ids = value if isinstance(value, list | tuple) else [value]
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= _LARGEST:
                raise self.bad(name, "a token id or a list of them")
        return tuple(ids)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
