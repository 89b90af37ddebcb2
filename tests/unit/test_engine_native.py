"""The engine over the native executor and sampler: what only real numbers can show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from native_cases import CachedSequence, executor, llama, run

from vivace.engine import Engine, Limits, Request
from vivace.engine.sampling import Draw, NativeSampler
from vivace.errors import NativeError
from vivace.plan import DEFAULTS, Plan, resolve
from vivace.types import InputKind, InputSegment, RandomKey, RequestKind, SamplingParams

PROMPT = [(5 * i + i * i) % 97 for i in range(70)]


def make_engine(window: int | None = None, block_size: int = 16, chunk_size: int = 64) -> Engine:
    graph, weights = llama(window=window)
    plan = Plan.of(schedulers={"name": "chunked", "chunk_size": chunk_size})
    native = executor(graph, weights, threads=1)
    sampler = NativeSampler(native)
    return Engine(
        native,
        resolve(plan.with_defaults(DEFAULTS)),
        sampler=sampler,
        block_size=block_size,
        limits=Limits(max_scored_rows=9),
        max_context=192,
    )


def logits_of(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Logits after each token but the last: [n - 1, vocab]."""
    blocks: list[np.ndarray] = []
    engine.add(Request.of(tokens, kind=RequestKind.SCORE, on_logits=blocks.append))
    engine.run_until_done()
    return np.concatenate(blocks)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_blocks_that_leave_a_window_take_no_bits_with_them(
    block_size: int, chunk_size: int
) -> None:
    graph, weights = llama(window=20)
    whole = run(executor(graph, weights), CachedSequence.of(PROMPT, range(5)), len(PROMPT))
    engine = make_engine(20, block_size, chunk_size)
    assert np.array_equal(logits_of(engine, PROMPT), whole[:-1])
    engine.add(Request.of(PROMPT, SamplingParams(temperature=0, max_tokens=60)))
    events = engine.run_until_done()
    tokens = PROMPT + [token for event in events for token in event.token_ids]
    again = run(executor(graph, weights), CachedSequence.of(tokens, range(9)), 64)
    assert np.argmax(again[len(PROMPT) - 1 : -1], 1).tolist() == tokens[len(PROMPT) :]


def test_given_embeddings_run_like_the_tokens_they_stand_for() -> None:
    graph, weights = llama()
    rows = weights[graph.embedding.weight.name][PROMPT[10:20]].astype(np.float32)
    segments = (
        InputSegment.tokens(PROMPT[:10]),
        InputSegment(InputKind.EMBEDDINGS, rows),
        InputSegment.tokens(PROMPT[20:]),
    )
    params = SamplingParams(temperature=0, max_tokens=8)
    results = []
    for request in (Request.of(PROMPT, params), Request(segments, params)):
        engine = make_engine(chunk_size=7)
        engine.add(request)
        events = engine.run_until_done()
        results.append([token for event in events for token in event.token_ids])
    assert results[0] == results[1]


# ---------------------------------------------------------------- the sampler's face


def draw(params: SamplingParams, position: int = 9, banned: tuple[int, ...] = ()) -> Draw:
    return Draw(params, RandomKey(4, 0, position), [1, 2, 3, 3], 2, banned)


def test_each_row_is_drawn_by_its_own_options() -> None:
    sampler = NativeSampler(make_engine().executor)
    row = np.zeros(50, np.float32)
    row[[3, 2, 1, 9]] = 5.0, 4.5, 4.0, 3.0
    greedy = SamplingParams(temperature=0.0)
    draws = [
        draw(greedy),
        draw(replace(greedy, frequency_penalty=0.5)),  # 3 was generated twice
        draw(replace(greedy, presence_penalty=0.4)),
        draw(replace(greedy, repetition_penalty=2.0)),  # 1, 2 and 3 are in the text
        draw(replace(greedy, logit_bias={7: 6.0, 3: -1.0})),
        draw(greedy, banned=(3, 2)),
        draw(replace(greedy, logprobs=2)),
    ]
    drawn = sampler.draw(np.tile(row, (len(draws), 1)), draws)
    assert [item.token_id for item in drawn] == [3, 2, 3, 9, 7, 1, 3]
    assert [item.logprob is None for item in drawn] == [True] * 6 + [False]
    line = drawn[-1].logprob
    assert line is not None
    norm = np.log(np.exp(row.astype(np.float64)).sum())
    assert [i for i, _ in line.top] == [3, 2]
    assert np.allclose([value for _, value in line.top], [5 - norm, 4.5 - norm], atol=1e-5)
    assert line.logprob == line.top[0][1]


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    sampler = NativeSampler(make_engine().executor)
    logits = np.random.default_rng(1).standard_normal((6, 50)).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_p=0.8, repetition_penalty=1.2)
    draws = [draw(params, position) for position in range(6)]
    together = [item.token_id for item in sampler.draw(logits, draws)]
    alone = [sampler.draw(logits[i : i + 1], draws[i : i + 1])[0].token_id for i in range(6)]
    assert together == alone
    many = [sampler.draw(logits[:1], [draw(params, p)])[0].token_id for p in range(50)]
    assert len(set(many)) > 5


def test_scores_are_log_softmax() -> None:
    sampler = NativeSampler(make_engine().executor)
    logits = np.random.default_rng(2).standard_normal((3, 50)).astype(np.float32)
    lines = sampler.score(logits, [4, 49, 0], [0, 3, 1])
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    assert np.allclose([line.logprob for line in lines], exact[[0, 1, 2], [4, 49, 0]], atol=1e-5)
    assert [len(line.top) for line in lines] == [0, 3, 1]
    assert lines[1].top[0][0] == int(np.argmax(logits[1]))


def test_logits_that_are_not_numbers_are_refused() -> None:
    sampler = NativeSampler(make_engine().executor)
    logits = np.zeros((2, 50), np.float32)
    logits[1, 7] = np.nan
    with pytest.raises(NativeError):
        sampler.draw(logits, [draw(SamplingParams()), draw(SamplingParams())])
