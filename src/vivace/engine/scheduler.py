"""The scheduler core: a technique says who should run, this makes it so with real blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vivace.engine.block_pool import BlockPool, BlockTable, Copy
from vivace.engine.request import Job, Sequence, Stream, StreamState
from vivace.errors import VivaceError
from vivace.techniques.decoders.base import Decoder
from vivace.techniques.schedulers.base import Budget, Scheduler, StreamView, WaitingView
from vivace.types import Demand, Signals

__all__ = ["Limits", "Scheduled", "SchedulerCore", "Stats"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the queue may hold."""

    max_streams: int = 64  # running at a time
    max_rows: int = 1024  # rows in a step
    max_scored_rows: int = 64  # prompt rows in a step whose logits are wanted
    max_queued_requests: int = 1024  # requests inside the engine
    max_queued_tokens: int = 2**24  # their prompt tokens

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise VivaceError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.max_rows <= self.max_streams:
            raise VivaceError(
                f"max_rows={self.max_rows} leaves no row for a prompt beside "
                f"max_streams={self.max_streams} streams: raise max_rows or lower max_streams"
            )


@dataclass(slots=True)
class Stats:
    """Counters since the engine was made."""

    num_forwards: int = 0
    num_rows: int = 0
    num_prompt_rows: int = 0  # of those, rows of prompts, computed again after preemption or not
    num_generated_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_failed_steps: int = 0


@dataclass(slots=True)
class Scheduled:
    """A stream's part of a step: entries [num_computed, num_computed + num_rows) are writable."""

    stream: Stream
    num_rows: int
    copies: list[Copy]


class SchedulerCore:
    """Admission, rows, blocks and preemption. Pure: time is the number of steps.

    Blocks belong to running streams and, beside them, to `idle` sequences: branches between two
    requests. Those give way first, the longest idle one at the head.
    """

    def __init__(
        self,
        technique: Scheduler,
        decoder: Decoder,
        pool: BlockPool,
        limits: Limits,
        stats: Stats,
    ) -> None:
        self.technique = technique
        self.decoder = decoder
        self.pool = pool
        self.limits = limits
        self.stats = stats
        self.waiting: dict[int, Stream] = {}
        self.running: dict[int, Stream] = {}
        self.idle: dict[Sequence, None] = {}
        self.num_steps = 0

    # -------------------------------------------------------- a stream's life

    def enqueue(self, stream: Stream) -> None:
        self.waiting[stream.id] = stream

    def join(self, stream: Stream) -> None:
        """A stream split off from a running one, whose seat it had."""
        stream.state = StreamState.RUNNING
        self.running[stream.id] = stream

    def finish(self, stream: Stream) -> None:
        """Take a stream out; its sequence goes, or stays idle where a branch keeps it."""
        self.waiting.pop(stream.id, None)
        self.running.pop(stream.id, None)
        stream.state = StreamState.FINISHED
        if not stream.sequence.is_kept:
            self.release(stream.sequence)
        elif stream.sequence.table is not None:
            self.idle[stream.sequence] = None

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back; its tokens stay, to be computed again."""
        self.idle.pop(sequence, None)
        if sequence.table is not None:
            self.pool.release(sequence.table)
            sequence.table = None
        sequence.progress.num_computed = 0

    def forget(self, sequence: Sequence) -> None:
        """Nobody will use a sequence again; a request that runs on it still ends."""
        sequence.is_kept = False
        if sequence in self.idle:
            self.release(sequence)

    def preempt(self, stream: Stream) -> None:
        self.release(stream.sequence)
        del self.running[stream.id]
        stream.state = StreamState.PREEMPTED
        self.waiting[stream.id] = stream
        self.stats.num_preemptions += 1

    # -------------------------------------------------------- a step

    def schedule(self) -> list[Scheduled]:
        """Who runs in this step, with blocks to write to."""
        self.num_steps += 1
        self._admit()
        views = self._offers()
        if not views:
            return []
        scheduled: dict[int, Scheduled] = {}
        for stream_id, num_rows in self._ask(views).items():
            stream = self.running.get(stream_id)
            if stream is not None and self._make_room(stream, num_rows, scheduled):
                start = stream.progress.num_computed
                copies = self.pool.reserve(_table(stream), start, start + num_rows)
                scheduled[stream_id] = Scheduled(stream, num_rows, copies)
        return list(scheduled.values())

    def _admit(self) -> None:
        seats = self.limits.max_streams - sum(s.seats for s in self.running.values())
        if not self.waiting or seats < 1:
            return
        views = [
            WaitingView(
                stream.id,
                stream.job.id,
                self._age(stream.job),
                len(stream.progress.token_ids),
                stream.state is StreamState.PREEMPTED,
                Signals(priority=stream.job.request.priority),
            )
            for stream in self.waiting.values()
        ]
        for stream_id in self.technique.admit(views, len(self.running), self._budget()):
            stream = self.waiting.get(stream_id)
            if stream is None:
                raise self._wrong(f"admitted stream {stream_id}, which does not wait")
            seats -= stream.seats
            if seats < 0 or not self._start(stream):
                return

    def _start(self, stream: Stream) -> bool:
        """Admit a stream if all its known tokens fit beside what running ones still need."""
        sequence = stream.sequence
        self.idle.pop(sequence, None)
        num_hits = 0 if sequence.table is not None else self._open(stream)
        while not self._fits(stream):
            if not self.idle:
                self.release(sequence)
                return False
            self.release(next(iter(self.idle)))
        self.stats.num_prefix_hit_tokens += num_hits
        del self.waiting[stream.id]
        stream.state = StreamState.RUNNING
        self.running[stream.id] = stream
        return True

    def _open(self, stream: Stream) -> int:
        """Begin a table with the longest known prefix; its length in tokens."""
        sequence, size = stream.sequence, self.pool.block_size
        starts = range(0, stream.first_needed_row - size + 1, size)
        contents = (sequence.content(start, start + size) for start in starts)
        sequence.table = self.pool.open(sequence.identity, contents)
        sequence.progress.num_computed = sequence.table.num_registered * size
        return sequence.progress.num_computed

    def _fits(self, stream: Stream) -> bool:
        needs = [self._pending_blocks(s) for s in (stream, *self.running.values())]
        return all(
            sum(needed) <= free for *needed, free in zip(*needs, self.pool.num_free, strict=True)
        )

    def _pending_blocks(self, stream: Stream) -> list[int]:
        progress = stream.progress
        return self.pool.blocks_needed(
            _table(stream), progress.num_computed, len(progress.token_ids)
        )

    def _offers(self) -> list[StreamView]:
        """Views of the streams that may run; after a failed step its streams go one by one."""
        streams: Iterable[Stream] = self.running.values()
        suspects = [stream for stream in streams if stream.is_suspect]
        views, scored_left = [], self.limits.max_scored_rows
        for stream in suspects[:1] or streams:
            demand = self.decoder.demand(stream.progress)
            if stream.target is not None:
                left = stream.target - stream.progress.num_computed
                demand = replace(demand, max_rows=min(demand.max_rows, left))
            if stream.collects_logprobs and stream.collects:
                num_before = max(0, stream.num_collected - stream.progress.num_computed)
                num_rows = min(demand.max_rows, num_before + scored_left)
                if not num_rows:
                    continue
                demand = replace(demand, max_rows=num_rows)
                scored_left -= max(0, num_rows - num_before)
            views.append(self._view(stream, demand))
        return views

    def _view(self, stream: Stream, demand: Demand) -> StreamView:
        progress = stream.progress
        return StreamView(
            stream.id,
            stream.job.id,
            self._age(stream.job),
            demand,
            progress.num_pending > 1 or stream.num_generated == 0,
            progress.num_computed,
            sum(len(blocks) for blocks in _table(stream).blocks),
            Signals(priority=stream.job.request.priority),
        )

    def _ask(self, views: list[StreamView]) -> dict[int, int]:
        """The technique's answer, checked."""
        budget = self._budget()
        granted = dict(self.technique.schedule(views, budget))
        demands = {view.stream_id: view.demand for view in views}
        for stream_id, num_rows in granted.items():
            demand = demands.get(stream_id)
            if demand is None:
                raise self._wrong(f"gave rows to stream {stream_id}, which was not offered")
            is_whole = num_rows == demand.max_rows
            if not (
                demand.min_rows <= num_rows <= demand.max_rows
                and (is_whole or num_rows % demand.alignment == 0)
                and (is_whole or not demand.is_atomic)
            ):
                raise self._wrong(f"gave {num_rows} rows to a stream that demands {demand}")
        if not granted:
            raise self._wrong(f"gave no rows to any of {len(views)} streams")
        if sum(granted.values()) > budget.max_rows or len(granted) > budget.max_streams:
            raise self._wrong(f"gave {granted}, more than {budget}")
        return granted

    def _make_room(self, stream: Stream, num_rows: int, scheduled: dict[int, Scheduled]) -> bool:
        """Preempt until the stream can write its rows; `False` if it had to go itself."""
        start = stream.progress.num_computed
        stop = start + num_rows
        while not self.pool.can_reserve(_table(stream), start, stop):
            if self.idle:
                self.release(next(iter(self.idle)))
                continue
            victim = self._victim(stream, start, stop)
            scheduled.pop(victim.id, None)
            self.preempt(victim)
            if victim is stream:
                return False
        return True

    def _victim(self, stream: Stream, start: int, stop: int) -> Stream:
        views = [self._view(s, self.decoder.demand(s.progress)) for s in self.running.values()]
        need = sum(self.pool.blocks_needed(_table(stream), start, stop))
        for stream_id in self.technique.preempt(views, need):
            if stream_id not in self.running:
                raise self._wrong(f"preempted stream {stream_id}, which does not run")
            return self.running[stream_id]
        raise self._wrong("named nobody to preempt")

    def _budget(self) -> Budget:
        return Budget(self.limits.max_rows, self.limits.max_streams, min(self.pool.num_free))

    def _age(self, job: Job) -> int:
        return self.num_steps - job.arrived_at_step

    def _wrong(self, what: str) -> VivaceError:
        return VivaceError(f"the scheduler '{self.technique.name}' {what}")


def _table(stream: Stream) -> BlockTable:
    table = stream.sequence.table
    assert table is not None, "a running stream has a table"
    return table
