"""Perplexity and divergence against their definitions, over random logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from vivace.errors import InvalidOption, InvalidRequest
from vivace.measure.divergence import divergence
from vivace.measure.perplexity import perplexity
from vivace.measure.windows import log_softmax, mean_interval, windows

VOCAB = 11


class Model:
    """Logits that depend on the token and its place; given out in blocks of `rows`."""

    def __init__(self, seed: int, rows: int) -> None:
        self.table = np.random.default_rng(seed).normal(size=(64, VOCAB, VOCAB)) * 3
        self.rows = rows

    def all_logits(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.stack([self.table[i, t] for i, t in enumerate(token_ids)]).astype(np.float32)

    def __call__(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        everything = self.all_logits(token_ids)
        for first in range(0, len(everything), self.rows):
            yield everything[first : first + self.rows]


def tokens(count: int) -> list[int]:
    return np.random.default_rng(5).integers(VOCAB, size=count).tolist()


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row.astype(np.float64))
    return powers / powers.sum()


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize(
    ("count", "size", "stride"), [(20, 8, None), (20, 8, 3), (8, 8, 1), (5, 9, 2)]
)
def test_windows_count_every_token_once(
    count: int, size: int, stride: int | None, bos: int | None
) -> None:
    text = tokens(count)
    counted = []
    for window in windows(text, size, stride, bos):
        assert len(window.token_ids) <= size
        assert bos is None or window.token_ids[0] == bos
        counted += window.token_ids[-window.num_counted :]
    # Without a first token to predict from, the start of each window that overlaps none is lost.
    if bos is not None:
        assert counted == text
    elif stride is not None:
        assert counted == text[1:]
    else:
        assert counted == [t for i, t in enumerate(text) if i % size]


def test_windows_refuse_what_cannot_be_measured() -> None:
    with pytest.raises(InvalidRequest, match="1 tokens: at least 2"):
        list(windows([4], 8))
    with pytest.raises(InvalidOption, match="stride is 9: expected 1 to 8"):
        list(windows(tokens(20), 8, 9))
    with pytest.raises(InvalidOption, match="stride is 0"):
        list(windows(tokens(20), 8, 0))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_perplexity_is_exp_of_the_mean_nll(rows: int) -> None:
    model, text = Model(1, rows), tokens(30)
    expected = []
    for window in windows(text, 8, 5):
        logits = model.all_logits(window.token_ids)
        for row in range(len(logits) - 1 - window.num_counted, len(logits) - 1):
            expected.append(-math.log(softmax(logits[row])[window.token_ids[row + 1]]))
    result = perplexity(model, windows(text, 8, 5))
    assert result.num_tokens == len(expected) == 29
    assert result.nll == pytest.approx(np.mean(expected), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-12)
    assert result.interval is not None
    assert result.interval.low < result.perplexity < result.interval.high


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_divergence_compares_whole_distributions(rows: int) -> None:
    ours, theirs, text = Model(1, rows), Model(2, rows), tokens(30)
    expected, same = [], []
    for window in windows(text, 8, 5):
        a, b = ours.all_logits(window.token_ids), theirs.all_logits(window.token_ids)
        for row in range(len(a) - 1 - window.num_counted, len(a) - 1):
            p, q = softmax(a[row]), softmax(b[row])
            expected.append((p * np.log(p / q)).sum())
            same.append(a[row].argmax() == b[row].argmax())
    result = divergence(ours, theirs, windows(text, 8, 5))
    assert result.num_tokens == len(expected)
    assert result.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert result.p99 == pytest.approx(np.quantile(expected, 0.99), rel=1e-9)
    assert result.max == pytest.approx(np.max(expected), rel=1e-9)
    assert result.top1_agreement == pytest.approx(np.mean(same))


def test_a_plan_does_not_diverge_from_itself() -> None:
    result = divergence(Model(1, 4), Model(1, 4), windows(tokens(30), 8))
    assert (result.mean, result.p99, result.max, result.top1_agreement) == (0, 0, 0, 1)


def test_a_masked_token_adds_nothing() -> None:
    def masked(token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        logits = Model(1, 64).all_logits(token_ids)
        logits[:, -1] = -np.inf
        yield logits

    assert divergence(masked, masked, windows([1, 2, 3], 8)).max == 0


def test_log_softmax_survives_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32))
    assert rows[0].tolist() == [0, -1e4, -2e4]
    np.testing.assert_allclose(rows[1], -math.log(3), rtol=1e-15)


def test_an_interval_needs_several_windows_and_holds_the_mean() -> None:
    assert mean_interval([3.0], [2]) is None
    sums, counts = [2.0, 9.0, 4.0, 6.0], [2, 6, 3, 5]
    interval = mean_interval(sums, counts)
    assert interval is not None
    assert interval.low < sum(sums) / sum(counts) < interval.high
    assert mean_interval([2.0, 4.0], [1, 2]) == mean_interval([4.0, 8.0], [2, 4])
