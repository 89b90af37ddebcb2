"""What rendering a template may cost: turns and calls, text made, and values read through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2

__all__ = [
    "BudgetExceeded",
    "budget",
    "check_integer",
    "count_characters",
    "print_text",
    "spending",
]

MAX_STEPS = 1_000_000
MAX_INTEGER_BITS = 256
_MAX_WORK = 2_000_000  # for a conversation of no length
_NO_INPUT = 2**20
# Characters of a string that are read in the time of one item of a list.
_CHARACTERS_PER_ITEM = 16


class BudgetExceeded(jinja2.TemplateError):
    """A template does more than any conversation needs."""


class Budget:
    """What is left, for a conversation of so many characters."""

    def __init__(self, num_characters: int) -> None:
        self._steps = MAX_STEPS
        self._characters = 4 * _NO_INPUT + 64 * num_characters
        self._work = _MAX_WORK + 8 * num_characters

    def step(self, count: int = 1) -> None:
        """Pay for turns of loops and for calls."""
        self._steps -= count
        if self._steps < 0:
            raise BudgetExceeded(f"it takes more than {MAX_STEPS} steps")

    def produce(self, num_characters: int) -> None:
        """Pay for text, or for items of a list."""
        self._characters -= num_characters
        if self._characters < 0:
            raise BudgetExceeded("it makes far more text than it was given")

    def work(self, num_items: int) -> None:
        """Pay for items that one operation looks at."""
        self._work -= num_items
        if self._work < 0:
            raise BudgetExceeded("it reads far more than it was given")

    def read(self, *values: Any) -> int:
        """Pay for reading values to their ends, as printing and comparing do; returns the price.

        Nested values are counted as often as they occur, which may be exponentially often.
        """
        total = 0
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            price = 1
            if isinstance(value, str):
                price += len(value) // _CHARACTERS_PER_ITEM
            elif isinstance(value, range):
                price += len(value)
            elif isinstance(value, Mapping):
                waiting += value.keys()
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value
            self.work(price)
            total += price
            if len(waiting) > self._work:
                self.work(len(waiting))
        return total

    def glance(self, value: Any) -> int:
        """Pay for looking at each item of a value once; returns the price."""
        price = 1
        if isinstance(value, str):
            price += len(value) // _CHARACTERS_PER_ITEM
        elif isinstance(value, list | tuple | dict | range):
            price += len(value)
        self.work(price)
        return price

    def print(self, value: Any) -> None:
        """Pay for the text of a value, before it is made."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            self.work(1)
            if isinstance(value, str):
                self.produce(len(value) + 2)
            elif isinstance(value, Mapping):
                self.produce(4 * len(value) + 2)
                waiting += value.keys()
                waiting += value.values()
            elif isinstance(value, list | tuple):
                self.produce(2 * len(value) + 2)
                waiting += value
            elif isinstance(value, int):
                self.produce(value.bit_length() // 3 + 2)
            else:
                self.produce(32)

    def take(self, items: Iterable[Any]) -> list[Any]:
        """All items of an iterable, paid for one by one."""
        return list(self._paid(items))

    def _paid(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.work(1)
            yield item

    def pay_result(self, result: Any) -> None:
        """Pay for what an operation has made; whole numbers must stay small."""
        if isinstance(result, str | list | tuple | dict):
            self.produce(len(result))
        check_integer(result)


def check_integer(value: Any) -> None:
    """Raises `BudgetExceeded` for a whole number that takes long to calculate with."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise BudgetExceeded("it makes a number of too many digits")


_current: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def budget() -> Budget:
    """The budget of the template that is being compiled or rendered."""
    found = _current.get()
    assert found is not None, "templates are compiled and rendered inside `spending`"
    return found


@contextmanager
def spending(num_characters: int = 0) -> Iterator[None]:
    """Give what happens inside a budget, for a conversation of so many characters."""
    token = _current.set(Budget(num_characters))
    try:
        yield
    finally:
        _current.reset(token)


def print_text(value: Any) -> str:
    """The text of a value, paid for."""
    budget().print(value)
    return str(value)


def count_characters(value: Any) -> int:
    """The size of a conversation: plain data, never nested in itself."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(count_characters(key) + count_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(count_characters, value))
    return 8
