"""The sampler against numpy: every option, ties, the draw's distribution, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from vivace import _native
from vivace.errors import NativeError
from vivace.types import Purpose, RandomKey, SamplingParams


@dataclass
class Request:
    """One row: its options, key, and what the options refer to."""

    params: SamplingParams = field(default_factory=SamplingParams)
    key: RandomKey = field(default_factory=lambda: RandomKey(0))
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()


def offsets(lists: list) -> np.ndarray:
    return np.cumsum([0] + [len(item) for item in lists]).astype(np.int64)


def sample(
    logits: np.ndarray, requests: list[Request], **options
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    histories = [(*r.prompt, *r.generated) for r in requests]
    biases = [r.params.logit_bias for r in requests]
    tokens, logprobs = _native.sample(
        np.ascontiguousarray(logits, np.float32),
        np.array([option_row(r.params) for r in requests]),
        np.array(
            [[r.key.seed, r.key.stream, r.key.position, r.key.purpose] for r in requests],
            np.uint64,
        ),
        (
            offsets(histories),
            np.array([len(r.prompt) for r in requests], np.int64),
            np.array([t for h in histories for t in h], np.int32),
        ),
        (
            offsets(biases),
            np.array([t for b in biases for t in b], np.int32),
            np.array([v for b in biases for v in b.values()], np.float32),
        ),
        (
            offsets([r.forbidden for r in requests]),
            np.array([t for r in requests for t in r.forbidden], np.int32),
        ),
        **options,
    )
    return tokens, logprobs or ()


def option_row(params: SamplingParams) -> list[float]:
    return [
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.temperature,
        params.typical_p,
        params.top_p,
        params.min_p,
        params.top_k,
    ]


def distribution(logits: np.ndarray, request: Request) -> np.ndarray:
    """Probabilities [V] from which a token is drawn, in float64."""
    params = request.params
    x = logits.astype(np.float64)
    for token in set(request.prompt + request.generated):
        x[token] *= 1 / params.repetition_penalty if x[token] > 0 else params.repetition_penalty
    for token in set(request.generated):
        count = request.generated.count(token)
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        x[token] += bias
    x[list(request.forbidden)] = -np.inf
    order = np.lexsort((np.arange(len(x)), -x))
    if params.temperature == 0:
        return np.eye(len(x))[order[0]]
    weights = np.exp((x - x.max()) / params.temperature)
    if params.top_k:
        weights[order[params.top_k :]] = 0
    if params.typical_p < 1:
        p = weights / weights.sum()
        information = -np.log(p, where=p > 0, out=np.full_like(p, -np.inf))
        entropy = (p[p > 0] * information[p > 0]).sum()
        distance = np.where(p > 0, np.abs(information - entropy), np.inf)
        weights = head(weights, np.lexsort((np.arange(len(x)), distance)), params.typical_p)
    if params.top_p < 1:
        weights = head(weights, order, params.top_p)
    weights[weights < params.min_p * weights.max()] = 0
    return weights / weights.sum()


def head(weights: np.ndarray, order: np.ndarray, mass: float) -> np.ndarray:
    """Only the first weights in an order whose sum reaches a share of the whole."""
    sums = np.cumsum(weights[order])
    count = int((sums < mass * sums[-1]).sum()) + 1
    kept = np.zeros_like(weights)
    kept[order[:count]] = weights[order[:count]]
    return kept


OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 90},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"typical_p": 0.2, "top_k": 40},
    {"top_k": 50, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"logit_bias": {3: 100.0}},
    {"logit_bias": {0: -100.0, 5: 2.5}, "top_p": 0.7, "temperature": 0.7},
]


@pytest.mark.parametrize("vocab", [1, 63, 1000, 5003])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_what_numpy_draws(options: dict, vocab: int) -> None:
    random = np.random.default_rng(vocab)
    options = dict(options)
    bias = options.pop("logit_bias", {})
    params = SamplingParams(**options, logit_bias={k: v for k, v in bias.items() if k < vocab})
    num_rows = 24
    logits = random.standard_normal((num_rows, vocab)).astype(np.float32) * 3
    requests = [
        Request(
            params,
            RandomKey(int(random.integers(2**63)) * 2 + 1, 5, 2**33 + row, Purpose.DRAFT),
            tuple(random.integers(0, vocab, 6).tolist()),
            tuple(random.integers(0, vocab, 9).tolist()),
            tuple({int(t) for t in random.integers(1, vocab, 3)}) if vocab > 1 else (),
        )
        for row in range(num_rows)
    ]
    tokens, _ = sample(logits, requests)
    for row, request in enumerate(requests):
        p = distribution(logits[row], request)
        assert p[tokens[row]] > 0
        sums = np.cumsum(p)
        u = request.key.uniform()
        if np.abs(sums - u).min() > 1e-5:  # rounding decides nearer to a border
            assert tokens[row] == np.searchsorted(sums, u, side="right")


@pytest.mark.parametrize("peak", [0, 14], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 50},
        {"top_k": 3000},
        {"top_p": 0.95},
        {"min_p": 0.01},
        {"top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_from_a_large_vocabulary(options: dict, peak: int) -> None:
    """What is passed over without a look, by the maxima of tiles, must be what is not kept."""
    vocab, num_rows = 50_021, 8
    random = np.random.default_rng(peak)
    logits = random.standard_normal((num_rows, vocab)).astype(np.float32) * 2
    logits[:, random.integers(0, vocab, 30)] += np.linspace(peak, 0, 30, dtype=np.float32)
    requests = [
        Request(SamplingParams(**options), RandomKey(11, row), forbidden=(int(best), 5))
        for row, best in enumerate(logits.argmax(1))
    ]
    tokens, _ = sample(logits, requests, threads=2)
    for row, request in enumerate(requests):
        p = distribution(logits[row], request)
        assert p[tokens[row]] > 0
        sums, u = np.cumsum(p), request.key.uniform()
        if np.abs(sums - u).min() > 1e-5:
            assert tokens[row] == np.searchsorted(sums, u, side="right")


def test_penalties_and_bias_move_the_maximum() -> None:
    """The largest logit is lowered, raised and forbidden, alone in its tile or not."""
    logits = np.full((4, 1000), -1.0, np.float32)
    logits[:, [70, 71, 500]] = 5, 4, 3
    requests = [
        Request(SamplingParams(temperature=0.0, repetition_penalty=2.0), generated=(70,)),
        Request(SamplingParams(temperature=0.0, logit_bias={500: 10.0})),
        Request(SamplingParams(temperature=0.0), forbidden=(70, 71)),
        Request(SamplingParams(temperature=0.0, logit_bias={999: 50.0}), forbidden=(999,)),
    ]
    tokens, logprobs = sample(logits, requests, num_logprobs=3)
    assert tokens.tolist() == [71, 500, 500, 70]
    assert logprobs[1].tolist() == [[70, 71, 500]] * 4  # of the raw logits


def test_draws_follow_the_distribution() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    num_draws = 40_000
    requests = [
        Request(SamplingParams(temperature=1.2, top_k=25), RandomKey(7, 0, position))
        for position in range(num_draws)
    ]
    tokens, _ = sample(np.repeat(logits, num_draws, 0), requests, threads=2)
    p = distribution(logits[0], requests[0])
    counts = np.bincount(tokens, minlength=40)
    assert (counts[p == 0] == 0).all()
    wanted = p[p > 0] * num_draws
    chi_square = ((counts[p > 0] - wanted) ** 2 / wanted).sum()
    assert chi_square < 51.2  # 24 degrees of freedom, one in a thousand


def test_rows_do_not_know_each_other() -> None:
    random = np.random.default_rng(1)
    logits = random.standard_normal((33, 4001)).astype(np.float32) * 2
    requests = [
        Request(
            SamplingParams(**OPTIONS[row % 13]),
            RandomKey(3, row),
            generated=tuple(random.integers(0, 4001, 5).tolist()),
        )
        for row in range(33)
    ]
    tokens, logprobs = sample(logits, requests, num_logprobs=3, threads=2)
    for row in range(33):
        alone, logprob = sample(logits[row : row + 1], requests[row : row + 1], num_logprobs=3)
        assert alone[0] == tokens[row]
        assert all(
            a[0].tobytes() == b[row].tobytes() for a, b in zip(logprob, logprobs, strict=True)
        )


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_ties_go_to_the_lower_id(options: dict) -> None:
    logits = np.zeros((1, 300), np.float32)
    logits[0, [250, 77, 99]] = 5
    for position in range(20):
        request = Request(SamplingParams(**options), RandomKey(1, 0, position))
        tokens, logprobs = sample(logits, [request], num_logprobs=5)
        assert tokens[0] == 77
        assert logprobs[1][0].tolist() == [77, 99, 250, 0, 1]


def test_logprobs_are_of_the_raw_logits() -> None:
    random = np.random.default_rng(2)
    logits = random.standard_normal((5, 1234)).astype(np.float32) * 4
    raw = logits.astype(np.float64)
    wanted = raw - np.log(np.exp(raw - raw.max(1, keepdims=True)).sum(1, keepdims=True))
    wanted -= raw.max(1, keepdims=True)
    request = Request(SamplingParams(temperature=0.0, logit_bias={9: 100.0}))
    tokens, (own, top_ids, top) = sample(logits, [request] * 5, num_logprobs=7)
    assert tokens.tolist() == [9] * 5
    np.testing.assert_allclose(own, wanted[:, 9], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(top_ids, np.argsort(-logits, 1, kind="stable")[:, :7])
    np.testing.assert_allclose(top, np.take_along_axis(wanted, top_ids.astype(int), 1), atol=1e-5)
    targets = random.integers(0, 1234, 5).astype(np.int32)
    scored, ids, _ = _native.log_probs(logits, targets, num_logprobs=2, threads=2)
    np.testing.assert_allclose(scored, wanted[np.arange(5), targets], atol=1e-5)
    np.testing.assert_array_equal(ids, top_ids[:, :2])


def test_a_flat_distribution_over_a_large_vocabulary() -> None:
    """Top-p keeps most of 150,000 equal tokens: the lowest ids, by the rule for ties."""
    logits = np.zeros((1, 150_001), np.float32)
    for position in range(20):
        request = Request(SamplingParams(top_p=0.5), RandomKey(1, 0, position))
        tokens, _ = sample(logits, [request])
        assert abs(tokens[0] - request.key.uniform() * 75_001) < 2


def test_bad_logits_are_refused() -> None:
    for value, message in ((np.nan, "NaN"), (np.inf, "finite"), (-np.inf, "finite")):
        logits = np.full((2, 100), -np.inf if value < 0 else 0.0, np.float32)
        logits[0] = 0
        logits[1, 70] = value
        for options in OPTIONS[:2]:
            with pytest.raises(NativeError, match=f"row 1.*{message}"):
                sample(logits, [Request(SamplingParams(**options))] * 2)
        with pytest.raises(NativeError, match=f"row 1.*{message}"):
            _native.log_probs(logits, np.zeros(2, np.int32))
    with pytest.raises(NativeError, match="every token of row 0 is forbidden"):
        sample(np.zeros((1, 3)), [Request(forbidden=(0, 1, 2))])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    logits = np.zeros((1, 10), np.float32)
    for request in (
        Request(SamplingParams(presence_penalty=1.0), generated=(10,)),
        Request(SamplingParams(logit_bias={10: 1.0})),
        Request(forbidden=(-1,)),
    ):
        with pytest.raises(NativeError, match="not in the vocabulary of 10"):
            sample(logits, [request])
    with pytest.raises(NativeError, match="target 10"):
        _native.log_probs(logits, np.array([10], np.int32))
