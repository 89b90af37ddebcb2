"""Perplexity: how surprised a model is by a text, per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vivace.measure.windows import Interval, Window, log_softmax, mean_interval

__all__ = ["Perplexity", "perplexity"]

# The logits that follow each token of a prompt, in blocks of rows: [rows, vocab] float32.
Logits = Callable[[Sequence[int]], Iterable[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Perplexity:
    perplexity: float
    interval: Interval | None  # 95%
    nll: float  # nats per token
    num_tokens: int
    num_windows: int


def perplexity(logits: Logits, windows: Iterable[Window]) -> Perplexity:
    """exp of the mean negative log-likelihood over all counted tokens of all windows."""
    sums, counts = [], []
    for window in windows:
        sums.append(-math.fsum(target_logprobs(logits, window)))
        counts.append(window.num_counted)
    nll = math.fsum(sums) / sum(counts)
    interval = mean_interval(sums, counts)
    if interval is not None:
        interval = Interval(_exp(interval.low), _exp(interval.high))
    return Perplexity(_exp(nll), interval, nll, sum(counts), len(counts))


def target_logprobs(logits: Logits, window: Window) -> list[float]:
    """Log-probability of each counted token given those before it."""
    tokens = np.asarray(window.token_ids)
    first = len(tokens) - window.num_counted  # index of the first counted token
    found: list[float] = []
    row = 0
    for block in logits(window.token_ids):
        begin = max(row, first - 1)  # row i predicts token i + 1
        end = min(row + len(block), len(tokens) - 1)
        if begin < end:
            rows = log_softmax(block[begin - row : end - row])
            found += rows[np.arange(end - begin), tokens[begin + 1 : end + 1]].tolist()
        row += len(block)
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
