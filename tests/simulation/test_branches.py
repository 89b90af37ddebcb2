"""Branches: what they share, what they cost, how they end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from test_engine import GREEDY, executor_of, finish, make_engine, prompt_of, tokens_of
from world import draw_token, reference_logits

from vivace.engine import Engine, FinishReason, Request
from vivace.engine.branch import Branch
from vivace.errors import InvalidRequest, VivaceError
from vivace.types import RandomKey, SamplingParams

SAMPLED = SamplingParams(seed=5, max_tokens=6, ignore_eos=True)


def continuation(tokens: list[int], stream: int, count: int) -> list[int]:
    known = list(tokens)
    for _ in range(count):
        key = RandomKey(5, stream, len(known))
        known.append(draw_token(reference_logits(known, [None]), SAMPLED, key, ()))
    return known[len(tokens) :]


def drop_all(engine: Engine, *branches: Branch) -> None:
    for branch in branches:
        branch.drop()
    engine.run_until_done()
    assert engine.pool.num_used == 0
    engine.pool.check([])


def test_eight_forks_of_1024_tokens_add_at_most_eight_blocks() -> None:
    engine = make_engine(max_context=2048, block_size=16)

    async def main() -> list[Branch]:
        root = engine.branch(prompt_of(1024), SAMPLED)
        await root.tree.prefill()
        before = engine.pool.num_used
        forks = [root.fork() for _ in range(8)]
        await asyncio.gather(*(fork.extend(max_tokens=1) for fork in forks))
        assert engine.pool.num_used - before <= 8
        return [root, *forks]

    branches = asyncio.run(main())
    assert engine.stats.num_prompt_rows <= 1024 + 8
    drop_all(engine, *branches)


def test_a_fork_takes_a_random_stream_of_its_own() -> None:
    engine = make_engine(block_size=4)
    prompt = prompt_of(10)

    async def main() -> list[Branch]:
        root = engine.branch(prompt, SAMPLED)
        await root.score([1, 2])  # takes no number
        forks = [root.fork() for _ in range(3)]
        await asyncio.gather(*(branch.extend() for branch in (root, *forks)))
        child = forks[1].fork()
        await child.extend(max_tokens=3)
        return [root, *forks, child]

    branches = asyncio.run(main())
    for stream, branch in enumerate(branches[:4]):
        assert branch.token_ids == prompt + continuation(prompt, stream, 6)
    assert branches[4].token_ids == branches[2].token_ids + continuation(
        branches[2].token_ids, 4, 3
    )
    drop_all(engine, *branches)


def test_extending_twice_is_extending_once() -> None:
    engine = make_engine(block_size=4)

    async def main(*counts: int) -> list[int]:
        root = engine.branch(prompt_of(9), SAMPLED)
        for count in counts:
            await root.extend(max_tokens=count)
        root.drop()
        return root.token_ids

    assert asyncio.run(main(12)) == asyncio.run(main(5, 1, 6))


def test_branches_outlive_eviction() -> None:
    """A pool too small for all idle branches: their cache is computed again, their tokens stay."""
    engine = make_engine(block_size=4, num_blocks=12, max_context=40)
    prompt = prompt_of(20)

    async def main() -> list[Branch]:
        root = engine.branch(prompt, SAMPLED)
        forks = [root.fork() for _ in range(4)]
        for _ in range(3):
            await asyncio.gather(*(fork.extend(max_tokens=5) for fork in forks))
        return [root, *forks]

    branches = asyncio.run(main())
    for stream, branch in enumerate(branches[1:], 1):
        assert branch.token_ids == prompt + continuation(prompt, stream, 15)
    assert engine.stats.num_preemptions > 0
    drop_all(engine, *branches)


def test_score_leaves_the_branch_as_it_was() -> None:
    engine = make_engine(block_size=4)
    prompt = prompt_of(11)

    async def main() -> tuple[Branch, np.ndarray, np.ndarray]:
        root = engine.branch(prompt, SAMPLED)
        first = await root.score([3, 4, 5])
        await root.extend(max_tokens=2)
        return root, first, await root.score([7])

    root, first, second = asyncio.run(main())
    assert root.token_ids == prompt + continuation(prompt, 0, 2)
    expected = [
        reference_logits([*prompt, *(3, 4, 5)[:i]], [None])[token]
        for i, token in enumerate((3, 4, 5))
    ]
    assert np.array_equal(first, np.array(expected, np.float32))
    assert second[0] == reference_logits(root.token_ids, [None])[7]
    drop_all(engine, root)


def test_one_budget_covers_the_tree() -> None:
    engine = make_engine()

    async def main() -> list[Branch]:
        root = engine.branch(prompt_of(5), SAMPLED, max_total_tokens=10)
        child = root.fork()
        await asyncio.gather(root.extend(max_tokens=6), child.extend(max_tokens=6))
        assert await child.extend(max_tokens=6) == ""
        assert child.finish_reason == FinishReason.LENGTH
        return [root, child]

    root, child = asyncio.run(main())
    assert root.num_tokens + child.num_tokens == 5 + 5 + 10
    drop_all(engine, root, child)


def test_a_watcher_cancels_a_branch_in_the_middle() -> None:
    engine = make_engine(max_context=2000)

    async def main() -> Branch:
        root = engine.branch(prompt_of(5), replace(SAMPLED, max_tokens=1000))

        async def watch() -> None:
            while len(root.text) < 5:
                await asyncio.sleep(0)
            root.cancel()

        text, _ = await asyncio.gather(root.extend(), watch())
        assert 5 <= len(text) < 900
        assert root.finish_reason == FinishReason.CANCELLED
        return root

    root = asyncio.run(main())
    assert root.token_ids[5:] == continuation(prompt_of(5), 0, root.num_tokens - 5)
    drop_all(engine, root)


def test_a_cancelled_coroutine_cancels_its_request() -> None:
    engine = make_engine(max_context=2000)

    async def main() -> Branch:
        root = engine.branch(prompt_of(5), replace(SAMPLED, max_tokens=1000))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(root.extend(), 0.05)
        while engine.has_work:
            await asyncio.sleep(0)
        assert len(engine.jobs) == 0
        return root

    drop_all(engine, asyncio.run(main()))


def test_until_and_appended_tokens() -> None:
    engine = make_engine(max_context=2000)

    async def main() -> Branch:
        root = engine.branch(prompt_of(5), replace(SAMPLED, max_tokens=500))
        text = await root.extend(until="cab")
        assert text.endswith("cab")
        assert root.finish_reason == FinishReason.STOP
        before = root.token_ids
        root.append([4, 5, 6])
        await root.extend(max_tokens=2)
        assert root.token_ids[:-2] == [*before, 4, 5, 6]
        assert root.token_ids[-2:] == continuation(root.token_ids[:-2], 0, 2)
        return root

    drop_all(engine, asyncio.run(main()))


def test_misuse_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="empty"):
        engine.branch([])

    async def main() -> None:
        root = engine.branch(prompt_of(5), SAMPLED)
        work = asyncio.ensure_future(root.extend())
        await asyncio.sleep(0)
        with pytest.raises(VivaceError, match="at work"):
            root.fork()
        await work
        root.drop()
        root.drop()
        with pytest.raises(VivaceError, match="dropped"):
            await root.extend()

    asyncio.run(main())
    engine.run_until_done()
    assert engine.pool.num_used == 0


def test_a_failure_reaches_the_coroutine_and_nobody_else() -> None:
    engine = make_engine()
    executor_of(engine).fails_on = 15

    async def main() -> None:
        good, bad = engine.branch([1, 2, 3], GREEDY), engine.branch([1, 15, 3], GREEDY)
        text, error = await asyncio.gather(good.extend(), bad.extend(), return_exceptions=True)
        assert isinstance(text, str)
        assert isinstance(error, VivaceError)
        good.drop()
        bad.drop()

    asyncio.run(main())
    engine.run_until_done()
    assert engine.pool.num_used == 0


def test_streaming_and_leaving_early() -> None:
    engine = make_engine(max_context=2000)
    request = Request.of(prompt_of(5), replace(SAMPLED, max_tokens=1000))

    async def main() -> None:
        subscription = engine.driver.submit(request)
        count = 0
        events = subscription.events()
        async for _ in events:
            count += 1
            if count == 3:
                break
        await events.aclose()
        while engine.has_work:
            await asyncio.sleep(0)
        assert engine.pool.num_used == 0

    asyncio.run(main())
    (events,) = finish(engine, replace(request, params=SAMPLED))
    assert tokens_of(events) == continuation(prompt_of(5), 0, 6)


def test_a_broken_scheduler_leaves_no_coroutine_waiting() -> None:
    engine = make_engine()

    def fail(views, budget):
        raise ZeroDivisionError("a technique's mistake")

    engine.scheduler.technique.schedule = fail

    async def main() -> list[str | BaseException]:
        roots = [engine.branch(prompt_of(5, first), SAMPLED) for first in (1, 2)]
        work = asyncio.gather(*(root.extend() for root in roots), return_exceptions=True)
        return await asyncio.wait_for(work, 10)

    assert all(isinstance(result, VivaceError) for result in asyncio.run(main()))
    assert len(engine.jobs) == 0


@pytest.mark.parametrize("tokens", [[1.5], [2**40], ["a"], None, [None], [[1]], [True], "ab"])
def test_tokens_that_are_none_are_refused_and_others_live(tokens) -> None:
    engine = make_engine()

    async def main() -> Branch:
        root = engine.branch(prompt_of(5), SAMPLED)
        with pytest.raises(InvalidRequest, match="whole token ids"):
            root.append(tokens)
        await root.extend()
        return root

    root = asyncio.run(main())
    assert root.token_ids == prompt_of(5) + continuation(prompt_of(5), 0, 6)
    drop_all(engine, root)


def test_a_prefill_that_failed_is_tried_again() -> None:
    engine = make_engine()
    executor_of(engine).fails_on = 15

    async def extend(root: Branch) -> str:
        return await root.extend()

    root = engine.branch([1, 15, 3], SAMPLED)
    with pytest.raises(VivaceError):
        asyncio.run(extend(root))
    executor_of(engine).fails_on = None
    asyncio.run(extend(root))
    root_tokens = root.token_ids
    assert root_tokens == [1, 15, 3, *continuation([1, 15, 3], 0, 6)]
    drop_all(engine, root)


def test_a_cancelled_coroutine_leaves_a_branch_that_goes_on() -> None:
    engine = make_engine(max_context=2000)
    prompt = prompt_of(5)

    async def main() -> Branch:
        root = engine.branch(prompt, replace(SAMPLED, max_tokens=1000), max_total_tokens=1500)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(root.extend(), 0.03)
        known = root.token_ids
        await asyncio.sleep(0.01)
        assert root.token_ids == known, "a step in flight goes on"
        assert root.tree.tokens_left == 1500 - (len(known) - 5)
        await root.extend(max_tokens=2)
        return root

    root = asyncio.run(main())
    assert root.token_ids[5:] == continuation(prompt, 0, root.num_tokens - 5)
    drop_all(engine, root)


def test_a_branch_is_cancelled_from_another_thread() -> None:
    engine = make_engine(max_context=2000)

    async def main() -> Branch:
        root = engine.branch(prompt_of(5), replace(SAMPLED, max_tokens=1900))

        async def watch() -> None:
            while len(root.text) < 5:
                await asyncio.sleep(0)
            await asyncio.to_thread(root.cancel)

        await asyncio.gather(root.extend(), watch())
        assert root.finish_reason == FinishReason.CANCELLED
        return root

    drop_all(engine, asyncio.run(main()))


def test_what_a_branch_would_ignore_is_refused() -> None:
    engine = make_engine()

    async def main() -> Branch:
        root = engine.branch(prompt_of(5), SAMPLED, max_total_tokens=10)
        for params in (replace(SAMPLED, seed=6), replace(SAMPLED, prompt_logprobs=1)):
            with pytest.raises(InvalidRequest):
                await root.extend(params=params)
        assert root.tree.tokens_left == 10
        assert (await root.score([])).shape == (0,)
        return root

    drop_all(engine, asyncio.run(main()))


def test_event_loops_are_not_kept() -> None:
    engine = make_engine()

    async def main() -> None:
        async for _ in engine.driver.submit(Request.of([1], GREEDY)).events():
            pass
        while engine.has_work or len(engine.driver._tasks):
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_work_goes_on_after_a_step_that_failed() -> None:
    """A mistake of one step's technique does not strand what was queued meanwhile."""
    engine = make_engine()
    schedule = engine.scheduler.technique.schedule
    calls = []

    def fail_once(views, budget):
        calls.append(1)
        if len(calls) == 1:
            late.append(engine.driver.engine.add(Request.of([1], GREEDY), told.append))
            raise ZeroDivisionError
        return schedule(views, budget)

    late, told = [], []
    engine.scheduler.technique.schedule = fail_once

    async def main() -> None:
        async for _ in engine.driver.submit(Request.of([2], GREEDY)).events():
            pass
        while not (told and told[-1].is_last):
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), 10))
    assert told[-1].finish_reason == FinishReason.LENGTH
