"""Keeps what users write from becoming control tokens when a template joins texts.

A mark, a character that the conversation does not hold, is put inside every special token that is
spelled in a user's string, and at the ends of strings that could become part of one when joined
with their neighbours. Templates treat it as any letter. Where a mark survives in the rendered text,
special tokens are looked for by `split`, and the mark is taken out of the text between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken

from vivace.errors import InvalidRequest

__all__ = ["ControlTokens"]

# Noncharacters: Unicode keeps them for uses like this one.
_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
# Fields that a template compares with fixed words.
_WORDS = frozenset({"role", "type"})


class ControlTokens:
    """The special tokens of one tokenizer."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        ordered = sorted(tokens, key=lambda token: -len(token.content))
        self._contents = [token.content for token in ordered]
        self._spelled = re.compile("|".join(map(re.escape, self._contents)) or r"(?!)")
        parts = [
            (r"\s*" if token.lstrip else "")
            + f"(?P<t{index}>{re.escape(token.content)})"
            + (r"\s*" if token.rstrip else "")
            for index, token in enumerate(ordered)
        ]
        self._splitter = re.compile("|".join(parts) or r"(?!)")
        self._longest = max(map(len, self._contents), default=0)
        self._starts = {item[:end] for item in self._contents for end in range(1, len(item))}
        self._ends = {item[begin:] for item in self._contents for begin in range(1, len(item))}

    def shield(self, value: Any, mark: str) -> Any:
        """A conversation with marks in all of its strings but the roles and types."""
        if isinstance(value, str):
            return self._shield_text(value, mark)
        if isinstance(value, Mapping):
            return {
                self.shield(key, mark): item if _is_word(key, item) else self.shield(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.shield(item, mark) for item in value]
        return value

    def _shield_text(self, text: str, mark: str) -> str:
        lengths = range(1, min(self._longest, len(text) + 1))
        may_begin = any(text[-length:] in self._starts for length in lengths)
        may_end = any(text[:length] in self._ends for length in lengths)
        is_inside = 0 < len(text) < self._longest and any(text in item for item in self._contents)
        text = self._spelled.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        before = mark if may_end or is_inside else ""
        return before + text + (mark if may_begin or is_inside else "")

    def split(self, text: str, mark: str) -> Iterator[tuple[str, bool]]:
        """Pieces of a rendered text without marks, and whether each is a special token."""
        at = 0
        for found in self._splitter.finditer(text):
            yield text[at : found.start()].replace(mark, ""), False
            assert found.lastgroup is not None
            yield found[found.lastgroup], True
            at = found.end()
        yield text[at:].replace(mark, ""), False


def unused_mark(value: Any) -> str:
    """A mark that no string of a conversation holds. Raises `InvalidRequest` if there is none."""
    for mark in _MARKS:
        if not _contains(value, mark):
            return mark
    raise InvalidRequest("messages hold every character from U+FDD0 to U+FDEF: leave one out")


def _is_word(key: Any, value: Any) -> bool:
    return key in _WORDS and isinstance(value, str) and value.isidentifier()


def _contains(value: Any, mark: str) -> bool:
    if isinstance(value, str):
        return mark in value
    if isinstance(value, Mapping):
        return any(_contains(key, mark) or _contains(item, mark) for key, item in value.items())
    return isinstance(value, list | tuple) and any(_contains(item, mark) for item in value)
