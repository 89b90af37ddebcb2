"""The engine over a world without a model: counters, refusals, stops, failures, endings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from world import (
    EOS,
    VOCAB_SIZE,
    Failure,
    FakeDetokenizer,
    FakeExecutor,
    FakeSampler,
    make_graph,
    reference_logits,
    reference_states,
)

from vivace.engine import Engine, Event, FinishReason, Limits, Request
from vivace.errors import (
    InvalidOption,
    InvalidRequest,
    OutOfBlocks,
    PromptTooLong,
    QueueFull,
    VivaceError,
)
from vivace.plan import Plan, resolve
from vivace.types import InputKind, InputSegment, RequestKind, SamplingParams, Step, StepOutput

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def make_engine(
    windows: Sequence[int | None] = (None,),
    max_context: int = 256,
    chunk_size: int = 64,
    executor: type[FakeExecutor] = FakeExecutor,
    **options,
) -> Engine:
    plan = Plan.of(
        schedulers={"name": "chunked", "chunk_size": chunk_size}, decoders="autoregressive"
    )
    settings = {"sampler": FakeSampler(), "detokenizer": FakeDetokenizer, "eos_ids": [EOS]}
    return Engine(executor(make_graph(windows, max_context)), resolve(plan), **(settings | options))


def executor_of(engine: Engine) -> FakeExecutor:
    assert isinstance(engine.executor, FakeExecutor)
    return engine.executor


def prompt_of(length: int, first: int = 1) -> list[int]:
    return [1 + (first * 7 + i * i) % (VOCAB_SIZE - 1) for i in range(length)]


def finish(engine: Engine, *requests: Request) -> list[list[Event]]:
    """Run requests together; the events of each."""
    ids = [engine.add(request) for request in requests]
    events = engine.run_until_done()
    return [[event for event in events if event.request_id == i] for i in ids]


def tokens_of(events: list[Event], index: int = 0) -> list[int]:
    return [token for event in events if event.index == index for token in event.token_ids]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


# ---------------------------------------------------------------- counters


def test_requests_share_forwards() -> None:
    engine = make_engine()
    params = replace(GREEDY, max_tokens=64)
    finish(engine, *(Request.of([1 + i], params) for i in range(8)))
    assert engine.stats.num_generated_tokens == 8 * 64
    assert engine.stats.num_forwards == 64


def test_repeated_prompt_computes_its_suffix_and_at_most_a_block() -> None:
    engine = make_engine(block_size=16)
    prompt = prompt_of(100)
    finish(engine, Request.of(prompt, GREEDY))
    before = engine.stats.num_prompt_rows
    finish(engine, Request.of([*prompt, 3, 4, 5], GREEDY))
    assert engine.stats.num_prompt_rows - before <= 3 + 16
    before = engine.stats.num_prompt_rows
    finish(engine, Request.of(prompt, GREEDY))
    assert engine.stats.num_prompt_rows - before <= 16


def test_what_was_generated_is_a_prefix_too() -> None:
    engine = make_engine(block_size=4)
    (events,) = finish(engine, Request.of(prompt_of(6), replace(GREEDY, max_tokens=12)))
    known = prompt_of(6) + tokens_of(events)
    before = engine.stats.num_prompt_rows
    finish(engine, Request.of([*known, 1], GREEDY))
    assert engine.stats.num_prompt_rows - before <= 4


def test_choices_share_the_prompt() -> None:
    engine = make_engine(block_size=16)
    engine.add(Request.of(prompt_of(64), replace(GREEDY, n=8, temperature=1.0)))
    engine.step()
    engine.step()
    assert engine.pool.num_used == 4 + 8
    assert engine.stats.num_prompt_rows == 64


def test_a_window_frees_blocks_and_changes_nothing() -> None:
    params = replace(GREEDY, max_tokens=100)
    engine = make_engine(windows=[None, 8], block_size=4)
    engine.add(Request.of(prompt_of(20), params))
    events = []
    while engine.has_work:
        full, window = (group.num_blocks - group.num_free for group in engine.pool.groups)
        assert window <= 2 + 8 // 4 or not events
        assert full >= window
        events += engine.step()
    tokens = prompt_of(20)
    for token in tokens_of(events):
        assert token == int(np.argmax(reference_logits(tokens, [None, 8])))
        tokens.append(token)
    assert len(tokens) == 120


# ---------------------------------------------------------------- refusals


def test_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    engine = make_engine(max_context=32)
    with pytest.raises(PromptTooLong, match=r"32 tokens.*holds 32"):
        engine.add(Request.of(prompt_of(32)))
    engine.add(Request.of(prompt_of(31), GREEDY))
    engine.add(Request.of(prompt_of(32), kind=RequestKind.EMBED))
    assert {event.finish_reason for event in engine.run_until_done() if event.is_last} == {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }


def test_request_that_never_fits_is_refused() -> None:
    engine = make_engine(num_blocks=4, block_size=4)
    with pytest.raises(OutOfBlocks, match="needs 17 tokens of cache but there are 16"):
        engine.add(Request.of(prompt_of(10), replace(GREEDY, max_tokens=8)))
    (events,) = finish(engine, Request.of(prompt_of(10), replace(GREEDY, max_tokens=7)))
    assert len(tokens_of(events)) == 7
    (events,) = finish(engine, Request.of(prompt_of(10), replace(GREEDY, max_tokens=None)))
    assert len(tokens_of(events)) == 7


def test_a_queue_has_two_bounds() -> None:
    engine = make_engine(limits=Limits(max_queued_requests=2, max_queued_tokens=20))
    first = engine.add(Request.of(prompt_of(10)))
    with pytest.raises(QueueFull, match="1 requests with 10 prompt tokens"):
        engine.add(Request.of(prompt_of(11)))
    engine.add(Request.of(prompt_of(10)))
    engine.cancel(first)
    with pytest.raises(QueueFull):
        engine.add(Request.of([1]))
    engine.step()
    engine.add(Request.of([1]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request.of([]), "empty"),
        (Request.of([1, VOCAB_SIZE]), f"token id {VOCAB_SIZE} is not in the vocabulary"),
        (Request.of([-1]), "token id -1"),
        (Request.of([1], SamplingParams(n=100)), "n is 100: expected at most 64"),
        (Request.of([1], SamplingParams(n=2), kind=RequestKind.EMBED), "n is 2: expected 1"),
        (Request.of([1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0})), "logit_bias"),
        (Request.of([1], kind=RequestKind.SCORE), "first_scored"),
        (Request.of([1, 2], kind=RequestKind.SCORE, first_scored=2), "expected 1 to 1"),
        (Request.of([1], kind=RequestKind.HIDDEN, hidden_block=9), "hidden_block"),
        (Request.of([1], kind=RequestKind.HIDDEN, hidden_block=True), "hidden_block"),
        (Request.of([1], priority=None), "priority"),
        (Request.of([1], adapter_id=1), "adapter_id"),
        (Request.of([1], SamplingParams(logprobs=17)), "at most 16"),
        (Request((InputSegment(InputKind.TOKENS, np.ones((1, 2), int)),)), "whole token ids"),
        (Request((InputSegment(InputKind.TOKENS, np.ones(2)),)), "whole token ids"),
    ],
)
def test_bad_requests_are_refused_before_anything_happens(request_: Request, message: str) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=message):
        engine.add(request_)
    assert not engine.has_work
    assert len(engine.jobs) == 0


def test_limits_are_checked() -> None:
    with pytest.raises(VivaceError, match="leaves no row for a prompt"):
        Limits(max_streams=8, max_rows=8)
    with pytest.raises(VivaceError, match="max_streams is 0"):
        Limits(max_streams=0)


# ---------------------------------------------------------------- the prefix cache


def test_other_salts_share_nothing() -> None:
    engine = make_engine(block_size=4)
    finish(engine, Request.of(prompt_of(40), GREEDY))
    finish(engine, Request.of(prompt_of(40), GREEDY, salt="b"))
    assert engine.stats.num_prefix_hit_tokens == 0
    finish(engine, Request.of(prompt_of(40), GREEDY, salt="b"))
    assert engine.stats.num_prefix_hit_tokens == 36


def test_a_forced_collision_shares_nothing() -> None:
    engine = make_engine(block_size=4, hash=lambda data: b"")
    first, second = prompt_of(20), prompt_of(20, first=2)
    alone = [finish(make_engine(), Request.of(p, GREEDY))[0] for p in (first, second)]
    together = [finish(engine, Request.of(p, GREEDY))[0] for p in (first, second, first)]
    assert [tokens_of(e) for e in together] == [tokens_of(alone[i]) for i in (0, 1, 0)]
    assert engine.stats.num_prefix_hit_tokens == 0


def test_the_default_hash_is_keyed_at_random() -> None:
    keys = []
    for _ in range(2):
        engine = make_engine(block_size=4)
        finish(engine, Request.of(prompt_of(8), GREEDY))
        keys.append({node.key for node in engine.pool.groups[0].nodes.values()})
    assert keys[0].isdisjoint(keys[1])


def test_given_embeddings_enter_the_prefix_key() -> None:
    engine = make_engine(block_size=4)
    for value in (20, 21, 20):
        rows = np.full((8, 2), value, np.float32)
        segment = InputSegment(InputSegment.tokens([1]).kind.EMBEDDINGS, rows)
        finish(engine, Request((segment, InputSegment.tokens([1, 2])), GREEDY))
    assert engine.stats.num_prefix_hit_tokens == 8


# ---------------------------------------------------------------- ends


def test_stop_strings_cross_tokens_and_bytes() -> None:
    """Token 4 and 5 are the two bytes of one character; the text before a stop is whole."""
    engine = make_engine()
    for stop, keeps in (("é", False), ("é", True)):
        bias_like = _Scripted([1, 2, 4, 5, 1])
        engine.sampler = bias_like
        params = replace(GREEDY, max_tokens=10, stop=(stop,), include_stop=keeps)
        (events,) = finish(engine, Request.of([1], params))
        assert text_of(events) == ("abé" if keeps else "ab")
        assert tokens_of(events) == [1, 2, 4, 5]
        assert events[-1].finish_reason == FinishReason.STOP


def test_text_that_may_begin_a_stop_is_held_back_then_given() -> None:
    engine = make_engine()
    engine.sampler = _Scripted([8, 1, 1, 2, 12])  # c a a b d
    params = replace(GREEDY, max_tokens=5, stop=("aac",))
    (events,) = finish(engine, Request.of([1], params))
    assert [event.text for event in events] == ["c", "", "", "aab", "d"]


def test_many_and_long_stops() -> None:
    engine = make_engine()
    engine.sampler = _Scripted([1] * 50)
    stops = ("b" * 100_000, *(f"a{i}" for i in range(10_000)), "a" * 40)
    (events,) = finish(engine, Request.of([1], replace(GREEDY, max_tokens=50, stop=stops)))
    assert len(tokens_of(events)) == 40
    assert text_of(events) == ""


def test_incomplete_characters_end_as_replacements() -> None:
    engine = make_engine()
    engine.sampler = _Scripted([1, 9])
    (events,) = finish(engine, Request.of([1], replace(GREEDY, max_tokens=2)))
    assert text_of(events) == "a\ufffd"


def test_eos_and_stop_ids_wait_for_min_tokens() -> None:
    engine = make_engine()
    engine.sampler = _Scripted([EOS, EOS, EOS, EOS, EOS])
    params = SamplingParams(temperature=0, max_tokens=5, min_tokens=3, stop_token_ids=(1,))
    (events,) = finish(engine, Request.of([1], params))
    assert tokens_of(events) == [2, 2, 2, EOS]
    assert text_of(events) == "bbb"


def test_the_context_ends_a_request() -> None:
    engine = make_engine(max_context=20)
    (events,) = finish(engine, Request.of(prompt_of(15), replace(GREEDY, max_tokens=None)))
    assert len(tokens_of(events)) == 5
    assert events[-1].finish_reason == FinishReason.LENGTH


class _Scripted(FakeSampler):
    """Draws given tokens one after the other, the next allowed one where that is banned."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        super().__init__()
        self.token_ids = list(token_ids)

    def draw(self, logits, draws):
        token = self.token_ids.pop(0)
        row = np.zeros((1, VOCAB_SIZE), np.float32)
        row[0, token] = 1
        return super().draw(row, draws)


# ---------------------------------------------------------------- measures


def test_scores_come_by_few_rows_at_a_time() -> None:
    engine = make_engine(sampler=FakeSampler(5), limits=Limits(max_scored_rows=5))
    prompt, blocks = prompt_of(40), []
    request = Request.of(prompt, kind=RequestKind.SCORE, first_scored=10, on_logits=blocks.append)
    (events,) = finish(engine, request)
    assert max(len(block) for block in blocks) <= 5
    logits = np.concatenate(blocks)
    expected = np.stack([reference_logits(prompt[:i], [None]) for i in range(10, 40)])
    assert np.array_equal(logits, expected)
    lines = events[-1].prompt_logprobs
    assert lines is not None
    assert [line.token_id for line in lines] == prompt[10:]
    assert [line.logprob for line in lines] == [expected[i, t] for i, t in enumerate(prompt[10:])]


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_embeddings_and_states_do_not_depend_on_chunks(chunk_size: int) -> None:
    engine = make_engine(chunk_size=chunk_size)
    prompt = prompt_of(30)
    states = reference_states(prompt, [None], 1)
    embed, hidden = finish(
        engine,
        Request.of(prompt, kind=RequestKind.EMBED),
        Request.of(prompt, kind=RequestKind.HIDDEN),
    )
    total = np.zeros(2, np.float32)
    for state in states:
        total = total + state
    assert np.array_equal(embed[-1].states, total / np.float32(30))  # type: ignore[arg-type]
    assert np.array_equal(hidden[-1].states, states)  # type: ignore[arg-type]


def test_prompt_logprobs_with_choices() -> None:
    engine = make_engine(block_size=4)
    finish(engine, Request.of(prompt_of(20), GREEDY))  # the prefix is known, and still all is told
    params = replace(GREEDY, n=2, prompt_logprobs=3, logprobs=2)
    (events,) = finish(engine, Request.of(prompt_of(20), params))
    told = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert len(told) == 1
    assert len(told[0]) == 19
    assert all(len(line.top) == 3 for line in told[0])
    assert tokens_of(events, 0) == tokens_of(events, 1)
    assert all(len(event.logprobs) == len(event.token_ids) for event in events)


# ---------------------------------------------------------------- cancelling and failing


def test_cancelling_frees_blocks_within_a_step() -> None:
    engine = make_engine()
    long = engine.add(Request.of(prompt_of(50), replace(GREEDY, max_tokens=100, n=3)))
    other = engine.add(Request.of(prompt_of(5, first=3), replace(GREEDY, max_tokens=20)))
    for _ in range(4):
        engine.step()
    engine.cancel(long)
    events = engine.step()
    ends = [event for event in events if event.request_id == long]
    assert [event.finish_reason for event in ends] == [FinishReason.CANCELLED] * 3
    assert [event.is_last for event in ends] == [False, False, True]
    assert engine.pool.num_used == 1
    rest = engine.run_until_done()
    assert len(tokens_of([*events, *rest], 0)) >= 16
    assert rest[-1].request_id == other
    assert engine.pool.num_used == 0


def test_cancelling_stops_the_forward_that_runs() -> None:
    class Slow(FakeExecutor):
        """Waits in a forward until it is cancelled."""

        started = threading.Event()

        def forward(self, step: Step) -> StepOutput:
            self.started.set()
            assert step.cancel is not None
            while not step.cancel.is_set():
                pass
            return super().forward(step)

    engine = make_engine(executor=Slow)
    request_id = engine.add(Request.of([1, 2, 3], GREEDY))
    worker = threading.Thread(target=engine.step)
    worker.start()
    assert Slow.started.wait(10)
    engine.cancel(request_id)
    worker.join(10)
    assert not worker.is_alive()
    (event,) = engine.step()
    assert event.finish_reason == FinishReason.CANCELLED
    assert engine.pool.num_used == 0


def test_a_failure_ends_only_who_causes_it() -> None:
    engine = make_engine()
    executor_of(engine).fails_on = 15
    good, bad = Request.of([1, 2, 3], GREEDY), Request.of([1, 2, 15], GREEDY)
    alone = tokens_of(finish(make_engine(), good)[0])
    first, failed, second = finish(engine, good, bad, good)
    assert tokens_of(first) == tokens_of(second) == alone
    assert failed[-1].finish_reason == FinishReason.ERROR
    assert isinstance(failed[-1].error, Failure)
    assert engine.pool.num_used == 0


def test_a_passing_failure_ends_nobody() -> None:
    engine = make_engine()
    executor_of(engine).fails_at = {2}
    results = finish(engine, *(Request.of([i, 2, 3], GREEDY) for i in (1, 2, 3)))
    assert engine.stats.num_failed_steps == 1
    assert all(events[-1].finish_reason == FinishReason.LENGTH for events in results)


def test_a_scheduler_that_breaks_its_contract_is_named_and_everyone_is_told() -> None:
    told: list[Event] = []
    engine = make_engine()
    engine.add(Request.of([1, 2, 3], GREEDY), told.append)
    engine.scheduler.technique.schedule = lambda views, budget: {views[0].stream_id: 99}
    with pytest.raises(VivaceError, match="the scheduler 'chunked' gave 99 rows to a stream"):
        engine.step()
    assert [event.finish_reason for event in told] == [FinishReason.ERROR]
    assert not engine.has_work


def test_a_closed_engine_takes_nothing() -> None:
    told: list[Event] = []
    engine = make_engine()
    engine.add(Request.of([1], GREEDY), told.append)
    engine.close()
    assert [event.finish_reason for event in told] == [FinishReason.CANCELLED]
    assert engine.pool.num_used == 0
    with pytest.raises(VivaceError, match="closed"):
        engine.add(Request.of([1], GREEDY))


def test_many_threads_may_ask() -> None:
    engine = make_engine(num_blocks=64)
    alone = tokens_of(finish(make_engine(), Request.of([1, 2], GREEDY))[0])
    results: list[list[int]] = []

    def ask() -> None:
        told: list[Event] = []
        for _ in range(10):
            told.clear()
            engine.add(Request.of([1, 2], GREEDY), told.append)
            while not (told and told[-1].is_last):
                engine.step()
            results.append(tokens_of(told))

    workers = [threading.Thread(target=ask) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [alone] * 40
    assert engine.pool.num_used == 0


def test_what_a_listener_of_logits_raises_ends_its_request_only() -> None:
    def fail(logits: np.ndarray) -> None:
        raise KeyError("a mistake of the caller")

    engine = make_engine()
    bad, good = finish(
        engine,
        Request.of([1, 2, 3], kind=RequestKind.SCORE, on_logits=fail),
        Request.of([1, 2, 3], GREEDY),
    )
    assert isinstance(bad[-1].error, KeyError)
    assert good[-1].finish_reason == FinishReason.LENGTH
    assert engine.pool.num_used == 0


def test_a_listener_that_raises_takes_nothing_from_others() -> None:
    def fail(event: Event) -> None:
        raise KeyError("a mistake of the caller")

    engine, told = make_engine(), []
    engine.add(Request.of([1], replace(GREEDY, max_tokens=1)), fail)
    engine.add(Request.of([2], replace(GREEDY, max_tokens=1)), told.append)
    with pytest.raises(KeyError):
        engine.step()
    assert told[-1].is_last
    assert not engine.has_work


def test_an_interrupted_step_ends_everyone_and_leaks_nothing() -> None:
    engine, told = make_engine(), []
    engine.add(Request.of([1, 2], GREEDY), told.append)
    schedule = engine.scheduler.technique.schedule

    def interrupt(views, budget):
        raise KeyboardInterrupt

    engine.scheduler.technique.schedule = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert told[-1].finish_reason == FinishReason.ERROR
    assert engine.pool.num_used == 0
    engine.scheduler.technique.schedule = schedule
    (events,) = finish(engine, Request.of([1, 2], GREEDY))
    assert events[-1].finish_reason == FinishReason.LENGTH


def test_an_interrupted_forward_changes_nothing() -> None:
    class Interrupted(FakeExecutor):
        def forward(self, step: Step) -> StepOutput:
            if self.num_forwards == 1:
                self.num_forwards += 1
                raise KeyboardInterrupt
            return super().forward(step)

    engine, told = make_engine(executor=Interrupted), []
    engine.add(Request.of([1, 2], GREEDY), told.append)
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.run_until_done()
    alone = finish(make_engine(), Request.of([1, 2], GREEDY))[0]
    assert tokens_of(told) == tokens_of(alone)


def test_a_step_in_a_step_does_nothing() -> None:
    """A stream that is collected while a step runs must not wait for that step."""
    engine, told = make_engine(), []
    engine.add(Request.of([1], GREEDY), lambda event: told.append(engine.step()))
    engine.run_until_done()
    assert told == [[]] * 4


def test_work_that_only_another_thread_sees_is_work() -> None:
    engine, seen = make_engine(), []
    engine.add(Request.of([1], GREEDY))
    enqueue = engine._inbox.pop()

    def look() -> None:
        seen.append(engine.has_work)
        enqueue()

    engine._inbox.append(look)
    engine.run_until_done()
    assert seen == [True]


def test_a_broken_detokenizer_leaves_no_request_behind() -> None:
    def broken(token_ids: Sequence[int]) -> FakeDetokenizer:
        raise ZeroDivisionError

    engine = make_engine(detokenizer=broken)
    with pytest.raises(ZeroDivisionError):
        engine.add(Request.of([1], GREEDY))
    assert len(engine.jobs) == 0
    assert not engine.has_work


def test_given_embeddings_are_copied_and_finite() -> None:
    rows = np.full((8, 2), 20, np.float32)
    segment = InputSegment(InputKind.EMBEDDINGS, rows)
    request = Request((segment, InputSegment.tokens([1, 2])), GREEDY)
    (expected,) = finish(make_engine(), request)
    engine = make_engine()
    request_id = engine.add(request)
    rows[:] = np.nan
    events = [event for event in engine.run_until_done() if event.request_id == request_id]
    assert tokens_of(events) == tokens_of(expected)
    for bad in (np.nan, 1e300):
        large = InputSegment(InputKind.EMBEDDINGS, np.full((1, 2), bad))
        with pytest.raises(InvalidRequest, match="finite"):
            engine.add(Request((large,), GREEDY))
    assert len(engine.jobs) == 0


def test_given_rows_are_no_tokens_of_the_history() -> None:
    segment = InputSegment(InputKind.EMBEDDINGS, np.ones((3, 2), np.float32))
    request = Request((InputSegment.tokens([5]), segment, InputSegment.tokens([6])), GREEDY)
    assert make_engine().sequence(request).history() == ([5, 6], 2)


def test_rows_before_the_scored_ones_run_in_whole_chunks() -> None:
    engine = make_engine(limits=Limits(max_scored_rows=5), sampler=FakeSampler(5))
    finish(engine, Request.of(prompt_of(129), kind=RequestKind.SCORE, first_scored=128))
    assert engine.stats.num_forwards == 2


def test_an_engine_is_not_made_with_values_it_would_change() -> None:
    made = make_engine()
    for max_context in (0, -1, 257):
        with pytest.raises(InvalidOption, match="expected 1 to 256"):
            Engine(made.executor, made.plan, sampler=FakeSampler(), max_context=max_context)
    assert make_engine(eos_ids=[EOS, VOCAB_SIZE]).eos_ids == {EOS}
