"""The torch executor against plain formulas: masks, merging, sinks, by-products, blocks moved."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch executor needs the torch extra")

from vivace.blocks import AttentionBlock, LayerGroup, LinearSpec, WeightRef  # noqa: E402
from vivace.executors.torch_ import (  # noqa: E402
    TorchExecutor,
    TorchModel,
    dense_causal_attend,
    to_torch,
)
from vivace.executors.torch_attention import PagedCache, paged_attend  # noqa: E402
from vivace.models import graph_from_config  # noqa: E402
from vivace.models.config import Config  # noqa: E402
from vivace.registry import Seam  # noqa: E402
from vivace.training.model import initial_weights  # noqa: E402
from vivace.types import (  # noqa: E402
    CancelFlag,
    GroupRows,
    Mask,
    MaskKind,
    Segment,
    Span,
    Step,
    Wants,
)

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 8, 4
SHAPE = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TABLE = np.array([7, 2, 9, 0, 5], np.int32)  # where the blocks of the one sequence lie
LENGTH = 20


def _slots(entries: np.ndarray) -> np.ndarray:
    return (TABLE[entries // BLOCK] * BLOCK + entries % BLOCK).astype(np.int64)


def _attention(soft_cap: float | None = None) -> AttentionBlock:
    none = LinearSpec(1, (WeightRef("x", (1, 1)),), (None,))
    return AttentionBlock(
        0, HEADS, KV_HEADS, SIZE, none, none, None, scale=0.3, soft_cap=soft_cap
    )  # fmt: skip


@pytest.fixture
def filled():
    """A cache with `LENGTH` random entries in scattered blocks, NaN everywhere else."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(LENGTH, heads, SIZE, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    cache = PagedCache(LayerGroup(1, KV_HEADS, SIZE), 10, BLOCK, torch.float32)
    cache.write(0, torch.from_numpy(_slots(np.arange(LENGTH))), k, v)
    return cache, q, k, v


def _expected(q, k, v, allowed, soft_cap=None, extra=None, sinks=None):
    """Softmax attention in float64, head by head: out [n, H, D], weights [n, H, E]."""
    q, k, v = (x.numpy().astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("nhd,ehd->nhe", q, k) * 0.3
    if soft_cap:
        scores = np.tanh(scores / soft_cap) * soft_cap
    if extra is not None:
        scores = scores + extra
    weights = np.exp(scores) * allowed[:, None, :]
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.numpy())[None, :, None]
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("nhe,ehd->nhd", weights, v), weights


TREE = np.tril(np.random.default_rng(2).random((6, 6)) < 0.5) | np.eye(6, dtype=bool)
MASKS = {
    "causal": Mask(),
    "window": Mask(window=5),
    "window and sinks": Mask(window=5, num_sinks=2),
    "full": Mask(MaskKind.FULL),
    "cross": Mask(MaskKind.CROSS),
    "block causal": Mask(MaskKind.BLOCK_CAUSAL, block_size=8),
    "span": Mask(MaskKind.SPAN, span_start=15, span_end=19),
    "tree": Mask(MaskKind.TREE, tree=TREE),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_equal_plain_softmax(filled, name):
    cache, q, k, v = filled
    positions = np.arange(14, 20)
    mask = MASKS[name]
    allowed = mask.allows(positions, LENGTH, 0)
    span = Span(0, 6, (Segment(TABLE, LENGTH, mask=mask),))
    rows = GroupRows(_slots(positions), (span,))
    sums: list[np.ndarray] = []
    out = paged_attend(_attention(), q[14:], cache, rows, positions, None, sums)
    expected, weights = _expected(q[14:], k, v, allowed)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(sums[0], weights.sum(0), atol=2e-6)


def test_segments_merge_to_the_whole(filled):
    cache, q, k, v = filled
    positions = np.arange(14, 20)
    extra = np.linspace(-1, 1, 12).astype(np.float32)
    segments = (Segment(TABLE[:2], 8), Segment(TABLE[2:], 12, shift=8, log_weights=extra))
    rows = GroupRows(_slots(positions), (Span(0, 6, segments),))
    sinks = torch.linspace(-1, 2, HEADS)
    sums: list[np.ndarray] = []
    out = paged_attend(_attention(2.0), q[14:], cache, rows, positions, sinks, sums)
    allowed = Mask().allows(positions, LENGTH, 0)
    weights = np.concatenate([np.zeros(8), extra])
    expected, weights = _expected(q[14:], k, v, allowed, 2.0, weights, sinks)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(sums[0], weights.sum(0), atol=2e-6)


def test_a_segment_without_visible_entries_adds_nothing(filled):
    cache, q, k, v = filled
    positions = np.arange(2, 6)
    segments = (Segment(TABLE[2:], 12, shift=8), Segment(TABLE[:2], 8))
    rows = GroupRows(_slots(positions), (Span(0, 4, segments),))
    out = paged_attend(_attention(), q[2:6], cache, rows, positions, None, None)
    expected, _ = _expected(q[2:6], k, v, Mask().allows(positions, LENGTH, 0))
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)
    nothing = GroupRows(_slots(positions), (Span(0, 4, segments[:1]),))
    out = paged_attend(_attention(), q[2:6], cache, nothing, positions, None, None)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.fixture
def model():
    graph = graph_from_config(Config(SHAPE))
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(weight.shape, generator=generator) * 0.3 if weight.ndim == 2 else weight
        for name, weight in initial_weights(graph, 1).items()
    }
    return TorchModel(graph, weights)


def _executor(model: TorchModel, store: str = "float32") -> TorchExecutor:
    executor = TorchExecutor(
        model.graph,
        {name: weight.numpy() for name, weight in model.weights.items()},
        Seam("vivace.techniques.weight_formats").create("float32"),
        Seam("vivace.techniques.kv_stores").create(store),
    )
    executor.allocate([10], BLOCK)
    return executor


def _step(tokens: np.ndarray, first: int, wants: Wants, **rest) -> Step:
    places = np.arange(first, first + len(tokens))
    end = first + len(tokens)
    segment = Segment(TABLE[: -(-end // BLOCK)], end)
    rows = GroupRows(_slots(places), (Span(0, len(tokens), (segment,)),))
    return Step(tokens, places.astype(np.int32), (rows,), wants, **rest)


TOKENS = np.random.default_rng(0).integers(0, 50, LENGTH).astype(np.int32)


def _every(num_rows: int) -> np.ndarray:
    return np.arange(num_rows, dtype=np.int32)


def test_chunks_over_the_cache_equal_one_dense_pass(model):
    positions = torch.arange(LENGTH)
    with torch.no_grad():
        hidden = model.embed(torch.from_numpy(TOKENS).long(), positions)
        hidden = model.forward(hidden, positions, dense_causal_attend(1))
        expected = model.logits(hidden).numpy()
    executor, first, logits = _executor(model), 0, []
    for size in (7, 1, 5, 7):
        chunk = TOKENS[first : first + size]
        logits.append(executor.forward(_step(chunk, first, Wants(_every(size)))).logits)
        first += size
    np.testing.assert_allclose(np.concatenate(logits), expected, atol=2e-5)


def test_by_products_and_block_ranges(model):
    num_blocks = len(model.graph.blocks)
    rows = np.array([1, 4], np.int32)
    wants = Wants(rows, {1: rows, num_blocks: rows}, num_top_logits=3)
    executor = _executor(model)
    output = executor.forward(_step(TOKENS[:6], 0, wants))
    assert output.top_ids is not None
    assert output.top_logits is not None
    order = np.argsort(-output.logits, kind="stable")[:, :3]
    np.testing.assert_array_equal(output.top_ids, order)
    np.testing.assert_array_equal(
        output.top_logits, np.take_along_axis(output.logits, order, axis=1)
    )
    embedding = model.weight(model.graph.embedding.weight).numpy()
    np.testing.assert_allclose(output.hidden[num_blocks] @ embedding.T, output.logits, atol=1e-5)
    lower = executor.forward(_step(TOKENS[:6], 0, Wants(hidden={1: _every(6)}, last_block=2)))
    assert lower.logits.shape == (0, 50)
    upper = _step(
        TOKENS[:6], 0, Wants(rows, first_block=2), embeddings=(_every(6), lower.hidden[1])
    )
    np.testing.assert_allclose(executor.forward(upper).logits, output.logits, atol=1e-5)


def test_a_cancelled_step_says_so(model):
    flag = CancelFlag()
    flag.set()
    output = _executor(model).forward(_step(TOKENS[:6], 0, Wants(_every(6)), cancel=flag))
    assert output.is_cancelled
    assert len(output.logits) == 0


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_blocks_copied_or_carried_to_another_executor_read_the_same(model, store):
    executor = _executor(model, store)
    executor.forward(_step(TOKENS[:8], 0, Wants()))
    expected = executor.forward(_step(TOKENS[8:12], 8, Wants(_every(4)))).logits
    raw = executor.read_blocks(0, [7, 2])
    assert raw.shape == (2, executor.bytes_per_block(0, BLOCK))
    other = _executor(model, store)
    other.write_blocks(0, [1, 3], raw)
    other.copy_blocks(0, [1, 3], [7, 2])
    logits = other.forward(_step(TOKENS[8:12], 8, Wants(_every(4)))).logits
    np.testing.assert_array_equal(logits, expected)


def test_bfloat16_arrays_become_the_same_numbers():
    import ml_dtypes

    array = np.array([1.5, -0.001, 3e38], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_torch(array).float().numpy(), array.astype(np.float32))
