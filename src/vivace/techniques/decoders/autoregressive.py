"""One new token per step: run what is pending, draw from the last row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vivace.registry import TechniqueInfo
from vivace.techniques.decoders.base import Decoder, Progress, Rows
from vivace.types import Demand

INFO = TechniqueInfo(summary="one token per step")


@dataclass(frozen=True)
class Config:
    """No options."""


class Autoregressive(Decoder):
    """Runs the pending tokens, in chunks if the scheduler says so, then draws the next one.

    Cost: one forward per token.
    """

    def begin(self, token_ids: Sequence[int], num_prompt_tokens: int) -> Progress:
        return Progress(list(token_ids), num_prompt_tokens)

    def demand(self, progress: Progress) -> Demand:
        return Demand(min_rows=1, max_rows=progress.num_pending)

    def rows(self, progress: Progress, num_rows: int) -> Rows:
        start = progress.num_computed
        stop = start + num_rows
        is_last = stop == len(progress.token_ids)
        return Rows(
            progress.token_ids[start:stop], range(start, stop), [num_rows - 1] if is_last else []
        )

    def accept(self, progress: Progress, rows: Rows, drawn: Sequence[int]) -> tuple[int, list[int]]:
        return len(rows.token_ids), list(drawn)

    def fork(self, progress: Progress) -> Progress:
        return Progress(list(progress.token_ids), progress.num_prompt_tokens, progress.num_computed)
