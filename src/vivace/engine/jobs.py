"""The requests inside the engine: how many there may be, and what each is told."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from vivace.engine.acceptance import add_result
from vivace.engine.request import Event, FinishReason, Job, Stream, StreamState
from vivace.engine.scheduler import SchedulerCore
from vivace.errors import QueueFull, VivaceError

__all__ = ["Jobs"]


class Jobs:
    """Bounds the queue, and sees that every choice of every request ends exactly once.

    `enter` and `cancel` may be called from any thread, the rest from the one that steps.
    """

    def __init__(self, scheduler: SchedulerCore, clock: Callable[[], float]) -> None:
        self.open: dict[int, Job] = {}
        self.cancelled: set[int] = set()  # of those inside
        self._scheduler = scheduler
        self._clock = clock
        self._ids = itertools.count()
        self._lock = threading.RLock()  # garbage collection may cancel in the midst of a call
        self._num_tokens: dict[int, int] = {}  # prompt tokens by request inside
        self._events: deque[tuple[Job, Event]] = deque()  # of this step
        self._by_stream: dict[int, Event] = {}

    def __len__(self) -> int:
        return len(self._num_tokens)

    def ids(self) -> list[int]:
        """Requests inside, queued ones with them."""
        with self._lock:
            return list(self._num_tokens)

    def enter(self, num_tokens: int) -> int:
        """An id for one more request. Raises `QueueFull`."""
        limits = self._scheduler.limits
        with self._lock:
            count, total = len(self._num_tokens), sum(self._num_tokens.values())
            if count >= limits.max_queued_requests or total + num_tokens > limits.max_queued_tokens:
                raise QueueFull(count, total)
            job_id = next(self._ids)
            self._num_tokens[job_id] = num_tokens
            return job_id

    def leave(self, job_id: int) -> None:
        with self._lock:
            del self._num_tokens[job_id]
            self.cancelled.discard(job_id)

    def cancel(self, job_id: int) -> bool:
        """Mark a request as cancelled; `False` if it has ended."""
        with self._lock:
            is_inside = job_id in self._num_tokens
            if is_inside:
                self.cancelled.add(job_id)
            return is_inside

    def event(self, stream: Stream) -> Event:
        """This step's event of a stream."""
        event = self._by_stream.get(stream.id)
        if event is None:
            event = self._by_stream[stream.id] = Event(stream.job.id, stream.index)
            self._events.append((stream.job, event))
        return event

    def finish(self, stream: Stream, reason: FinishReason, error: Exception | None = None) -> None:
        """The last event of a choice, and of those that had not split off from it yet."""
        job, event = stream.job, self.event(stream)
        self._scheduler.finish(stream)
        if stream.text is not None:
            event.text += stream.text.finish()
        add_result(stream, event)
        job.timing.finished = self._clock()
        others = [Event(job.id, index) for index in range(1, stream.seats)]
        self._events += [(job, other) for other in others]
        for ended in (event, *others):
            ended.finish_reason, ended.error = reason, error
            ended.timing = replace(job.timing)
        job.num_open -= stream.seats
        if job.num_open == 0:
            (event, *others)[-1].is_last = True
            self.open.pop(job.id)
            self.leave(job.id)

    def end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> None:
        for stream in job.streams:
            if stream.state is not StreamState.FINISHED:
                self.finish(stream, reason, error)

    def end_all(self, error: BaseException) -> None:
        """End every request that has begun, and let go of all that is in the cache."""
        told = error if isinstance(error, Exception) else VivaceError("the step was interrupted")
        for job in list(self.open.values()):
            self.end(job, FinishReason.ERROR, told)
        for sequence in list(self._scheduler.idle):
            self._scheduler.release(sequence)

    def deliver(self) -> list[Event]:
        """Hand this step's events to the listeners, and return them.

        When a listener raises, the others are told first.
        """
        self._by_stream.clear()
        events, failure = [], None
        while self._events:
            job, event = self._events.popleft()
            events.append(event)
            try:
                if job.listener is not None:
                    job.listener(event)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return events
