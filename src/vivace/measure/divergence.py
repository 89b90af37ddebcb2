"""How far one plan's predictions are from another's, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vivace.measure.perplexity import Logits
from vivace.measure.windows import Interval, Window, log_softmax, mean_interval

__all__ = ["Divergence", "divergence"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(current || other) in nats per token, and how often both prefer the same token."""

    mean: float
    interval: Interval | None  # 95%, of the mean
    p99: float
    max: float
    top1_agreement: float  # share of tokens, 0 to 1
    top1_interval: Interval | None
    num_tokens: int
    num_windows: int


def divergence(current: Logits, other: Logits, windows: Iterable[Window]) -> Divergence:
    """Compare whole distributions over the vocabulary, a block of rows at a time."""
    per_token: list[np.ndarray] = []  # one array per window
    agreed: list[int] = []
    for window in windows:
        parts = list(_compare(current, other, window))
        per_token.append(np.concatenate([kl for kl, _ in parts]))
        agreed.append(sum(int(same.sum()) for _, same in parts))
    counts = [len(kl) for kl in per_token]
    everything = np.concatenate(per_token)
    return Divergence(
        mean=math.fsum(everything) / len(everything),
        interval=mean_interval([math.fsum(kl) for kl in per_token], counts),
        p99=float(np.quantile(everything, 0.99)),
        max=float(everything.max()),
        top1_agreement=sum(agreed) / len(everything),
        top1_interval=mean_interval(agreed, counts),
        num_tokens=len(everything),
        num_windows=len(counts),
    )


def _compare(
    current: Logits, other: Logits, window: Window
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """KL and agreement of the counted rows, by block: ([rows] float64, [rows] bool)."""
    num_rows = len(window.token_ids) - 1  # the last row predicts what the text does not say
    first = num_rows - window.num_counted
    row = 0
    for ours, theirs in _aligned(current(window.token_ids), other(window.token_ids)):
        begin, end = max(row, first), min(row + len(ours), num_rows)
        if begin < end:
            p = log_softmax(ours[begin - row : end - row])
            q = log_softmax(theirs[begin - row : end - row])
            # A masked token has probability 0 and adds nothing: 0 log 0 is 0.
            gap = np.subtract(p, q, out=np.zeros_like(p), where=~np.isneginf(p))
            kl = (np.exp(p) * gap).sum(axis=-1)
            yield np.maximum(kl, 0.0), p.argmax(axis=-1) == q.argmax(axis=-1)
        row += len(ours)


def _aligned(
    first: Iterable[np.ndarray], second: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows of both, whose blocks may be cut differently: plans choose chunk sizes."""
    sources = iter(first), iter(second)
    left, right = (next(source, None) for source in sources)
    while left is not None and right is not None:
        num_rows = min(len(left), len(right))
        yield left[:num_rows], right[:num_rows]
        left = left[num_rows:] if len(left) > num_rows else next(sources[0], None)
        right = right[num_rows:] if len(right) > num_rows else next(sources[1], None)
    assert left is None, "the second has fewer rows"
    assert right is None, "the first has fewer rows"
