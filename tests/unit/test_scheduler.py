"""The chunked scheduler, as pure policy: decodes ride along with prompt chunks, nobody starves."""

from __future__ import annotations

import pytest

from vivace.errors import InvalidOption
from vivace.registry import seams
from vivace.techniques.schedulers.base import Budget, StreamView, WaitingView
from vivace.types import Demand, Signals


def scheduler(**options):
    return seams()["schedulers"].create("chunked", **options)


def prompt(stream: int, rows: int, priority: int = 0, age: int = 0) -> StreamView:
    signals = Signals(priority=priority)
    return StreamView(stream, stream, age, Demand(max_rows=rows), True, 0, 0, signals)


def decode(stream: int, priority: int = 0, age: int = 0) -> StreamView:
    return StreamView(stream, stream, age, Demand(), False, 10, 1, Signals(priority=priority))


def waiting(stream: int, priority: int = 0, age: int = 0) -> WaitingView:
    return WaitingView(stream, stream, age, 10, False, Signals(priority=priority))


BUDGET = Budget(max_rows=64, max_streams=8, free_blocks=100)


def test_decodes_come_before_chunks_and_chunks_fill_the_step() -> None:
    views = [prompt(0, 100), decode(1), decode(2), prompt(3, 100)]
    assert scheduler(chunk_size=16).schedule(views, BUDGET) == {1: 1, 2: 1, 0: 16}
    assert scheduler(chunk_size=512).schedule(views, BUDGET) == {1: 1, 2: 1, 0: 62}


def test_a_chunk_may_hold_several_prompts_oldest_first() -> None:
    views = [prompt(2, 10), prompt(0, 4), prompt(1, 5)]
    assert scheduler(chunk_size=12).schedule(views, BUDGET) == {0: 4, 1: 5, 2: 3}


def test_the_budget_of_streams_holds() -> None:
    budget = Budget(max_rows=64, max_streams=2, free_blocks=100)
    assert list(scheduler().schedule([decode(i) for i in range(4)], budget)) == [0, 1]


def test_priority_then_arrival_then_age() -> None:
    chunked = scheduler(patience=100)
    views = [waiting(0), waiting(1, priority=2), waiting(2), waiting(3, priority=-1)]
    assert chunked.admit(views, 0, BUDGET) == [1, 0, 2, 3]
    views.append(waiting(4, priority=-5, age=101))
    assert chunked.admit(views, 0, BUDGET)[0] == 4


def test_the_least_urgent_is_preempted_first_and_an_old_one_last() -> None:
    chunked = scheduler(patience=100)
    views = [decode(0), decode(1, priority=1), decode(2), prompt(3, 5, priority=-1, age=101)]
    assert chunked.preempt(views, 1) == [2, 0, 1, 3]


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"patience": -1}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        scheduler(**options)
