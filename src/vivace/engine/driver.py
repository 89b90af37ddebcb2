"""Stepping an engine from asyncio: a step runs in a thread while every coroutine waits."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING

from vivace.engine.request import Event, Request, Sequence

if TYPE_CHECKING:
    from vivace.engine.engine import Engine

__all__ = ["Driver", "Subscription"]


class Subscription:
    """The events of one request, as they come."""

    def __init__(self, driver: Driver, request: Request, sequence: Sequence | None) -> None:
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._is_over = False
        self.request_id = driver.engine.add(request, self._post, sequence)
        driver.wake()

    def _post(self, event: Event) -> None:
        self._is_over = event.is_last
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(self) -> AsyncGenerator[Event]:
        """Ends after the request's last event; leaving early cancels the request."""
        try:
            is_last = False
            while not is_last:
                event = await self._queue.get()
                is_last = event.is_last
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request, from any thread; it has a last event all the same.

        Nothing happens if it has ended.
        """
        self._driver.engine.cancel(self.request_id)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._driver.wake)

    async def end(self) -> None:
        """Cancel the request and see it out of the engine."""
        self._driver.engine.cancel(self.request_id)
        while not self._is_over:  # the driver's task may be cancelled too
            await _step(self._driver.engine)


class Driver:
    """One task per event loop, alive while the engine has work."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tasks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]]
        self._tasks = weakref.WeakKeyDictionary()

    def submit(self, request: Request, sequence: Sequence | None = None) -> Subscription:
        """Queue a request from a coroutine. Raises what `Engine.add` raises."""
        return Subscription(self, request, sequence)

    def wake(self) -> None:
        """See that a task steps the engine, if there is work."""
        loop = asyncio.get_running_loop()
        task = self._tasks.get(loop)
        if self.engine.has_work and (task is None or task.done()):
            self._tasks[loop] = loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.engine.has_work:
                # Let whoever has just got a result ask for more: their rows then share the step.
                for _ in range(4):
                    await asyncio.sleep(0)
                await _step(self.engine)
        finally:
            self._tasks.pop(asyncio.get_running_loop(), None)


async def _step(engine: Engine) -> None:
    def step() -> None:
        with suppress(Exception):  # every request has been told
            engine.step()

    await asyncio.to_thread(step)
