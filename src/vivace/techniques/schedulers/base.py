"""Schedulers: which streams run in a step, and with how many rows each.

A scheduler is pure policy. It sees views, never requests or blocks; the scheduler core
(`vivace.engine.scheduler`) checks its answer against demands, budget and blocks. The unit is the
stream: one choice of a request, or one branch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vivace.registry import Technique
from vivace.types import Demand, Signals

__all__ = ["Budget", "Scheduler", "StreamView", "WaitingView"]


@dataclass(frozen=True, slots=True)
class WaitingView:
    """A stream that waits for admission; `arrival` is a counter, lower is earlier."""

    stream_id: int
    arrival: int
    age_steps: int  # since it arrived
    num_tokens: int  # known so far, prompt and output
    is_preempted: bool
    signals: Signals


@dataclass(frozen=True, slots=True)
class StreamView:
    """A running stream: what it wants next and how far it is."""

    stream_id: int
    arrival: int
    age_steps: int
    demand: Demand
    is_prefill: bool  # rows remain before the first new token
    num_computed_tokens: int
    num_blocks: int
    signals: Signals


@dataclass(frozen=True, slots=True)
class Budget:
    max_rows: int  # rows in a step
    max_streams: int  # streams in a step
    free_blocks: int  # in the scarcest layer group, counting what eviction of cached ones frees


class Scheduler(Technique):
    @abstractmethod
    def admit(self, waiting: Sequence[WaitingView], num_running: int, budget: Budget) -> list[int]:
        """Stream ids to try to admit, in order; the core stops at the first that does not fit."""

    @abstractmethod
    def schedule(self, views: Sequence[StreamView], budget: Budget) -> Mapping[int, int]:
        """Rows per stream id, most urgent first; absent means none.

        The sum is at most `budget.max_rows`, demands are respected, and some stream runs.
        """

    @abstractmethod
    def preempt(self, views: Sequence[StreamView], need_blocks: int) -> list[int]:
        """Stream ids to preempt, in order, until `need_blocks` are free.

        For progress the same stream must stay last from step to step until it ends.
        """

    def on_step(self, num_rows: int, seconds: float) -> None:
        """Told after each step, for schedulers that learn costs."""
