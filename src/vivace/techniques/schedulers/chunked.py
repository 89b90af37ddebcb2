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

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise InvalidOption(f"chunk_size is {self.chunk_size}: expected at least 1 row")


class Chunked(Scheduler):
    """Every decoding stream runs in every step; one budget of prefill rows fills it up.

    Paper: Agrawal et al. 2023, arXiv 2308.16369, sections 4.2 and 4.3.
    Differs: a step may mix chunks of several prompts, oldest first, and a chunk shrinks to what
    the row budget leaves.
    Cost: O(streams) per step.
    Args:
        chunk_size: prefill rows per step, at least 1.
    """

    config: Config

    def admit(self, waiting: Sequence[WaitingView], num_running: int, budget: Budget) -> list[int]:
        ordered = sorted(waiting, key=lambda w: (-w.signals.priority, w.arrival))
        return [w.request_id for w in ordered[: max(0, budget.max_streams - num_running)]]

    def schedule(self, views: Sequence[StreamView], budget: Budget) -> Mapping[int, int]:
        rows: dict[int, int] = {}
        left = budget.max_rows
        prefill_left = self.config.chunk_size
        # Decodes before prefills, then the order of arrival.
        for view in sorted(views, key=lambda v: (v.is_prefill, v.arrival, v.stream_id)):
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
        ordered = sorted(views, key=lambda v: (v.signals.priority, -v.arrival))
        return list(dict.fromkeys(v.request_id for v in ordered))
