"""Branches: sequences that fork, go on and are dropped, on pages they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vivace.engine.admission import check_input
from vivace.engine.driver import Subscription
from vivace.engine.request import Event, FinishReason, Request, Sequence
from vivace.errors import InvalidRequest, VivaceError
from vivace.types import InputSegment, RequestKind, SamplingParams

if TYPE_CHECKING:
    from vivace.engine.engine import Engine

__all__ = ["Branch", "Tree"]


class Tree:
    """What all branches of one prompt have in common: the prompt's cache and a budget."""

    def __init__(self, engine: Engine, request: Request, tokens_left: int | None) -> None:
        self.engine = engine
        self.request = request
        self.tokens_left = tokens_left  # to generate in the whole tree; None: no bound
        self.trunk = engine.sequence(request)
        self.num_forked = 0
        self.num_alive = 0
        self._is_prefilled = False
        self._prefill: asyncio.Future[None] | None = None

    async def prefill(self) -> None:
        """Compute the prompt, but for its last row, once and before any branch goes on."""
        if self._is_prefilled:
            return
        work = self._prefill
        if work is None or work.done() or work.get_loop() is not asyncio.get_running_loop():
            work = self._prefill = asyncio.ensure_future(self._compute())
        await asyncio.shield(work)

    async def _compute(self) -> None:
        num_tokens = len(self.trunk.token_ids)
        if num_tokens > 1:  # the cheapest request that runs all rows but the last
            request = self.score_request(num_tokens - 1)
            await _last_event(self.engine.driver.submit(request, self.trunk))
        self._is_prefilled = True

    def score_request(self, first_scored: int) -> Request:
        return replace(
            self.request,
            inputs=(),
            params=SamplingParams(),
            kind=RequestKind.SCORE,
            first_scored=first_scored,
        )

    def take(self, max_tokens: int | None) -> int | None:
        """Reserve part of the budget; what is not used comes back."""
        if self.tokens_left is None:
            return max_tokens
        granted = self.tokens_left if max_tokens is None else min(max_tokens, self.tokens_left)
        self.tokens_left -= granted
        return granted

    def give_back(self, num_tokens: int) -> None:
        if self.tokens_left is not None:
            self.tokens_left += num_tokens


class Branch:
    """A path through a tree of continuations. Its coroutines run one at a time."""

    def __init__(self, tree: Tree, sequence: Sequence) -> None:
        self.tree = tree
        self.text = ""  # generated on this path since it was forked
        self.finish_reason: FinishReason | None = None  # of the last `extend`
        self._sequence = sequence
        self._running: Subscription | None = None
        self._is_busy = False
        self._is_cancelled = False
        self._is_dropped = False
        tree.num_alive += 1

    @property
    def token_ids(self) -> list[int]:
        """The prompt and everything after it."""
        return list(self._sequence.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self._sequence.token_ids)

    def fork(self) -> Branch:
        """Another branch with the same past; blocks are copied only where they are written."""
        self._check_idle()
        self.tree.num_forked += 1
        sequence = self.tree.engine.fork(self._sequence)
        sequence.random_stream = self.tree.num_forked
        return Branch(self.tree, sequence)

    def append(self, token_ids: Seq[int]) -> None:
        """Put given tokens at the end. Raises `InvalidRequest` if they are no token ids."""
        self._check_idle()
        segment = InputSegment.tokens(token_ids)
        check_input(self.tree.engine, segment)
        self._sequence.token_ids.extend(segment.data.tolist())

    async def extend(
        self,
        until: str | Seq[str] = (),
        max_tokens: int | None = None,
        params: SamplingParams | None = None,
    ) -> str:
        """Generate until a stop string (kept in the text), the end, or a bound.

        `params` replaces the tree's, but for its seed. Raises `InvalidRequest`, and `VivaceError`
        if the request fails.
        """
        self._check_idle()
        own = self.tree.request.params
        params = own if params is None else params
        if params.seed not in (None, own.seed):
            raise InvalidRequest("a tree has one seed: give it to the root")
        if params.prompt_logprobs is not None:
            raise InvalidRequest("a branch gives no prompt_logprobs: use score")
        stops = (until,) if isinstance(until, str) else tuple(until)
        granted = self.tree.take(params.max_tokens if max_tokens is None else max_tokens)
        num_before, text = self.num_tokens, ""
        try:
            if granted == 0:
                self.finish_reason = FinishReason.LENGTH
                return ""
            params = replace(
                params,
                stop=stops or params.stop,
                max_tokens=granted,
                min_tokens=min(params.min_tokens, granted or params.min_tokens),
                include_stop=True,
                n=1,
            )
            request = replace(self.tree.request, inputs=(), params=params)
            async with aclosing(self._run(request)) as events:
                async for event in events:
                    text += event.text
                    self.text += event.text
        finally:
            self.tree.give_back((granted or 0) - (self.num_tokens - num_before))
        return text

    async def score(self, token_ids: Seq[int]) -> np.ndarray:
        """Log-probabilities of tokens if they came next: [len(token_ids)] float32."""
        self._check_idle()
        if len(token_ids) == 0:
            return np.zeros(0, np.float32)
        child, lines = Branch(self.tree, self.tree.engine.fork(self._sequence)), []
        try:
            child.append(token_ids)
            request = self.tree.score_request(self.num_tokens)
            async with aclosing(child._run(request)) as events:
                async for event in events:
                    lines += event.prompt_logprobs or []
        finally:
            child.drop()
        return np.array([line.logprob for line in lines], np.float32)

    def cancel(self) -> None:
        """End what runs on this branch; its coroutine returns what there is by then."""
        self._is_cancelled = True
        running = self._running  # this may be another thread than the coroutine's
        if running is not None:
            running.cancel()

    def drop(self) -> None:
        """Free what the branch holds; it cannot be used afterwards. Forks live on."""
        if self._is_dropped:
            return
        self._is_dropped = True
        self.cancel()
        self.tree.engine.release(self._sequence)
        self.tree.num_alive -= 1
        if self.tree.num_alive == 0:
            self.tree.engine.release(self.tree.trunk)

    async def _run(self, request: Request) -> AsyncGenerator[Event]:
        """Events of a request on this branch's sequence. Raises `VivaceError` if it fails."""
        self._check_idle()
        self._is_busy, self._is_cancelled = True, False
        engine = self.tree.engine
        try:
            await self.tree.prefill()
            engine.share(self.tree.trunk, self._sequence)
            self._running = engine.driver.submit(request, self._sequence)
            if self._is_cancelled:
                self._running.cancel()
            async with aclosing(self._running.events()) as events:
                async for event in events:
                    self.finish_reason = event.finish_reason
                    _check(event)
                    yield event
        finally:
            try:
                if self._running is not None:
                    await self._running.end()
            finally:
                self._running, self._is_busy = None, False

    def _check_idle(self) -> None:
        if self._is_dropped:
            raise VivaceError("the branch was dropped: fork it before")
        if self._is_busy:
            raise VivaceError("the branch is at work: wait for its coroutine, or cancel it")


def _check(event: Event) -> None:
    if event.error is not None:
        raise VivaceError(f"the branch failed: {event.error}") from event.error


async def _last_event(subscription: Subscription) -> None:
    async with aclosing(subscription.events()) as events:
        async for event in events:
            _check(event)
