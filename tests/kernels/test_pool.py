"""The thread pool: every item once, whatever the threads; alive after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from vivace import _native
from vivace.techniques.weight_formats.base import Packed


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 7, 1000])
def test_every_item_runs_once_per_job(threads: int, items: int) -> None:
    assert set(_native.pool_counts(threads, items, 50)) == {50}


def test_callers_of_one_pool_queue_up() -> None:
    weight = np.ones((64, 32), np.float32)
    linear = _native.Linear([(Packed("float32", weight.shape, weight), None)], "", 3)
    x = np.ones((40, 32), np.float32)
    wrong: list[int] = []

    def call() -> None:
        for _ in range(50):
            if not (linear(x) == 32).all():
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_pool_works_in_the_child_of_a_fork() -> None:
    weight = np.ones((64, 32), np.float32)
    linear = _native.Linear([(Packed("float32", weight.shape, weight), None)], "", 3)
    x = np.ones((40, 32), np.float32)
    assert (linear(x) == 32).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: what is tested
        child = os.fork()
    if child == 0:
        os._exit(0 if (linear(x) == 32).all() and (linear(x[:1]) == 32).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (linear(x) == 32).all()


def test_one_thread_means_no_other_thread() -> None:
    code = (
        "import os\nfrom vivace import _native\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "_native.pool_counts(1, 1000, 10)\n"
        "assert len(os.listdir('/proc/self/task')) == before\n"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_default_threads_respect_the_affinity_mask() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert _native.default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= _native.default_threads() <= len(allowed)


@pytest.mark.parametrize("threads", [-1, 5000])
def test_a_bad_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 1 to 1024"):
        _native.pool_counts(threads, 1, 1)
