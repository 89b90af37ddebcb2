"""Decodes first, then prefill chunks in what is left of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vivace.errors import InvalidOption
from vivace.registry import TechniqueInfo
from vivace.techniques.schedulers.base import Budget, Scheduler, StreamView, WaitingView

INFO = TechniqueInfo(summary="decodes piggyback on prefill chunks", papers=("P178",))


@dataclass(frozen=True)
class Config:
    chunk_size: int = 512  # most prefill rows in a step
    patience: int = 2000  # steps after which a stream's priority no longer counts against it

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise InvalidOption(f"chunk_size is {self.chunk_size}: expected at least 1 row")
        if self.patience < 0:
            raise InvalidOption(f"patience is {self.patience}: expected 0 steps or more")


class Chunked(Scheduler):
    """Every decoding stream runs in every step; one budget of prefill rows fills it up.

    Streams rank by priority, then by arrival; those older than `patience` rank first, the oldest
    at the top, so nobody starves.

    Paper: Agrawal et al. 2023, arXiv 2308.16369, sections 4.2 and 4.3.
    Differs: a step may mix chunks of several prompts, oldest first, and a chunk shrinks to what
    the row budget leaves.
    Cost: O(streams log streams) per step.
    Args:
        chunk_size: prefill rows per step, at least 1.
        patience: steps, at least 0.
    """

    config: Config

    def _rank(self, view: WaitingView | StreamView) -> tuple[bool, int, int, int]:
        """Lower runs earlier and is preempted later."""
        is_patient = view.age_steps <= self.config.patience
        priority = view.signals.priority if is_patient else 0
        return is_patient, -priority, view.arrival, view.stream_id

    def admit(self, waiting: Sequence[WaitingView], num_running: int, budget: Budget) -> list[int]:
        return [view.stream_id for view in sorted(waiting, key=self._rank)]

    def schedule(self, views: Sequence[StreamView], budget: Budget) -> Mapping[int, int]:
        rows: dict[int, int] = {}
        left = budget.max_rows
        prefill_left = self.config.chunk_size
        for view in sorted(views, key=lambda v: (v.is_prefill, self._rank(v))):
            demand = view.demand
            most = min(left, prefill_left) if view.is_prefill else left
            count = min(demand.max_rows, most)
            if count < demand.max_rows:
                count -= count % demand.alignment
            if count < demand.min_rows or (demand.is_atomic and count < demand.max_rows):
                continue
            if len(rows) == budget.max_streams:
                break
            rows[view.stream_id] = count
            left -= count
            if view.is_prefill:
                prefill_left -= count
        return rows

    def preempt(self, views: Sequence[StreamView], need_blocks: int) -> list[int]:
        return [v.stream_id for v in sorted(views, key=self._rank, reverse=True)]
