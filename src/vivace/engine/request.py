"""A request and what becomes of it: sequences that own cache, streams that turn them to output."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from vivace.engine.block_pool import BlockTable
from vivace.engine.text import StopText
from vivace.errors import InvalidRequest
from vivace.techniques.decoders.base import Progress
from vivace.types import InputKind, InputSegment, RequestKind, SamplingParams

__all__ = [
    "Event",
    "FinishReason",
    "Job",
    "Request",
    "Sequence",
    "Stream",
    "StreamState",
    "Timing",
    "TokenLogprob",
]


class FinishReason(StrEnum):
    STOP = "stop"  # a stop string or token, or a request without generation has its result
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"
    ERROR = "error"


class StreamState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, without blocks
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for.

    Args:
        inputs: the prompt; for SCORE the prompt and the tokens to score.
        salt: requests share cached prefixes only with those of an equal salt.
        priority: higher runs earlier.
        first_scored: SCORE: the first token index that gets a log-probability, at least 1.
        hidden_block: HIDDEN: states after this block; `None`: after the final norm.
        on_logits: SCORE: is given the raw logits of the scored rows, in order, a few rows at a
            time: [rows, vocab] float32.
    """

    inputs: tuple[InputSegment, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    kind: RequestKind = RequestKind.GENERATE
    salt: str = ""
    adapter_id: int = 0
    priority: int = 0
    first_scored: int = 1
    hidden_block: int | None = None
    on_logits: Callable[[np.ndarray], None] | None = None

    @staticmethod
    def of(token_ids: Seq[int], params: SamplingParams | None = None, **options: Any) -> Request:
        return Request((InputSegment.tokens(token_ids),), params or SamplingParams(), **options)

    @property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.inputs)

    def token_ids(self) -> list[int]:
        """One id per row; 0 where the row's embedding is given."""
        return [
            token
            for item in self.inputs
            for token in (
                item.data.tolist() if item.kind is InputKind.TOKENS else [0] * len(item.data)
            )
        ]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the raw logits, and the most probable tokens beside it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Timing:
    """Seconds on the engine's clock."""

    arrived: float
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class Event:
    """What one step added to choice `index` of a request."""

    request_id: int
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)  # where asked for
    # SCORE: one per scored token. With prompt_logprobs: one per prompt token but the first.
    prompt_logprobs: list[TokenLogprob] | None = None
    states: np.ndarray | None = None  # EMBED: [hidden]; HIDDEN: [num_rows, hidden] float32
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    is_last: bool = False  # all choices of the request have finished
    timing: Timing | None = None  # with the last event of a choice


class Sequence:
    """Tokens with the part of the cache that holds them; outlives a request inside a branch.

    Positions, entries of the cache and token indices coincide: every token takes one row.
    """

    def __init__(
        self, progress: Progress, inputs: Seq[InputSegment], identity: bytes, seed: int
    ) -> None:
        self.progress = progress
        self.identity = identity  # all that keys and values depend on besides the content
        self.seed = seed
        self.random_stream = 0
        self.is_kept = False  # a branch's is: it stays when a request on it ends
        self.table: BlockTable | None = None  # None: holds nothing in the cache
        self.embeddings: list[tuple[int, np.ndarray, bytes]] = []  # first row, [n, hidden], hash
        start = 0
        for segment in inputs:
            if segment.kind is not InputKind.TOKENS:
                own = replace(segment, data=_own_copy(segment.data))
                self.embeddings.append((start, own.data, own.content_hash()))
            start += segment.num_rows

    @property
    def token_ids(self) -> list[int]:
        return self.progress.token_ids

    def history(self) -> tuple[Seq[int], int]:
        """The tokens, without rows whose embedding is given, and how many are the prompt's."""
        num_prompt_tokens = self.progress.num_prompt_tokens
        if not self.embeddings:
            return self.token_ids, num_prompt_tokens
        tokens, num_given = list(self.token_ids), 0
        for first, data, _ in reversed(self.embeddings):
            del tokens[first : first + len(data)]
            num_given += len(data)
        return tokens, num_prompt_tokens - num_given

    def fork(self, progress: Progress) -> Sequence:
        """The same past, going on as `progress`, with no table and random stream 0."""
        forked = Sequence(progress, (), self.identity, self.seed)
        forked.embeddings = self.embeddings
        return forked

    def content(self, start: int, stop: int) -> bytes:
        """What tells rows [start, stop) from any other rows in the same place."""
        parts = [array("q", self.token_ids[start:stop]).tobytes()]
        for first, data, digest in self.embeddings:
            if first < stop and start < first + len(data):
                parts.append(f"embeddings {first - start} ".encode() + digest)
        return b"".join(parts)

    def given_rows(self, start: int, stop: int) -> tuple[list[int], list[np.ndarray]]:
        """Rows in [start, stop) whose embedding is given: offsets from `start`, and vectors."""
        offsets, vectors = [], []
        for first, data, _ in self.embeddings:
            for row in range(max(start, first), min(stop, first + len(data))):
                offsets.append(row - start)
                vectors.append(data[row - first])
        return offsets, vectors


def _own_copy(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, hidden] as float32 that nobody else writes. Raises `InvalidRequest`."""
    try:
        with np.errstate(over="ignore"):
            copy = np.array(vectors, np.float32, order="C")
    except (TypeError, ValueError):
        copy = np.full(1, np.nan, np.float32)
    if not np.isfinite(copy).all():
        raise InvalidRequest("the input embeddings are not all finite numbers in float32")
    return copy


@dataclass(slots=True, eq=False)
class Job:
    """A request inside the engine: shared by the streams of its choices."""

    id: int
    request: Request
    timing: Timing
    max_tokens: int  # resolved against the context
    listener: Callable[[Event], None] | None = None
    arrived_at_step: int = 0
    streams: list[Stream] = field(default_factory=list)
    num_open: int = 0  # choices that have not finished

    def __post_init__(self) -> None:
        self.num_open = self.request.params.n


class Stream:
    """One choice of a request on its way: WAITING, RUNNING, perhaps PREEMPTED, FINISHED."""

    def __init__(
        self, id: int, job: Job, sequence: Sequence, text: StopText | None, stop_ids: frozenset[int]
    ) -> None:
        self.id = id
        self.job = job
        self.index = len(job.streams)
        self.sequence = sequence
        self.text = text
        self.stop_ids = stop_ids
        self.state = StreamState.WAITING
        self.is_suspect = False  # was in a step that failed: runs alone until it is cleared
        self.num_unforked = 0  # choices that split off when the prompt is done
        self.num_generated = 0
        self.num_collected = 0  # rows whose logits or states have gone into the result
        self.prompt_logprobs: list[TokenLogprob] = []
        self.states: list[np.ndarray] = []  # HIDDEN
        self.state_sum: np.ndarray | None = None  # EMBED
        params = job.request.params
        is_scoring = job.request.kind is RequestKind.SCORE
        self.num_prompt_tokens = len(sequence.token_ids)
        self.collects_logprobs = is_scoring or params.prompt_logprobs is not None
        self.collects_states = job.request.kind in (RequestKind.EMBED, RequestKind.HIDDEN)
        self.generates = job.request.kind is RequestKind.GENERATE
        if is_scoring:
            self.num_collected = job.request.first_scored - 1

    @property
    def progress(self) -> Progress:
        return self.sequence.progress

    @property
    def target(self) -> int | None:
        """Rows after which a request without generation is done; a score's last row is not run."""
        is_scoring = self.job.request.kind is RequestKind.SCORE
        return None if self.generates else self.num_prompt_tokens - is_scoring

    @property
    def seats(self) -> int:
        return 1 + self.num_unforked

    @property
    def collects(self) -> bool:
        """Whether some prompt row's output still has to go into the result."""
        if self.collects_logprobs:
            return self.num_collected < self.num_prompt_tokens - 1
        return self.collects_states and self.num_collected < self.num_prompt_tokens

    @property
    def first_needed_row(self) -> int:
        """Rows before this one need not run if their keys and values are known."""
        last = len(self.progress.token_ids) - 1
        return min(last, self.num_collected) if self.collects else last

    def rows_to_collect(self, start: int, stop: int) -> range:
        """Which of the rows [start, stop) go into the result."""
        if not self.collects:
            return range(0)
        end = self.num_prompt_tokens - self.collects_logprobs
        return range(max(start, self.num_collected), min(stop, end))
