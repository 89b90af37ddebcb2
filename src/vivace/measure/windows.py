"""A long text is read through windows of the context; every token is counted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vivace.errors import InvalidOption, InvalidRequest

__all__ = ["Interval", "Window", "log_softmax", "mean_interval", "windows"]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to feed, and how many at the end are counted: the others are context only."""

    token_ids: list[int]
    num_counted: int


def windows(
    token_ids: Sequence[int],
    size: int,
    stride: int | None = None,
    bos: int | None = None,
) -> Iterator[Window]:
    """Windows of at most `size` tokens, `stride` apart (default: no overlap).

    With `bos` every window starts with that token, as the model was trained to see, and `size`
    includes it. The first token of a window without anything before it cannot be predicted and is
    never counted. Raises `InvalidOption` for a stride that is not in [1, size],
    `InvalidRequest` if fewer than two tokens are there to predict from.
    """
    head = [] if bos is None else [bos]
    room = size - len(head)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise InvalidOption(f"stride is {stride}: expected 1 to {room}, the tokens of a window")
    if len(head) + len(token_ids) < 2:
        raise InvalidRequest(
            f"the text has {len(token_ids)} tokens: at least 2 are needed to predict one of them"
        )
    counted_to = 0
    for first in range(0, len(token_ids), stride):
        last = min(first + room, len(token_ids))
        tokens = head + list(token_ids[first:last])
        num_counted = min(last - counted_to, len(tokens) - 1)
        if num_counted:
            yield Window(tokens, num_counted)
        counted_to = last
        if last == len(token_ids):
            return


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of rows: [rows, vocab] float32 -> [rows, vocab] float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> Interval | None:
    """95% interval of sum(sums) / sum(counts), from how windows differ; None for one window.

    Source: percentile bootstrap over windows (Efron 1979), 1,000 draws from a fixed seed.
    """
    num_windows = len(counts)
    if num_windows < 2:
        return None
    picks = np.random.default_rng(0).integers(num_windows, size=(1000, num_windows))
    means = np.asarray(sums, float)[picks].sum(axis=1) / np.asarray(counts)[picks].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(high))
