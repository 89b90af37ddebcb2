"""The engine: requests in, events out, one step at a time."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

from vivace.engine.acceptance import Accepted, accept, collect
from vivace.engine.admission import blocks_that_fit, check_request, max_new_tokens
from vivace.engine.batch import Batch, build_batch
from vivace.engine.block_pool import BlockPool
from vivace.engine.branch import Branch, Tree
from vivace.engine.driver import Driver
from vivace.engine.jobs import Jobs
from vivace.engine.prefix_cache import Hash, fingerprint_of
from vivace.engine.request import Event, FinishReason, Job, Request, Sequence, Stream, Timing
from vivace.engine.sampling import Drawn, Sampler
from vivace.engine.scheduler import Limits, Scheduled, SchedulerCore, Stats
from vivace.engine.text import Detokenizer, StopText
from vivace.errors import InvalidOption, VivaceError
from vivace.plan import ResolvedPlan
from vivace.types import Executor, RequestKind, SamplingParams, StepOutput

__all__ = ["Engine"]


def fresh_seed() -> int:
    return secrets.randbits(64)


class Engine:
    """Runs requests over one executor.

    `add`, `cancel`, `fork` and `release` may be called from any thread at any time; they take
    effect at the start of the next step. Results come from `step`, and go to a request's listener
    in the thread that steps.

    Args:
        executor: runs the block list; the engine allocates its cache.
        plan: the resolved techniques.
        sampler: draws tokens.
        detokenizer: makes one stream's detokenizer from the tokens before its output; without
            one there is no text and stop strings are refused.
        eos_ids: tokens that end a text.
        max_context: tokens of a sequence, at most what the model declares (the default).
        block_size: entries in a block of the cache.
        num_blocks: blocks per layer group; or
        cache_bytes: memory for the cache. By default it holds two whole contexts.
        kv_fingerprint: what else keys and values depend on beside the plan (the model's weights).
        clock, seed_source, hash: where time, seeds and prefix keys come from.
    """

    def __init__(
        self,
        executor: Executor,
        plan: ResolvedPlan,
        *,
        sampler: Sampler,
        detokenizer: Callable[[Seq[int]], Detokenizer] | None = None,
        eos_ids: Seq[int] = (),
        max_context: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        cache_bytes: int | None = None,
        limits: Limits | None = None,
        kv_fingerprint: bytes = b"",
        clock: Callable[[], float] = time.perf_counter,
        seed_source: Callable[[], int] = fresh_seed,
        hash: Hash | None = None,
    ) -> None:
        self.executor = executor
        self.graph = executor.graph
        self.plan = plan
        self.sampler = sampler
        self.detokenizer = detokenizer
        self.eos_ids = frozenset(i for i in eos_ids if 0 <= i < self.graph.vocab_size)
        longest = self.graph.max_positions
        self.max_context = longest if max_context is None else max_context
        if not 1 <= self.max_context <= longest:
            raise InvalidOption(f"max_context is {max_context}: expected 1 to {longest}")
        self.limits = limits or Limits()
        self.seed_source = seed_source
        self.driver = Driver(self)
        self._clock = clock
        self._decoder = plan.one("decoders")
        if num_blocks is None:
            num_blocks = blocks_that_fit(executor, block_size, self.max_context, cache_bytes)
        counts = [num_blocks] * len(self.graph.groups)
        executor.allocate(counts, block_size)
        self.pool = BlockPool(self.graph.groups, counts, block_size, hash, executor.merge_entries)
        self.stats = Stats()
        self.scheduler = SchedulerCore(
            plan.one("schedulers"), self._decoder, self.pool, self.limits, self.stats
        )
        self._fingerprint = (kv_fingerprint, *fingerprint_of(plan))
        self.jobs = Jobs(self.scheduler, clock)
        self._stream_ids = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()
        self._step_lock = threading.Lock()
        self._stepper: int | None = None  # the thread that steps
        self._batch: Batch | None = None  # the forward that runs now
        self._is_closed = False

    # -------------------------------------------------------- from outside, any thread

    def add(
        self,
        request: Request,
        listener: Callable[[Event], None] | None = None,
        sequence: Sequence | None = None,
    ) -> int:
        """Queue a request and return its id.

        `sequence` is a branch's: the request goes on from its tokens instead of `request.inputs`,
        and the sequence keeps what was generated.
        Raises `InvalidRequest`, `PromptTooLong`, `OutOfBlocks`, `QueueFull`.
        """
        num_tokens = request.num_rows if sequence is None else len(sequence.token_ids)
        if self._is_closed:
            raise VivaceError("the engine is closed: make another one")
        check_request(self, request, num_tokens)
        job_id = self.jobs.enter(num_tokens)
        try:
            sequence = self.sequence(request) if sequence is None else sequence
            max_tokens = max_new_tokens(self, request, num_tokens)
            job = Job(job_id, request, Timing(self._clock()), max_tokens, listener)
            stream = self._stream(job, sequence)
        except BaseException:
            self.jobs.leave(job_id)
            raise
        self._inbox.append(partial(self._enqueue, stream))
        return job_id

    def cancel(self, request_id: int) -> None:
        """End a request; its blocks are free within one step. Unknown ids are ended already."""
        if not self.jobs.cancel(request_id):
            return
        self._inbox.append(partial(self._cancel, request_id))
        batch = self._batch
        if batch is not None and batch.holds_only(self.jobs.cancelled):
            batch.cancel.set()

    def close(self) -> None:
        """Cancel every request and take no more."""
        self._is_closed = True
        for request_id in self.jobs.ids():
            self.cancel(request_id)
        self.run_until_done()

    def sequence(self, request: Request) -> Sequence:
        """The sequence of a request's prompt, not in the cache yet."""
        token_ids = request.token_ids()
        progress = self._decoder.begin(token_ids, len(token_ids))
        identity = repr((request.salt, request.adapter_id, *self._fingerprint)).encode()
        seed = self.seed_source() if request.params.seed is None else request.params.seed
        return Sequence(progress, request.inputs, identity, seed)

    def fork(self, parent: Sequence) -> Sequence:
        """A sequence with the same tokens; it shares the cache of an idle parent."""
        child = parent.fork(self._decoder.fork(parent.progress))
        child.progress.num_computed = 0
        child.is_kept = True
        self.share(parent, child)
        return child

    def branch(
        self,
        prompt: Request | Seq[int],
        params: SamplingParams | None = None,
        max_total_tokens: int | None = None,
    ) -> Branch:
        """The root of a tree of branches that generate at most `max_total_tokens` together."""
        request = prompt if isinstance(prompt, Request) else Request.of(prompt, params)
        check_request(self, request, request.num_rows)
        tree = Tree(self, request, max_total_tokens)
        tree.trunk.is_kept = True
        return Branch(tree, self.fork(tree.trunk))

    def share(self, parent: Sequence, child: Sequence) -> None:
        """Give a child that holds nothing its part of what an idle parent holds."""
        self._inbox.append(partial(self._share, parent, child))

    def release(self, sequence: Sequence) -> None:
        """Free what a sequence holds in the cache, at once or when its request ends."""
        self._inbox.append(partial(self.scheduler.forget, sequence))

    @property
    def cache_bytes(self) -> int:
        """Memory that all blocks of the cache take."""
        size = self.pool.block_size
        return sum(
            group.num_blocks * self.executor.bytes_per_block(index, size)
            for index, group in enumerate(self.pool.groups)
        )

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or len(self.jobs))

    def run_until_done(self) -> list[Event]:
        events = []
        while self.has_work:
            events += self.step()
        return events

    # -------------------------------------------------------- a step

    def step(self) -> list[Event]:
        """Run one step and say what it gave.

        Of the design's nine calls propose, combine, observe and choose have no technique yet.
        What is raised here is a mistake of ours or of a technique: every request has been ended
        with it, since no step can be trusted any more.
        """
        if self._stepper == threading.get_ident():
            return []  # a generator that is collected in the midst of a step cancels its request
        with self._step_lock:
            try:
                self._stepper = threading.get_ident()
                interrupt = self._step()
            except BaseException as error:
                self.jobs.end_all(error)
                self.jobs.deliver()
                raise
            else:
                events = self.jobs.deliver()
            finally:
                self._stepper = None
            if interrupt is not None:
                raise interrupt
            return events

    def _step(self) -> BaseException | None:
        """Schedule, rows, forward, accept, commit.

        A step that fails changes nothing. Its streams then run one at a time, and one that fails
        alone ends with the error. Returns what interrupted a forward without harm.
        """
        while self._inbox:
            self._inbox.popleft()()
        began = self._clock()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return None
        try:
            batch = build_batch(scheduled, self._decoder, self.graph, self.pool.block_size)
            output = self._forward(batch, scheduled)
            accepted = accept(batch, output, self._decoder, self.sampler)
        except Exception as error:
            return self._blame(scheduled, error)
        except BaseException as interrupt:
            self._roll_back(scheduled)
            return interrupt
        self._commit(batch, accepted)
        self.scheduler.technique.on_step(len(batch.step.tokens), self._clock() - began)
        return None

    def _forward(self, batch: Batch, scheduled: list[Scheduled]) -> StepOutput:
        for group in range(len(self.graph.groups)):
            copies = [c for item in scheduled for c in item.copies if c.group == group]
            if copies:
                sources, targets = [c.source for c in copies], [c.target for c in copies]
                self.executor.copy_blocks(group, sources, targets)
        self._batch = batch
        if batch.holds_only(self.jobs.cancelled):
            batch.cancel.set()
        try:
            output = self.executor.forward(batch.step)
        finally:
            self._batch = None
        self.stats.num_forwards += 1
        self.stats.num_rows += len(batch.step.tokens)
        return output

    def _commit(self, batch: Batch, accepted: list[Accepted]) -> None:
        """Make a step true: cache, results, forks, tokens. Empty for a step that was cancelled."""
        for part, result in zip(batch.parts, accepted, strict=False):
            stream = part.stream
            stream.is_suspect = False
            if stream.job.id in self.jobs.cancelled:
                continue
            is_prompt = part.start < stream.num_prompt_tokens
            self.stats.num_prompt_rows += is_prompt * part.num_rows
            self._keep(stream, result.num_kept)
            try:
                collect(stream, part, result)
            except Exception as error:  # the request's own listener of logits
                self.jobs.finish(stream, FinishReason.ERROR, error)
                continue
            streams = [stream, *self._split(stream, len(result.choices) - 1)]
            for choice, drawn in zip(streams, result.choices, strict=True):
                self._append(choice, drawn)
            if stream.progress.num_computed == stream.target:
                self.jobs.finish(stream, FinishReason.STOP)

    def _keep(self, stream: Stream, num_rows: int) -> None:
        sequence, size = stream.sequence, self.pool.block_size
        sequence.progress.num_computed += num_rows
        assert sequence.table is not None
        self.pool.commit(
            sequence.table,
            sequence.progress.num_computed,
            lambda block: sequence.content(block * size, (block + 1) * size),
        )

    def _split(self, stream: Stream, count: int) -> list[Stream]:
        """The other choices of a request whose prompt is computed; they share its blocks."""
        splits = []
        for _ in range(count):
            parent = stream.sequence
            sequence = parent.fork(self._decoder.fork(parent.progress))
            assert parent.table is not None
            sequence.table = self.pool.fork(parent.table, parent.progress.num_computed)
            sequence.random_stream = len(stream.job.streams)
            split = self._stream(stream.job, sequence)
            split.num_collected = stream.num_collected
            self.scheduler.join(split)
            splits.append(split)
        stream.num_unforked -= count
        return splits

    def _append(self, stream: Stream, drawn: list[Drawn]) -> None:
        """Add tokens to a stream, until one of them ends it."""
        job, progress = stream.job, stream.progress
        for item in drawn:
            event = self.jobs.event(stream)
            if job.timing.first_token is None:
                job.timing.first_token = self._clock()
            progress.token_ids.append(item.token_id)
            stream.num_generated += 1
            self.stats.num_generated_tokens += 1
            event.token_ids.append(item.token_id)
            if item.logprob is not None:
                event.logprobs.append(item.logprob)
            is_stop = item.token_id in stream.stop_ids
            if stream.text is not None and not is_stop:
                may_stop = stream.num_generated > job.request.params.min_tokens
                event.text += stream.text.add(item.token_id, may_stop)
                is_stop = stream.text.is_stopped
            if is_stop:
                return self.jobs.finish(stream, FinishReason.STOP)
            if stream.num_generated == job.max_tokens:
                return self.jobs.finish(stream, FinishReason.LENGTH)
        return None

    # -------------------------------------------------------- when a step fails

    def _blame(self, scheduled: list[Scheduled], error: Exception) -> None:
        """A stream that failed alone ends; of several, each must show that it is not the cause."""
        self.stats.num_failed_steps += 1
        self._roll_back(scheduled)
        for item in scheduled:
            item.stream.is_suspect = True
        if len(scheduled) == 1:
            self.jobs.finish(scheduled[0].stream, FinishReason.ERROR, error)

    def _roll_back(self, scheduled: list[Scheduled]) -> None:
        """Rows were never counted as computed; only blocks that wait for a copy must go."""
        for item in scheduled:
            if item.copies:
                self.scheduler.preempt(item.stream)

    # -------------------------------------------------------- inbox

    def _enqueue(self, stream: Stream) -> None:
        job = stream.job
        job.arrived_at_step = self.scheduler.num_steps
        self.jobs.open[job.id] = job
        stream.num_unforked = job.request.params.n - 1
        self.scheduler.enqueue(stream)

    def _stream(self, job: Job, sequence: Sequence) -> Stream:
        params = job.request.params
        text = None
        if self.detokenizer is not None and job.request.kind is RequestKind.GENERATE:
            detokenizer = self.detokenizer(sequence.token_ids)
            text = StopText(detokenizer, params.stop, params.include_stop)
        stops = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else self.eos_ids
        )
        stream = Stream(next(self._stream_ids), job, sequence, text, stops)
        job.streams.append(stream)
        return stream

    def _cancel(self, request_id: int) -> None:
        if request_id in self.jobs.open:
            self.jobs.end(self.jobs.open[request_id], FinishReason.CANCELLED)

    def _share(self, parent: Sequence, child: Sequence) -> None:
        num_entries = min(parent.progress.num_computed, len(child.token_ids) - 1)
        if parent.table is not None and child.table is None and num_entries > 0:
            child.table = self.pool.fork(parent.table, num_entries)
            child.progress.num_computed = num_entries
            self.scheduler.idle[child] = None
