"""Decoders: which rows a stream runs next, and which outputs become tokens.

A decoder is stateless towards the engine: what it must remember lives in the progress object that
`begin` makes, which forks with the stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vivace.registry import Technique
from vivace.types import Demand

__all__ = ["Decoder", "Progress", "Rows"]


@dataclass(slots=True)
class Progress:
    """A stream's tokens: `token_ids[:num_computed]` have their keys and values in the cache."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to run for one stream: `sampled` are the row offsets whose logits choose tokens."""

    token_ids: Sequence[int]
    positions: Sequence[int]
    sampled: Sequence[int]


class Decoder(Technique):
    @abstractmethod
    def begin(self, token_ids: Sequence[int], num_prompt_tokens: int) -> Progress: ...

    @abstractmethod
    def demand(self, progress: Progress) -> Demand: ...

    @abstractmethod
    def rows(self, progress: Progress, num_rows: int) -> Rows: ...

    @abstractmethod
    def accept(self, progress: Progress, rows: Rows, drawn: Sequence[int]) -> tuple[int, list[int]]:
        """How many of the rows' cache writes to keep, and the new tokens of the stream.

        `drawn` are the tokens that the sampler drew for `rows.sampled`, in order. The engine
        appends the new tokens and advances `num_computed`.
        """

    @abstractmethod
    def fork(self, progress: Progress) -> Progress: ...
