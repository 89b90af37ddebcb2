"""Text out of tokens: what might be the start of a stop string is held back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Detokenizer", "StopText"]


class Detokenizer(Protocol):
    """Turns the tokens of one stream into text, piece by piece."""

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character's bytes are incomplete."""
        ...

    def finish(self) -> str:
        """What is left at the end: incomplete bytes as U+FFFD."""
        ...


class StopText:
    """A stream's text up to the first stop string.

    The stop string that is complete first wins, and of two that end together the longer: so the
    result does not depend on where tokens are cut.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], keeps_stop: bool) -> None:
        self.detokenizer = detokenizer
        self.keeps_stop = keeps_stop
        self.is_stopped = False
        self._stops = sorted(set(stops))
        self._held = ""

    def add(self, token_id: int, may_stop: bool = True) -> str:
        """Text that is now certain. Sets `is_stopped` when a stop string is complete.

        Tokens that may not stop come first: nothing is held back of them.
        """
        text = self._held + self.detokenizer.add(token_id)
        return self._cut(text) if may_stop else text

    def finish(self) -> str:
        """The rest of the text, when the stream ends for another reason."""
        if self.is_stopped:
            return ""
        text = self._cut(self._held + self.detokenizer.finish())
        text, self._held = text + self._held, ""
        return text

    def _cut(self, text: str) -> str:
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            end, start = min(found)
            return text[: end if self.keeps_stop else start]
        keep = next((at for at in range(len(text)) if self._may_begin(text[at:])), len(text))
        self._held = text[keep:]
        return text[:keep]

    def _may_begin(self, text: str) -> bool:
        """Whether a stop string begins with `text`."""
        place = bisect_left(self._stops, text)
        return place < len(self._stops) and self._stops[place].startswith(text)
