"""Drawing tokens: what a sampler is asked, and the reading of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vivace.engine.request import TokenLogprob
from vivace.types import Executor, RandomKey, SamplingParams

__all__ = ["Draw", "Drawn", "NativeSampler", "Sampler"]


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw from one row of logits."""

    params: SamplingParams
    key: RandomKey
    token_ids: Sequence[int]  # the stream so far: repetition penalty
    num_prompt_tokens: int  # tokens after these were generated: presence and frequency
    banned_ids: Sequence[int]  # may not be drawn: stops before min_tokens


@dataclass(frozen=True, slots=True)
class Drawn:
    token_id: int
    logprob: TokenLogprob | None  # where the request asked for log-probabilities


class Sampler(Protocol):
    """Rows never influence one another."""

    def draw(self, logits: np.ndarray, draws: Sequence[Draw]) -> list[Drawn]:
        """One token per row of `logits` [R, V] float32."""
        ...

    def score(
        self, logits: np.ndarray, token_ids: Sequence[int], num_top: Sequence[int]
    ) -> list[TokenLogprob]:
        """Log-probabilities of given tokens, one per row of `logits` [R, V] float32."""
        ...


class NativeSampler:
    """The sampler of the native core.

    Args:
        executor: whose threads it uses.
    """

    def __init__(self, executor: Executor) -> None:
        from vivace import _native

        self._native = _native
        self._threads: int = getattr(executor, "num_threads", 1)

    def draw(self, logits: np.ndarray, draws: Sequence[Draw]) -> list[Drawn]:
        wanted = [draw.params.logprobs for draw in draws]
        num_top = max((count for count in wanted if count is not None), default=None)
        tokens, lines = self._native.sample(
            logits,
            np.array([_options(draw.params) for draw in draws], np.float64),
            np.array([_key(draw.key) for draw in draws], np.uint64),
            _history(draws),
            _bias(draws),
            _forbidden(draws),
            num_top,
            self._threads,
        )
        drawn = [Drawn(token, None) for token in tokens.tolist()]
        if lines is None:
            return drawn
        logprobs = _lines(tokens.tolist(), lines, [count or 0 for count in wanted])
        return [
            Drawn(item.token_id, None if count is None else logprob)
            for item, count, logprob in zip(drawn, wanted, logprobs, strict=True)
        ]

    def score(
        self, logits: np.ndarray, token_ids: Sequence[int], num_top: Sequence[int]
    ) -> list[TokenLogprob]:
        targets = np.array(token_ids, np.int32)
        lines = self._native.log_probs(logits, targets, max(num_top), self._threads)
        return _lines(token_ids, lines, num_top)


def _options(params: SamplingParams) -> tuple[float, ...]:
    """In the order of `SamplingOptions` in native/src/sampler.h."""
    return (
        *(params.repetition_penalty, params.presence_penalty, params.frequency_penalty),
        *(params.temperature, params.typical_p, params.top_p, params.min_p, params.top_k),
    )


def _key(key: RandomKey) -> tuple[int, int, int, int]:
    return key.seed, key.stream, key.position, int(key.purpose)


def _history(draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Tokens so far of the rows with penalties."""
    neutral = (1.0, 0.0, 0.0)
    rows = [() if _options(draw.params)[:3] == neutral else draw.token_ids for draw in draws]
    if not any(rows):
        return None
    num_prompt_ids = [
        min(draw.num_prompt_tokens, len(row)) for draw, row in zip(draws, rows, strict=True)
    ]
    offsets, ids = _flat(rows)
    return offsets, np.array(num_prompt_ids, np.int64), ids


def _bias(draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    rows = [draw.params.logit_bias for draw in draws]
    if not any(rows):
        return None
    offsets, ids = _flat([list(row) for row in rows])
    return offsets, ids, np.array([value for row in rows for value in row.values()], np.float32)


def _forbidden(draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray] | None:
    rows = [draw.banned_ids for draw in draws]
    return _flat(rows) if any(rows) else None


def _flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as offsets and one array."""
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    return offsets.astype(np.int64), np.array([i for row in rows for i in row], np.int32)


def _lines(
    token_ids: Sequence[int], lines: tuple[np.ndarray, ...], num_top: Sequence[int]
) -> list[TokenLogprob]:
    values, top_ids, top_values = (array.tolist() for array in lines)
    return [
        TokenLogprob(token, value, tuple(zip(ids[:count], tops[:count], strict=True)))
        for token, value, ids, tops, count in zip(
            token_ids, values, top_ids, top_values, num_top, strict=True
        )
    ]
