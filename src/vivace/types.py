"""The types a step, a request and a technique are made of; leaves that import nothing above them.

Shape words: N rows of a step, R wanted rows, V vocabulary, G key/value heads, D head size.
Slot, position and token index are three different things: a *slot* is where a row's key and value
lie in the pool (block id * block size + offset), a *position* is what rotary embedding and masks
see, a *token index* counts a stream's tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum, StrEnum
from typing import Any, Protocol

import numpy as np

from vivace.blocks import ModelGraph
from vivace.errors import InvalidRequest

__all__ = [
    "MAX_LOGPROBS",
    "CancelFlag",
    "Change",
    "Demand",
    "Exactness",
    "Executor",
    "GroupRows",
    "InputSegment",
    "Mask",
    "MaskKind",
    "Need",
    "Purpose",
    "RandomKey",
    "RequestKind",
    "SamplingParams",
    "Segment",
    "Signals",
    "Span",
    "Step",
    "StepOutput",
    "Transactional",
    "Wants",
]

MAX_LOGPROBS = 20


class Exactness(StrEnum):
    """How a configuration relates to the plain engine's output."""

    EXACT = "exact"  # the same bits, greedy and seeded
    DISTRIBUTION = "distribution"  # samples follow the same distribution
    LOSSY = "lossy"  # quality is measured and published

    @property
    def rank(self) -> int:
        return list(Exactness).index(self)


class Need(StrEnum):
    """What a technique must be given to work."""

    HIDDEN = "hidden"
    QUERIES = "queries"
    KEYS = "keys"
    ATTENTION_SUMS = "attention sums"
    ROUTER_LOGITS = "router logits"
    TOP_LOGITS = "top logits"
    TEXT = "text"
    LAYER_RANGE = "layer range"
    AUXILIARY = "auxiliary model or weights"
    ARTIFACT = "artifact"
    SIGNAL = "signal"
    COMPANION = "companion"
    EMBEDDINGS = "embeddings"
    ALL_ROWS = "all rows"
    WHOLE_PROMPT = "whole prompt"
    ALIGNED_CHUNKS = "aligned chunks"
    CROSS_REQUEST = "cross-request state"
    TIERS = "tiers"
    CALIBRATION = "calibration"
    GRADIENTS = "gradients"
    LATENCY = "latency"


class Change(StrEnum):
    """What a technique alters compared with the plain engine."""

    WEIGHTS = "weights"
    GRAPH = "graph"
    PROMPT = "prompt"
    KV_LENGTH = "KV length"
    KV_MERGE = "KV merge"
    KV_BYTES = "KV bytes"
    KV_LAYERS = "KV layers"
    KV_MUTABLE = "KV mutable"
    KV_FUTURE = "KV future"
    POSITIONS = "positions"
    READ_SET = "read set"
    ATTENTION_MATH = "attention math"
    ROWS = "rows"
    EXPERTS = "experts"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    ACCEPT = "accept"
    STEP_TOKENS = "step tokens"
    STREAMS = "streams"
    ORDER = "order"
    RESIDENCY = "residency"
    OUTPUT = "output"


# ---------------------------------------------------------------- attention reads


class MaskKind(IntEnum):
    CAUSAL = 0  # with optional window and sinks
    FULL = 1  # every entry
    BLOCK_CAUSAL = 2  # every entry of this and earlier blocks of `block_size` positions
    SPAN = 3  # causal, but positions in [span_start, span_end) see one another
    TREE = 4  # all but the last `tree.shape[1]` entries, and of those the ones `tree` allows
    CROSS = 5  # every entry of another sequence (an encoder's), which has no positions of ours


@dataclass(frozen=True, slots=True)
class Mask:
    """Which entries of a segment a query at position p may read; data, not code.

    An entry with index i has position `i + segment.shift`.
    """

    kind: MaskKind = MaskKind.CAUSAL
    window: int = 0  # CAUSAL: reads positions > p - window; 0: no window
    num_sinks: int = 0  # CAUSAL with a window: positions < num_sinks stay visible
    block_size: int = 0  # BLOCK_CAUSAL
    span_start: int = 0  # SPAN
    span_end: int = 0
    tree: np.ndarray | None = None  # TREE: [rows of the span, draft entries] bool

    def allows(self, query_positions: np.ndarray, num_entries: int, shift: int) -> np.ndarray:
        """The mask as an array: [len(query_positions), num_entries] bool. For references."""
        p = np.asarray(query_positions)[:, None]
        q = np.arange(num_entries)[None, :] + shift
        match self.kind:
            case MaskKind.CAUSAL:
                seen = q <= p
                if self.window:
                    seen &= (q > p - self.window) | (q < self.num_sinks)
            case MaskKind.BLOCK_CAUSAL:
                seen = q // self.block_size <= p // self.block_size
            case MaskKind.SPAN:
                inside = (p >= self.span_start) & (p < self.span_end)
                inside = inside & (q >= self.span_start) & (q < self.span_end)
                seen = (q <= p) | inside
            case MaskKind.TREE:
                assert self.tree is not None
                seen = np.ones((p.shape[0], num_entries), bool)
                seen[:, num_entries - self.tree.shape[1] :] = self.tree
            case MaskKind.FULL | MaskKind.CROSS:
                seen = np.ones((p.shape[0], num_entries), bool)
        return seen


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of cached entries that a span of rows reads: blocks in logical order.

    Entry i lies in block `block_ids[i // block_size]` at offset `i % block_size`.
    `log_weights` [num_entries] float32 is added to the scores.
    """

    block_ids: np.ndarray  # [num_blocks] int32
    num_entries: int
    shift: int = 0
    mask: Mask = Mask()
    log_weights: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows that read the same segments, merged by log-sum-exp in list order."""

    first_row: int
    num_rows: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class GroupRows:
    """Where a step's rows write in one layer group, and what they read there."""

    slots: np.ndarray  # [N] int64; written before anything is read
    spans: tuple[Span, ...]  # cover the rows in order


# ---------------------------------------------------------------- a step


class CancelFlag:
    """Set from any thread to make a running forward stop at the next block."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array = np.zeros(1, np.int32)  # native code polls this

    def set(self) -> None:
        self.array[0] = 1

    def is_set(self) -> bool:
        return bool(self.array[0])


def _no_rows() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Wants:
    """What a forward returns. Only wanted rows' logits are computed."""

    logits_rows: np.ndarray = field(default_factory=_no_rows)  # [R] int32
    # block index -> rows [.] int32; the state after that block, len(blocks) = after the final norm
    hidden: dict[int, np.ndarray] = field(default_factory=dict)
    num_top_logits: int = 0  # per wanted row: the largest ones, ties to the lower id
    attention_sums: bool = False  # per attention block and span: weights summed over its rows
    first_block: int = 0  # run blocks [first_block, last_block); the head only at the end
    last_block: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The metadata of one forward over flat rows."""

    tokens: np.ndarray  # [N] int32
    positions: np.ndarray  # [N] int32
    groups: tuple[GroupRows, ...]  # one per layer group of the model
    wants: Wants = Wants()
    # rows whose embedding is given instead of looked up: (rows [E] int32, [E, hidden] float32)
    embeddings: tuple[np.ndarray, np.ndarray] | None = None
    cancel: CancelFlag | None = None


@dataclass(slots=True)
class StepOutput:
    logits: np.ndarray  # [R, V] float32
    hidden: dict[int, np.ndarray] = field(default_factory=dict)  # [rows, hidden] float32
    top_ids: np.ndarray | None = None  # [R, num_top] int32
    top_logits: np.ndarray | None = None  # [R, num_top] float32
    # [attention block][span] -> [num_heads, entries of all its segments] float32
    attention_sums: list[list[np.ndarray]] | None = None
    is_cancelled: bool = False


class Executor(Protocol):
    """Runs the block list. One instance holds one model's weights and key/value storage."""

    graph: ModelGraph
    merge_entries: int  # attention merges runs of so many entries, from a segment's first on

    def allocate(self, num_blocks: Sequence[int], block_size: int) -> None:
        """(Re)allocate the cache: `num_blocks[g]` blocks for layer group g."""
        ...

    def forward(self, step: Step) -> StepOutput: ...

    def copy_blocks(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks inside a layer group (copy on write)."""
        ...

    def read_blocks(self, group: int, block_ids: Sequence[int]) -> np.ndarray:
        """The raw bytes of blocks: [num_ids, bytes_per_block] uint8, for export."""
        ...

    def write_blocks(self, group: int, block_ids: Sequence[int], raw: np.ndarray) -> None: ...

    def bytes_per_block(self, group: int, block_size: int) -> int: ...


# ---------------------------------------------------------------- requests


class RequestKind(StrEnum):
    GENERATE = "generate"
    SCORE = "score"  # log-probabilities of given tokens
    EMBED = "embed"  # mean of the last hidden states, after the final norm
    HIDDEN = "hidden"  # hidden states of the prompt's rows


class InputKind(StrEnum):
    TOKENS = "tokens"
    EMBEDDINGS = "embeddings"
    FEATURES = "features"


@dataclass(frozen=True, slots=True)
class InputSegment:
    """A piece of a prompt. Its hash, not its object identity, enters the prefix key."""

    kind: InputKind
    data: np.ndarray  # TOKENS: [n] int32; else [n, width] float32

    @staticmethod
    def tokens(token_ids: Sequence[int]) -> InputSegment:
        """Raises `InvalidRequest` for anything but a list of whole numbers of 32 bits."""
        try:
            data = np.asarray(token_ids)
        except ValueError:  # lists of unequal lengths
            data = np.asarray(None)
        is_whole = data.dtype.kind in "iu" or data.shape == (0,)
        if data.ndim != 1 or not is_whole or not np.array_equal(data, data.astype(np.int32)):
            shown = repr(token_ids)[:60]
            raise InvalidRequest(f"the tokens are {shown}: expected a list of whole token ids")
        return InputSegment(InputKind.TOKENS, data.astype(np.int32))

    @property
    def num_rows(self) -> int:
        return len(self.data)

    def content_hash(self) -> bytes:
        digest = hashlib.blake2b(digest_size=32, person=self.kind.encode())
        digest.update(repr((self.data.dtype.str, self.data.shape)).encode())
        digest.update(np.ascontiguousarray(self.data).tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Demand:
    """How many rows a stream wants in the next step."""

    min_rows: int = 1  # fewer make no sense: run none instead
    max_rows: int = 1
    alignment: int = 1  # a multiple of this, unless it is all that is left
    is_atomic: bool = False  # all of max_rows or none


@dataclass(frozen=True, slots=True)
class Signals:
    """What techniques have told about a stream; `None` where nobody did."""

    expected_tokens: float | None = None
    difficulty: float | None = None
    priority: int = 0


class Transactional(Protocol):
    """State that follows the rule of steps: provisional until committed; can fork; can leave."""

    def fork(self) -> Transactional: ...

    def commit(self, num_accepted: int) -> None:
        """Keep the first `num_accepted` provisional rows and undo the rest."""
        ...

    def export(self) -> dict[str, Any]:
        """All of the state as plain data and arrays, for preemption and saved sessions."""
        ...


# ---------------------------------------------------------------- randomness


class Purpose(IntEnum):
    """What a random number is for: part of its key, so uses never share numbers."""

    SAMPLE = 0
    ACCEPT = 1  # a verifier's coin
    DRAFT = 2
    STRATEGY = 3
    INIT = 4


@dataclass(frozen=True, slots=True)
class RandomKey:
    """Counter-based randomness: the same key gives the same bits, in any order of asking.

    Source: Salmon et al. 2011, Philox 4x32-10; the key is the seed, the counter the rest.
    """

    seed: int
    stream: int = 0
    position: int = 0
    purpose: Purpose = Purpose.SAMPLE

    def words(self) -> tuple[int, int, int, int]:
        """Four uniform 32-bit words."""
        counter = [
            self.position & 0xFFFFFFFF,
            self.position >> 32 & 0xFFFFFFFF,
            self.stream & 0xFFFFFFFF,
            int(self.purpose),
        ]
        key = [self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF]
        for _ in range(10):
            low = 0xD2511F53 * counter[0]
            high = 0xCD9E8D57 * counter[2]
            counter = [
                (high >> 32) ^ counter[1] ^ key[0],
                high & 0xFFFFFFFF,
                (low >> 32) ^ counter[3] ^ key[1],
                low & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter[0], counter[1], counter[2], counter[3]

    def uniform(self) -> float:
        """A number in [0, 1) with 53 random bits."""
        a, b, _, _ = self.words()
        return ((a >> 5) * 67108864 + (b >> 6)) / 9007199254740992


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when to stop. Filters apply in the order listed.

    Penalties and bias act on the raw logits, then temperature, then the filters, then the draw.
    With `temperature=0` the largest logit wins (the lowest id on ties) and filters have no effect.

    Raises `InvalidRequest` for any value out of range; nothing is clamped.
    """

    repetition_penalty: float = 1.0  # > 0; divides positive and multiplies negative seen logits
    presence_penalty: float = 0.0  # [-2, 2]; subtracted once from tokens generated before
    frequency_penalty: float = 0.0  # [-2, 2]; subtracted per time a token was generated
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> [-100, 100]
    temperature: float = 1.0  # >= 0
    top_k: int = 0  # 0: off
    typical_p: float = 1.0  # (0, 1]
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    seed: int | None = None  # [0, 2**64); None: a fresh one
    max_tokens: int | None = 256  # None: to the end of the context
    min_tokens: int = 0  # stop tokens cannot be drawn before
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # keep the stop string in the text
    logprobs: int | None = None  # 0..20 alternatives per generated token
    prompt_logprobs: int | None = None  # likewise for the prompt
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                _check(isinstance(value, list), name, value, "a list")
                object.__setattr__(self, name, tuple(value))
        for name, low, high, low_open in _FLOAT_RANGES:
            value = getattr(self, name)
            _check_number(name, value)
            inside = (value > low if low_open else value >= low) and value <= high
            wanted = f"a number in {'(' if low_open else '['}{low:g}, {high:g}]"
            _check(inside, name, value, wanted)
        for name, low, high, optional in _INT_RANGES:
            value = getattr(self, name)
            if value is None and optional:
                continue
            wanted = f"a whole number from {low} to {high}" + (" or None" if optional else "")
            is_inside = isinstance(value, int) and low <= value <= high
            _check(is_inside and not isinstance(value, bool), name, value, wanted)
        for item in self.stop:
            _check(isinstance(item, str) and item != "", "stop", item, "non-empty strings")
        for item in self.stop_token_ids:
            is_id = isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31
            _check(is_id, "stop_token_ids", item, "token ids")
        for name in ("ignore_eos", "include_stop"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "True or False")
        _check(isinstance(self.logit_bias, dict), "logit_bias", self.logit_bias, "a dictionary")
        for token, bias in self.logit_bias.items():
            is_id = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
            _check(is_id, "logit_bias", token, "token ids as keys")
            _check_number("logit_bias", bias)
            _check(-100 <= bias <= 100, "logit_bias", bias, "values in [-100, 100]")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}: "
                "lower min_tokens or raise max_tokens"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                _check(token < vocab_size, name, token, f"token ids below {vocab_size}")


_FLOAT_RANGES = (
    ("repetition_penalty", 0.0, 1e6, True),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
    ("temperature", 0.0, 1e6, False),
    ("typical_p", 0.0, 1.0, True),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
)
_INT_RANGES = (
    ("top_k", 0, 2**31 - 1, False),
    ("seed", 0, 2**64 - 1, True),
    ("max_tokens", 1, 2**31 - 1, True),
    ("min_tokens", 0, 2**31 - 1, False),
    ("logprobs", 0, MAX_LOGPROBS, True),
    ("prompt_logprobs", 0, MAX_LOGPROBS, True),
    ("n", 1, 128, False),
)


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise InvalidRequest(f"{name} is {shown}: expected {wanted}")


def _check_number(name: str, value: object) -> None:
    # Not math.isfinite, which fails for whole numbers beyond the floats.
    is_finite = isinstance(value, int | float) and value == value and abs(value) != math.inf
    _check(is_finite and not isinstance(value, bool), name, value, "a finite number")


assert {name for name, *_ in (*_FLOAT_RANGES, *_INT_RANGES)} <= {
    item.name for item in fields(SamplingParams)
}
