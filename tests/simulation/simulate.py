"""One seeded schedule: random requests, branches, cancels and failures, checked after every step.

python tests/simulation/simulate.py [FIRST [LAST]] runs seeds FIRST to LAST - 1.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
from oracle import Answer, answer
from world import (
    EOS,
    VOCAB_SIZE,
    Failure,
    FakeDetokenizer,
    FakeExecutor,
    FakeSampler,
    embedding_of,
    make_graph,
    reference_logits,
    reference_states,
)

from vivace.engine import Engine, Event, Limits, Request
from vivace.engine.prefix_cache import keyed_hash
from vivace.engine.request import Sequence, StreamState
from vivace.errors import InvalidRequest, OutOfBlocks, PromptTooLong, QueueFull
from vivace.plan import ResolvedPlan
from vivace.techniques.decoders import autoregressive
from vivace.techniques.schedulers import chunked
from vivace.types import InputKind, InputSegment, RequestKind, SamplingParams

MAX_STEPS = 1500  # far beyond what the largest scenario needs
STOPS = ("ab", "a", "cab", "é", "bc\n", "🙂", "aab", "b ", "ca")


@dataclass
class Outcome:
    """What the events of one choice add up to."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    end: Event | None = None


@dataclass
class Asked:
    """A request inside the engine and what we know of it."""

    request: Request
    tokens: list[int]  # the prompt, or the branch's tokens
    seed: int
    stream: int
    arrived: int
    sequence: Sequence | None = None
    is_cancelled: bool = False
    has_ended: bool = False
    outcomes: dict[int, Outcome] = field(default_factory=dict)


@dataclass
class Limb:
    """A branch, as this simulation remembers it."""

    sequence: Sequence
    tokens: list[int]
    request: Request
    busy: int | None = None  # the id of the request on it
    is_dropped: bool = False


def known_tokens(request: Request) -> list[int]:
    """The prompt's tokens; given rows have numbers outside the vocabulary."""
    known = []
    for segment in request.inputs:
        is_given = segment.kind is InputKind.EMBEDDINGS
        known += [int(item) for item in (segment.data[:, 0] if is_given else segment.data)]
    return known


class Simulation:
    """Everything about a schedule follows from its seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        window = rng.randint(1, 7)
        self.windows = rng.choice([(None,), (None,), (None, window), (window,)])
        self.block_size = rng.choice([1, 2, 3, 4, 8])
        self.max_context = rng.randint(12, 32)
        least = -(-self.max_context // self.block_size) if rng.random() < 0.8 else 3
        num_blocks = least + rng.choice([0, 0, 0, 1, 2, 4, 30])
        self.limits = Limits(
            max_streams=(max_streams := rng.choice([1, 2, 3, 4, 6])),
            max_rows=max_streams + rng.randint(1, 12),
            max_scored_rows=rng.randint(1, 6),
            max_queued_requests=rng.randint(3, 9),
            max_queued_tokens=rng.choice([40, 1000]),
        )
        self.patience = rng.choice([0, 8, 30])
        self.chunk_size = rng.randint(1, 8)
        config = chunked.Config(chunk_size=self.chunk_size, patience=self.patience)
        plan = ResolvedPlan(
            {
                "schedulers": (chunked.Chunked(config),),
                "decoders": (autoregressive.Autoregressive(autoregressive.Config()),),
            }
        )
        self.executor = FakeExecutor(make_graph(self.windows, self.max_context))
        self.executor.merge_entries = rng.choice([1, 1, 4])
        self.has_weak_hash = rng.random() < 0.15
        strong = keyed_hash(b"simulation")
        self.engine = Engine(
            self.executor,
            plan,
            sampler=FakeSampler(self.limits.max_scored_rows),
            detokenizer=FakeDetokenizer,
            eos_ids=[EOS],
            block_size=self.block_size,
            num_blocks=num_blocks,
            limits=self.limits,
            clock=count().__next__,
            seed_source=lambda: rng.randrange(2**64),
            hash=(lambda data: strong(data)[:1]) if self.has_weak_hash else strong,
        )
        self.entries_dropped_together = math.lcm(self.executor.merge_entries, self.block_size)
        self.may_fail = rng.random() < 0.25
        if self.may_fail:
            self.executor.fails_at = {rng.randint(1, 40) for _ in range(rng.randint(0, 3))}
            self.executor.copy_fails_at = {rng.randint(1, 5)} if rng.random() < 0.3 else set()
            self.executor.fails_on = rng.choice([None, None, 15])
        self.roots = [self._tokens(rng.randint(1, 20)) for _ in range(2)]
        self.asked: dict[int, Asked] = {}
        self.limbs: list[Limb] = []
        self.step_number = 0
        self.failed_alone: set[int] = set()
        self.just_cancelled: list[int] = []

    # ---------------------------------------------------------------- making requests

    def _tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(1, VOCAB_SIZE) for _ in range(length)]

    def _prompt(self) -> list[int]:
        root = self.rng.choice(self.roots)
        tail = self._tokens(self.rng.choice([0, 1, 2, 6]))
        return root[: self.rng.randint(0, len(root))] + tail if self.rng.random() < 0.7 else root

    def _params(self) -> SamplingParams:
        rng = self.rng
        max_tokens = rng.choice([None, None, 1, 3, 6, 12, 30])
        return SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.choice([None, rng.randrange(4)]),
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, 0, 3]) if max_tokens is None or max_tokens > 3 else 0,
            stop=tuple(rng.sample(STOPS, rng.choice([0, 0, 0, 1, 3]))),
            stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1]))),
            ignore_eos=rng.random() < 0.75,
            include_stop=rng.random() < 0.3,
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            n=rng.choice([1, 1, 1, 2, 3]),
        )

    def _request(self) -> Request:
        request = self._plain_request()
        if self.rng.random() < 0.85 or request.num_rows < 3:
            return request
        at = self.rng.choice([0, 0, 1])  # some rows are given, not looked up
        tokens, given = request.token_ids(), self.rng.randint(1, 3)
        rows = [VOCAB_SIZE + self.rng.randrange(2) for _ in range(given)]
        middle = InputSegment(InputKind.EMBEDDINGS, np.stack([embedding_of(t) for t in rows]))
        parts = (InputSegment.tokens(tokens[:at]), middle, InputSegment.tokens(tokens[at:]))
        return replace(request, inputs=parts)

    def _plain_request(self) -> Request:
        rng = self.rng
        options = {"salt": rng.choice(["", "", "a", "b"]), "priority": rng.choice([0, 0, 0, 2, -1])}
        prompt = self._prompt()
        kind = rng.choice([RequestKind.GENERATE] * 6 + list(RequestKind)[1:])
        if kind is RequestKind.GENERATE:
            return Request.of(prompt, self._params(), **options)
        first = rng.randint(1, max(1, len(prompt) - 1))
        params = SamplingParams(prompt_logprobs=rng.choice([None, 2]))
        if kind is not RequestKind.SCORE:
            params = SamplingParams()
        block = rng.choice([None, 0, 1]) if kind is RequestKind.HIDDEN else None
        options |= {"kind": kind, "first_scored": first, "hidden_block": block}
        return Request.of(prompt, params, **options)

    def _add(self, request: Request, limb: Limb | None = None) -> int | None:
        """Ask; a refusal must be one that we can explain."""
        tokens = list(limb.tokens) if limb else known_tokens(request)
        queued = [item for item in self.asked.values() if not item.has_ended]
        num_queued_tokens = sum(len(item.tokens) for item in queued)
        try:
            sequence = limb.sequence if limb else None
            request_id = self.engine.add(request, None, sequence)
        except QueueFull:
            is_long = num_queued_tokens + len(tokens) > self.limits.max_queued_tokens
            assert is_long or len(queued) >= self.limits.max_queued_requests
            return None
        except PromptTooLong:
            assert len(tokens) >= self.max_context
            return None
        except OutOfBlocks:
            assert self._room(request, tokens) > self.engine.pool.capacity_tokens
            return None
        except InvalidRequest:
            is_short = not tokens or (request.kind is RequestKind.SCORE and len(tokens) < 2)
            if not is_short and request.params.n <= self.limits.max_streams:
                raise
            return None
        assert len(queued) < self.limits.max_queued_requests, "the queue is over its cap"
        assert num_queued_tokens + len(tokens) <= self.limits.max_queued_tokens
        sequence = sequence or self.engine._inbox[-1].args[0].sequence  # type: ignore[attr-defined]
        asked = Asked(
            request, tokens, sequence.seed, sequence.random_stream, self.step_number, sequence
        )
        asked.outcomes = {index: Outcome() for index in range(request.params.n)}
        assert request_id not in self.asked
        self.asked[request_id] = asked
        if request.params.seed is not None and limb is None:
            assert sequence.seed == request.params.seed
        return request_id

    def _room(self, request: Request, tokens: list[int]) -> int:
        """Entries of the cache that a request takes at most."""
        if request.kind is not RequestKind.GENERATE:
            return len(tokens)
        return len(tokens) + max(1, self._max_tokens(request, tokens)) - 1

    def _max_tokens(self, request: Request, tokens: list[int]) -> int:
        room = self.max_context - len(tokens)
        if request.params.max_tokens is not None:
            return min(room, request.params.max_tokens)
        return min(room, self.engine.pool.capacity_tokens + 1 - len(tokens))

    # ---------------------------------------------------------------- branches

    def _plant(self) -> None:
        request = Request.of(self._prompt(), SamplingParams(seed=self.rng.randrange(4)))
        if request.num_rows:
            sequence = self.engine.sequence(request)
            sequence.is_kept = True
            self.limbs.append(Limb(sequence, request.token_ids(), request))

    def _tend(self, limb: Limb) -> None:
        """Something happens to a branch that has nothing to do."""
        choice = self.rng.random()
        if choice < 0.4:
            child = Limb(self.engine.fork(limb.sequence), list(limb.tokens), limb.request)
            child.sequence.random_stream = len(self.limbs)
            self.limbs.append(child)
        elif choice < 0.8:
            params = SamplingParams(
                max_tokens=self.rng.randint(1, 6),
                ignore_eos=self.rng.random() < 0.5,
                stop=tuple(self.rng.sample(STOPS, self.rng.choice([0, 1]))),
                temperature=self.rng.choice([0.0, 1.0]),
            )
            limb.busy = self._add(Request((), params), limb)
        elif choice < 0.9:
            child = Limb(self.engine.fork(limb.sequence), list(limb.tokens), limb.request)
            tail = self._tokens(self.rng.randint(1, 3))
            child.tokens += tail
            child.sequence.token_ids.extend(tail)
            self.limbs.append(child)
            options = {"kind": RequestKind.SCORE, "first_scored": len(limb.tokens)}
            child.busy = self._add(Request((), **options), child)  # type: ignore[arg-type]
        else:
            limb.is_dropped = True
            self.engine.release(limb.sequence)

    # ---------------------------------------------------------------- the run

    def run(self) -> None:
        rng = self.rng
        num_requests = rng.randint(1, 6)
        has_branches = rng.random() < 0.35
        haste = rng.choice([0.2, 0.6, 1.0])
        is_flood = rng.random() < 0.03 and not self.may_fail
        if is_flood:
            self._flood()
        while num_requests or self.engine.has_work:
            if num_requests and rng.random() < haste:
                num_requests -= 1
                self._add(self._request())
                if has_branches and len(self.limbs) < 2:
                    self._plant()
            free = [limb for limb in self.limbs if limb.busy is None and not limb.is_dropped]
            if free and len(self.limbs) < 9 and rng.random() < 0.5:
                self._tend(rng.choice(free))
            if rng.random() < 0.03:
                self._cancel()
            self._step()
        if rng.random() < 0.3:
            self._epilogue()
        for limb in self.limbs:
            self.engine.release(limb.sequence)
        self._step()
        assert self.engine.pool.num_used == 0, "blocks are left when all is done"
        self._check_cache()
        assert len(self.engine.jobs) == 0
        assert not self.engine.jobs.open
        assert not self.engine.jobs.cancelled
        assert all(item.has_ended for item in self.asked.values()), "a request never ended"

    def _cancel(self) -> None:
        going = [i for i, item in self.asked.items() if not item.has_ended]
        if going:
            request_id = self.rng.choice(going)
            self.asked[request_id].is_cancelled = True
            self.just_cancelled.append(request_id)
            self.engine.cancel(request_id)
        self.engine.cancel(10**6)  # an unknown id does nothing

    def _flood(self) -> None:
        """Urgent requests never end, and still a request that is not urgent is served."""
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        patient = self._add(Request.of([1, 2, 3], params, priority=-1))
        for _ in range(self.patience + 60):
            if patient is None or self.asked[patient].has_ended:
                return
            for _ in range(self.limits.max_streams):
                self._add(Request.of([1, 2], params, priority=5))
            self._step()
        raise AssertionError("a request starves")

    def _epilogue(self) -> None:
        """In a quiet engine: a repeated prompt hits, and streams share their steps."""
        room = (min(self.engine.pool.num_free) - 2) * self.block_size  # nothing is evicted there
        length = min(14, self.max_context - 4, room - 3)
        if self.may_fail or self.has_weak_hash or length < 1:
            return
        prompt = self._tokens(length)
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
        known, num_copies = 0, self.executor.num_copies
        for _ in range(2):
            before = self.engine.stats.num_prompt_rows
            if self._add(Request.of(prompt, params)) is None:
                return
            while self.engine.has_work:
                self._step()
            num_rows = self.engine.stats.num_prompt_rows - before
            assert num_rows <= length - known, f"{num_rows} prompt rows, {known} were known"
            known = (length - 1) // self.block_size * self.block_size
        assert self.executor.num_copies == num_copies, "copied, though nobody shares"
        before = self.executor.num_forwards
        num_together = min(3, self.limits.max_streams)
        prompts = [self._tokens(1) for _ in range(num_together)]
        if self.engine.pool.capacity_tokens < num_together * (4 + self.block_size):
            return
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        if all(self._add(Request.of(tokens, params)) is not None for tokens in prompts):
            while self.engine.has_work:
                self._step()
            late = 0 if self.chunk_size >= num_together else num_together - 1
            assert self.executor.num_forwards - before <= 4 + late, "not batched"

    def _step(self) -> None:
        self.step_number += 1
        assert self.step_number < MAX_STEPS, "no end in sight"
        failed, forwards = self.engine.stats.num_failed_steps, self.executor.num_forwards
        events = self.engine.step()
        assert self.executor.num_forwards - forwards <= 1
        if self.engine.stats.num_failed_steps > failed:
            failing = {event.request_id for event in events if isinstance(event.error, Failure)}
            self.failed_alone |= failing
        for event in events:
            self._take(event)
        self._check_step()

    # ---------------------------------------------------------------- checks

    def _take(self, event: Event) -> None:
        asked = self.asked[event.request_id]
        assert not asked.has_ended, "an event after the last one"
        outcome = asked.outcomes[event.index]
        assert event.token_ids or event.finish_reason, "an event about nothing"
        assert outcome.end is None, "a choice ended twice"
        outcome.token_ids += event.token_ids
        outcome.text += event.text
        outcome.logprobs += [line.logprob for line in event.logprobs]
        if event.finish_reason is not None:
            outcome.end = event
            self._check_end(asked, event.index, outcome)
        all_ended = all(item.end is not None for item in asked.outcomes.values())
        assert event.is_last == all_ended, "is_last comes with the end of the last choice"
        if event.is_last:
            asked.has_ended = True
            for limb in self.limbs:
                if limb.busy == event.request_id:
                    limb.busy = None
                    limb.tokens += outcome.token_ids
                    assert limb.tokens == limb.sequence.token_ids

    def _check_end(self, asked: Asked, index: int, outcome: Outcome) -> None:
        end, request = outcome.end, asked.request
        assert end is not None
        assert end.timing is not None
        assert end.timing.finished is not None
        reason = end.finish_reason
        assert (reason == "error") == (end.error is not None)
        if reason == "error":
            assert self.may_fail, end.error
            assert end.request_id in self.failed_alone
            return
        if reason == "cancelled":
            assert asked.is_cancelled
        else:
            assert not asked.is_cancelled or end.request_id not in self.just_cancelled
        if request.kind is RequestKind.GENERATE:
            self._check_answer(asked, index, outcome)
        elif reason != "cancelled":
            self._check_measure(asked, end)

    def _check_answer(self, asked: Asked, index: int, outcome: Outcome) -> None:
        params, end = asked.request.params, outcome.end
        assert end is not None
        expected = answer(
            asked.tokens,
            params,
            asked.seed,
            asked.stream + index,
            self.windows,
            self._max_tokens(asked.request, asked.tokens),
        )
        if end.finish_reason == "cancelled":
            assert expected.token_ids[: len(outcome.token_ids)] == outcome.token_ids
            return
        got = Answer(outcome.token_ids, outcome.text, str(end.finish_reason), outcome.logprobs)
        if params.logprobs is None:
            assert not outcome.logprobs
            got.logprobs.extend(expected.logprobs)
        assert got == expected, f"expected {expected}, got {got}"
        if params.prompt_logprobs is not None and index == 0:
            self._check_lines(asked, end, 1)

    def _check_measure(self, asked: Asked, end: Event) -> None:
        assert end.finish_reason == "stop"
        if asked.request.kind is RequestKind.SCORE:
            self._check_lines(asked, end, asked.request.first_scored)
            return
        block = 1 if asked.request.hidden_block is None else asked.request.hidden_block
        states = reference_states(asked.tokens, self.windows, block)
        assert end.states is not None
        if asked.request.kind is RequestKind.EMBED:
            total = states[0].copy()
            for state in states[1:]:
                total = total + state
            states = total / np.float32(len(asked.tokens))
        assert np.array_equal(end.states, states)

    def _check_lines(self, asked: Asked, end: Event, first: int) -> None:
        tokens = asked.tokens
        assert end.prompt_logprobs is not None
        got = [(line.token_id, line.logprob) for line in end.prompt_logprobs]
        expected = []
        for i in range(first, len(tokens)):
            token = tokens[i] if tokens[i] < VOCAB_SIZE else 0
            expected.append((token, float(reference_logits(tokens[:i], self.windows)[token])))
        assert got == expected, "scores of the prompt differ"

    def _check_cache(self) -> None:
        """Nothing is remembered but blocks and the way to them."""
        nodes = list(self.engine.pool.cache._nodes.values())
        children = Counter(node.parent for node in nodes)
        for node in nodes:
            num_blocks = sum(block is not None for block in node.blocks)
            assert node.num_uses == num_blocks + children[node] > 0, "a prefix nobody can reach"

    def _check_step(self) -> None:
        """The invariants of robustness.md."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        running = [stream.sequence for stream in scheduler.running.values()]
        sequences = {id(s): s for s in [*running, *scheduler.idle]}.values()
        assert len(sequences) == len(running) + len(scheduler.idle), "a sequence has two states"
        tables = [s.table for s in sequences if s.table is not None]
        assert len(tables) == len(sequences), "a sequence that runs or idles has no table"
        pool.check(tables)
        owners: dict[tuple[int, int], bytes] = {}
        for sequence in sequences:
            assert sequence.table is not None
            for group, blocks in enumerate(sequence.table.blocks):
                for block in blocks:
                    owner = owners.setdefault((group, block), sequence.identity)
                    assert owner == sequence.identity, "a block is shared across salts"
            for window, dropped in zip(self.windows, sequence.table.num_dropped, strict=True):
                if window is not None:
                    extra = sequence.progress.num_computed - window - dropped * self.block_size
                    assert extra < self.entries_dropped_together, "a window keeps too much"
        assert all(s.state is StreamState.RUNNING for s in scheduler.running.values())
        for stream in scheduler.waiting.values():
            assert stream.state in (StreamState.WAITING, StreamState.PREEMPTED)
            if stream.sequence.table is None:
                assert stream.progress.num_computed == 0, "computed, but not in the cache"
        assert sum(s.seats for s in scheduler.running.values()) <= self.limits.max_streams
        assert len(self.engine.jobs) <= self.limits.max_queued_requests
        for request_id in self.just_cancelled:
            asked = self.asked[request_id]
            assert asked.has_ended, "a cancelled request goes on"
            is_branch = any(limb.sequence is asked.sequence for limb in self.limbs)
            assert asked.sequence is not None
            assert is_branch or asked.sequence.table is None, "cancelled, but blocks are held"
        self.just_cancelled.clear()


def run_seed(seed: int) -> Simulation:
    """Raises what went wrong, with the seed."""
    try:
        simulation = Simulation(seed)
        simulation.run()
    except BaseException as error:
        error.add_note(f"replay with SIMULATION_SEED={seed}")
        raise
    return simulation


if __name__ == "__main__":
    first, last = (*map(int, sys.argv[1:]), *(0, 100)[len(sys.argv) - 1 :])[:2]
    for number in range(first, max(last, first + 1)):
        run_seed(number)
