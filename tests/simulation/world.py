"""A world for the engine without a model: logits are a hash of what the block tables lead to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.blocks import (
    Activation,
    EmbeddingSpec,
    HeadSpec,
    LayerGroup,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    WeightRef,
)
from vivace.engine.request import TokenLogprob
from vivace.engine.sampling import Draw, Drawn
from vivace.types import RandomKey, SamplingParams, Step, StepOutput

VOCAB_SIZE = 16
HIDDEN_SIZE = 2
EOS = 0
PIECES = (
    *(b"", b"a", b"b", b"ab", b"\xc3", b"\xa9", b" ", b"ba"),
    *(b"c", b"\xf0\x9f", b"\x99\x82", b"cab", b"d", b"\n", b"bc", b"aa"),
)
_MASK = 2**64 - 1
_FACTORS = np.random.Generator(np.random.PCG64(1)).integers(0, 2**63, 4096, np.uint64) * 2 + 1
_COLUMNS = _FACTORS[-VOCAB_SIZE:]


class Failure(Exception):
    """What the fake executor raises when it is told to."""


def make_graph(windows: Sequence[int | None], max_positions: int) -> ModelGraph:
    """A graph with one layer group per window; nothing here reads weights."""
    head = LinearSpec(HIDDEN_SIZE, (WeightRef("head", (VOCAB_SIZE, HIDDEN_SIZE)),), (None,))
    square = LinearSpec(HIDDEN_SIZE, (WeightRef("mlp", (HIDDEN_SIZE, HIDDEN_SIZE)),), (None,))
    return ModelGraph(
        family="fake",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        max_positions=max_positions,
        embedding=EmbeddingSpec(WeightRef("embedding", (VOCAB_SIZE, HIDDEN_SIZE))),
        blocks=(MlpBlock(0, square, square, Activation.RELU, None),),
        head=HeadSpec(head, None),
        groups=tuple(LayerGroup(1, 1, 1, window) for window in windows),
    )


def _row_value(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What a row leaves in the cache: never 0, which marks an entry that nobody wrote."""
    return (tokens.astype(np.uint64) + 1) * _FACTORS[positions] | np.uint64(1)


def _digest(values: np.ndarray, first: int) -> int:
    """A hash of entries in order, `first` being the position of the first one."""
    positions = _FACTORS[first + 7 : first + 7 + len(values)]
    mixed = (values ^ (values >> np.uint64(29))) * positions
    return int(np.bitwise_xor.reduce(mixed ^ (mixed >> np.uint64(32)))) if len(values) else 0


def _logits(digests: Sequence[int]) -> np.ndarray:
    value = 0
    for digest in digests:
        value = (value * 0x9E3779B97F4A7C15 + digest) & _MASK
    mixed = np.uint64(value) * _COLUMNS
    return ((mixed >> np.uint64(40)).astype(np.float32)) / np.float32(2**20)


def reference_logits(tokens: Sequence[int], windows: Sequence[int | None]) -> np.ndarray:
    """Logits after `tokens`, without cache, batch or engine: [vocab] float32."""
    values = _row_value(np.array(tokens, np.int64), np.arange(len(tokens)))
    digests = []
    for window in windows:
        first = 0 if window is None else max(0, len(tokens) - window)
        digests.append(_digest(values[first:], first))
    return _logits(digests)


def reference_states(
    tokens: Sequence[int], windows: Sequence[int | None], block: int
) -> np.ndarray:
    """The states of all rows after a block: [tokens, hidden] float32."""
    rows = range(1, len(tokens) + 1)
    return np.stack([_state(reference_logits(tokens[:n], windows), block) for n in rows])


def _state(logits: np.ndarray, block: int) -> np.ndarray:
    return logits[HIDDEN_SIZE * block : HIDDEN_SIZE * (block + 1)]


def embedding_of(token: int) -> np.ndarray:
    """A given row whose place in a prompt the oracle calls `token`, at least `VOCAB_SIZE`."""
    return np.array([token, -token], np.float32)


class FakeExecutor:
    """Follows slots and segments as a real executor does, over one integer per entry."""

    merge_entries = 1

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.windows = [group.window for group in graph.groups]
        self.caches: list[np.ndarray] = []
        self.fails_at: set[int] = set()  # forwards that raise, by count
        self.fails_on: int | None = None  # a token whose row raises
        self.copy_fails_at: set[int] = set()
        self.num_forwards = 0
        self.num_copies = 0

    def allocate(self, num_blocks: Sequence[int], block_size: int) -> None:
        self.block_size = block_size
        self.caches = [np.zeros((count, block_size), np.uint64) for count in num_blocks]

    def forward(self, step: Step) -> StepOutput:
        self.num_forwards += 1
        rows = len(step.tokens)
        tokens = step.tokens.astype(np.int64)
        if step.embeddings is not None:
            given, vectors = step.embeddings
            assert not tokens[given].any(), "a given row has a token"
            tokens[given] = vectors[:, 0]
        values = _row_value(tokens, step.positions)
        for cache, group in zip(self.caches, step.groups, strict=True):
            assert len(group.slots) == rows
            assert len(set(group.slots.tolist())) == rows, "two rows write one slot"
            cache.reshape(-1)[group.slots] = values
        if self.num_forwards in self.fails_at:
            raise Failure("this forward fails")
        if self.fails_on is not None and self.fails_on in step.tokens:
            raise Failure(f"token {self.fails_on} fails")
        if step.cancel is not None and step.cancel.is_set():
            return StepOutput(np.zeros((0, VOCAB_SIZE), np.float32), is_cancelled=True)
        seen = [self._read(index, step) for index in range(len(self.caches))]
        logits = [_logits([read[row] for read in seen]) for row in step.wants.logits_rows]
        hidden = {
            block: np.stack([_state(_logits([read[row] for read in seen]), block) for row in rows])
            for block, rows in step.wants.hidden.items()
        }
        return StepOutput(np.array(logits, np.float32).reshape(-1, VOCAB_SIZE), hidden)

    def _read(self, index: int, step: Step) -> dict[int, int]:
        """A digest of what each wanted row sees in one layer group."""
        wanted = set(step.wants.logits_rows.tolist())
        wanted = wanted.union(*(rows.tolist() for rows in step.wants.hidden.values()))
        digests, next_row = {}, 0
        for span in step.groups[index].spans:
            assert span.first_row == next_row, "spans cover the rows in order"
            next_row += span.num_rows
            (segment,) = span.segments
            assert len(segment.block_ids) == -(-segment.num_entries // self.block_size)
            assert segment.mask.window == (self.windows[index] or 0)
            for row in range(span.first_row, next_row):
                if row not in wanted:
                    continue
                position = int(step.positions[row])
                entries = self.caches[index][segment.block_ids].reshape(-1)[: segment.num_entries]
                first = max(0, position + 1 - segment.mask.window) if segment.mask.window else 0
                assert first >= segment.shift, "a row reads entries that were let go"
                kept = entries[first - segment.shift : position + 1 - segment.shift]
                assert len(kept) == position + 1 - first, "a row reads beyond its segment"
                digests[row] = _digest(kept, first)
        assert next_row == len(step.tokens)
        return digests

    def copy_blocks(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.num_copies += 1
        if self.num_copies in self.copy_fails_at:
            raise Failure("this copy fails")
        for source, target in zip(sources, targets, strict=True):
            self.caches[group][target] = self.caches[group][source]

    def read_blocks(self, group: int, block_ids: Sequence[int]) -> np.ndarray:
        return self.caches[group][list(block_ids)].view(np.uint8)

    def write_blocks(self, group: int, block_ids: Sequence[int], raw: np.ndarray) -> None:
        self.caches[group][list(block_ids)] = raw.view(np.uint64)

    def bytes_per_block(self, group: int, block_size: int) -> int:
        return 8 * block_size


class FakeSampler:
    """The largest logit, moved on by the random key when there is a temperature."""

    def __init__(self, max_scored_rows: int = 10**9) -> None:
        self.max_scored_rows = max_scored_rows

    def draw(self, logits: np.ndarray, draws: Sequence[Draw]) -> list[Drawn]:
        assert len(logits) == len(draws)
        return [_draw(row, draw) for row, draw in zip(logits, draws, strict=True)]

    def score(
        self, logits: np.ndarray, token_ids: Sequence[int], num_top: Sequence[int]
    ) -> list[TokenLogprob]:
        assert len(token_ids) <= self.max_scored_rows
        rows = zip(logits, token_ids, num_top, strict=True)
        return [_logprob(row, token, top) for row, token, top in rows]


def _draw(row: np.ndarray, draw: Draw) -> Drawn:
    token = draw_token(row, draw.params, draw.key, draw.banned_ids)
    if draw.params.logprobs is None:
        return Drawn(token, None)
    return Drawn(token, _logprob(row, token, draw.params.logprobs))


def draw_token(
    row: np.ndarray, params: SamplingParams, key: RandomKey, banned: Sequence[int]
) -> int:
    token = int(np.argmax(row))
    if params.temperature:
        a = key.seed * 0x9E3779B97F4A7C15 + key.stream * 0xBF58476D1CE4E5B9 + key.position
        token += (a * 0x94D049BB133111EB & _MASK) >> 40
    while token % VOCAB_SIZE in banned:
        token += 1
    return token % VOCAB_SIZE


def _logprob(row: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    order = np.argsort(-row, kind="stable")[:num_top]
    return TokenLogprob(token, float(row[token]), tuple((int(i), float(row[i])) for i in order))


class FakeDetokenizer:
    """Bytes by table, characters when they are complete."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(PIECES[token_id])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
