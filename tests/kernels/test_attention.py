"""Attention over cached segments: against dense numpy, and the same bits however it is cut.

Everything that no row may read is NaN in the cache, in every test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import pytest
import reference_model

from vivace import _native
from vivace.errors import NativeError
from vivace.executors.native import flatten
from vivace.types import GroupRows, Mask, MaskKind, Segment, Span

ISAS = _native.isa_names()
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
RTOL, ATOL = 2e-5, 3e-6  # float32 sums against float64; inputs are the same


@dataclass(frozen=True)
class Source:
    """A segment's entries, wherever they will lie: keys and values [entries, G, D]."""

    keys: np.ndarray
    values: np.ndarray
    shift: int = 0
    mask: Mask = field(default_factory=Mask)
    log_weights: np.ndarray | None = None


@dataclass(frozen=True)
class Rows:
    """A span: queries [n, H, D], positions [n] and what they read."""

    queries: np.ndarray
    positions: np.ndarray
    sources: tuple[Source, ...]

    def only(self, row: int) -> Rows:
        """One row of this span alone."""
        sources = []
        for source in self.sources:
            mask = source.mask
            if mask.tree is not None:
                mask = replace(mask, tree=mask.tree[row : row + 1])
            sources.append(replace(source, mask=mask))
        at = slice(row, row + 1)
        return Rows(self.queries[at], self.positions[at], tuple(sources))


def allowed(rows: Rows) -> list[np.ndarray]:
    """Per source [n, entries]."""
    return [
        source.mask.allows(rows.positions, len(source.keys), source.shift)
        for source in rows.sources
    ]


def attend(
    spans: Sequence[Rows],
    *,
    kv_store: str = "float32",
    block_size: int = 16,
    isa: str | None = None,
    threads: int = 1,
    seed: int = 0,
    **options,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Lay the spans' entries into scattered blocks of a NaN cache and attend."""
    kv_heads, head_dim = spans[0].sources[0].keys.shape[1:]
    counts = [-(-len(source.keys) // block_size) for rows in spans for source in rows.sources]
    num_blocks = sum(counts) + 3
    native = _native.Attention(kv_store, kv_heads, head_dim, num_blocks, block_size, isa, threads)
    native.fill(255)
    free = iter(np.random.default_rng(seed).permutation(num_blocks).astype(np.int32))
    made, row = [], 0
    for rows in spans:
        segments = []
        for source, seen in zip(rows.sources, allowed(rows), strict=True):
            count = -(-len(source.keys) // block_size)
            block_ids = np.array([next(free) for _ in range(count)], np.int32)
            entries = np.flatnonzero(seen.any(0))  # what nobody reads stays NaN
            slots = block_ids[entries // block_size].astype(np.int64) * block_size
            slots += entries % block_size
            native.write(slots, source.keys[entries], source.values[entries])
            held = np.zeros(count, bool)
            held[entries // block_size] = True
            block_ids[~held] = -1  # nor does a block that nobody reads have to be there
            segments.append(
                Segment(block_ids, len(source.keys), source.shift, source.mask, source.log_weights)
            )
        made.append(Span(row, len(rows.queries), tuple(segments)))
        row += len(rows.queries)
    out, lse, sums = native(
        np.concatenate([rows.queries for rows in spans]),
        np.concatenate([rows.positions for rows in spans]).astype(np.int32),
        flatten(GroupRows(np.zeros(row, np.int64), tuple(made))),
        **options,
    )
    if not len(sums):
        return out, lse, []
    heads = spans[0].queries.shape[1]
    shapes = [(heads, sum(len(s.keys) for s in rows.sources)) for rows in spans]
    ends = np.cumsum([0] + [h * n for h, n in shapes])
    parts = [sums[a:b].reshape(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False)]
    return out, lse, parts


def expected(
    rows: Rows,
    kv_store: str,
    scale: float,
    soft_cap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs, log-sum-exps and sums of weights. What meets bfloat16 is rounded to it; weights are
    not here, see `assert_close`."""
    queries = rows.queries
    if kv_store == "bfloat16":
        queries = (queries * np.float32(scale)).astype(DTYPES[kv_store]).astype(np.float32)
        scale = 1.0
    keys, values = (
        np.concatenate([getattr(source, name) for source in rows.sources])
        .astype(DTYPES[kv_store])
        .astype(np.float32)
        for name in ("keys", "values")
    )
    log_weights = np.concatenate(
        [np.zeros(len(s.keys)) if s.log_weights is None else s.log_weights for s in rows.sources]
    )
    out, lse, weights = reference_model.attention(
        queries,
        keys,
        values,
        np.concatenate(allowed(rows), axis=1),
        scale=scale,
        soft_cap=soft_cap or None,
        sinks=sinks,
        log_weights=log_weights,
    )
    return out, lse, weights.sum(0)


def assert_close(out: np.ndarray, wanted: np.ndarray, rows: Rows, kv_store: str, **options) -> None:
    """Rounding to bfloat16, which has 8 significant bits, changes a weight by at most 1/256."""
    bound = RTOL * np.abs(wanted) + ATOL
    if kv_store == "bfloat16":
        sizes = tuple(replace(source, values=np.abs(source.values)) for source in rows.sources)
        bound += expected(replace(rows, sources=sizes), kv_store, **options)[0] / 256
    np.testing.assert_array_less(np.abs(out - wanted), bound)


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def random_mask(random: np.random.Generator, num_rows: int, entries: int) -> Mask:
    kind = MaskKind(random.integers(6))
    match kind:
        case MaskKind.CAUSAL:
            has_window, has_sinks = random.random(2) < 0.6
            window = int(random.integers(1, 90)) if has_window else 0
            return Mask(window=window, num_sinks=int(random.integers(6)) if has_sinks else 0)
        case MaskKind.BLOCK_CAUSAL:
            return Mask(kind, block_size=int(random.integers(1, 30)))
        case MaskKind.SPAN:
            start = int(random.integers(entries))
            return Mask(kind, span_start=start, span_end=start + int(random.integers(1, 50)))
        case MaskKind.TREE:
            drafts = int(random.integers(1, min(entries, 80) + 1))
            return Mask(kind, tree=random.random((num_rows, drafts)) < 0.4)
    return Mask(kind)


def random_case(seed: int) -> tuple[list[Rows], dict]:
    """Spans of odd shapes, and options."""
    random = np.random.default_rng(seed)
    head_dim = int(random.choice([3, 16, 20, 33, 64, 80, 128]))
    kv_heads = int(random.integers(1, 4))
    heads = kv_heads * int(random.choice([1, 1, 2, 4, 5, 35]))
    spans = []
    for _ in range(random.integers(1, 4)):
        num_rows = int(random.choice([1, 1, 2, 9, 30]))
        sources = []
        for _ in range(random.integers(1, 4)):
            entries = int(random.choice([1, 17, 64, 130, 1100]))
            shift = int(random.choice([0, 0, 5, -7]))
            mask = random_mask(random, num_rows, entries)
            log_weights = normal(random, entries) if random.random() < 0.3 else None
            keys, values = (normal(random, entries, kv_heads, head_dim) for _ in range(2))
            sources.append(Source(keys, values, shift, mask, log_weights))
        longest = max(len(source.keys) for source in sources)
        positions = np.sort(random.integers(0, longest + 8, num_rows))
        spans.append(Rows(normal(random, num_rows, heads, head_dim), positions, tuple(sources)))
    options = {
        "scale": float(head_dim**-0.5 * 1.5),
        "soft_cap": float(random.choice([0.0, 2.5])),
        "sinks": normal(random, heads) if random.random() < 0.4 else None,
    }
    return spans, options


@pytest.mark.parametrize("seed", range(28))
def test_equals_dense_numpy(seed: int) -> None:
    spans, options = random_case(seed)
    kv_store = ["float32", "bfloat16"][seed % 2]
    results = [
        attend(spans, kv_store=kv_store, block_size=size, isa=isa, wants_sums=True, **options)
        for isa, size in [(isa, 16) for isa in ISAS] + [(None, 64)]
    ]
    out, lse, sums = results[-1]
    row = 0
    for index, rows in enumerate(spans):
        at = slice(row, row + len(rows.queries))
        wanted = expected(rows, kv_store, **options)
        assert_close(out[at], wanted[0], rows, kv_store, **options)
        np.testing.assert_allclose(lse[at], wanted[1], rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(sums[index], wanted[2], rtol=1e-4, atol=1e-6)
        row = at.stop
    for other in results[:-1]:
        assert other[0].tobytes() == out.tobytes()
        assert other[1].tobytes() == lse.tobytes()
        assert all(a.tobytes() == b.tobytes() for a, b in zip(other[2], sums, strict=True))


@pytest.mark.parametrize("seed", range(40, 54))
def test_a_row_alone_has_the_same_bits(seed: int) -> None:
    """Alone, what the other rows read is NaN: a row's bits depend on what it may read alone."""
    spans, options = random_case(seed)
    options["kv_store"] = ["float32", "bfloat16"][seed % 2]
    together, _, _ = attend(spans, threads=2, **options)
    row = 0
    for rows in spans:
        for index in range(len(rows.queries)):
            alone, _, _ = attend([rows.only(index)], block_size=64, seed=seed, **options)
            assert alone[0].tobytes() == together[row].tobytes()
            row += 1


def test_a_long_query_is_split_by_entries_alone() -> None:
    """One row over several chunks is cut into items; many rows over the same entries are not."""
    random = np.random.default_rng(0)
    source = Source(normal(random, 5000, 2, 32), normal(random, 5000, 2, 32))
    rows = Rows(normal(random, 700, 4, 32), np.arange(4300, 5000), (source,))
    together, _, _ = attend([rows], threads=2, scale=0.2)
    wanted, _, _ = expected(rows.only(699), "float32", 0.2)
    alone, _, _ = attend([rows.only(699)], threads=2, scale=0.2)
    np.testing.assert_allclose(alone, wanted, rtol=RTOL, atol=ATOL)
    assert alone[0].tobytes() == together[699].tobytes()


@pytest.mark.parametrize("kv_store", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 13, 40])
def test_groups_of_queries_have_the_bits_of_one(num_rows: int, kv_store: str) -> None:
    """Rows share registers, blocks and items in all sizes; the last entries are read by few."""
    random = np.random.default_rng(num_rows)
    source = Source(normal(random, 1300, 2, 48), normal(random, 1300, 2, 48))
    rows = Rows(normal(random, num_rows, 6, 48), np.arange(1300 - num_rows, 1300), (source,))
    isas = {isa: attend([rows], kv_store=kv_store, isa=isa, scale=0.3)[0] for isa in ISAS}
    wanted, _, _ = expected(rows, kv_store, 0.3)
    for out in isas.values():
        assert_close(out, wanted, rows, kv_store, scale=0.3)
        assert out.tobytes() == isas["generic"].tobytes()
    for row in range(num_rows):
        alone, _, _ = attend([rows.only(row)], kv_store=kv_store, scale=0.3)
        assert alone[0].tobytes() == isas["generic"][row].tobytes()


def test_a_row_that_may_read_nothing_is_zero() -> None:
    random = np.random.default_rng(0)
    source = Source(normal(random, 20, 1, 16), normal(random, 20, 1, 16), shift=9)
    rows = Rows(normal(random, 2, 1, 16), np.array([3, 12]), (source,))
    out, lse, _ = attend([rows], scale=1.0)
    assert (out[0] == 0).all()
    assert lse[0, 0] == -np.inf
    assert np.isfinite(out[1]).all()


def test_log_weights_may_remove_entries() -> None:
    random = np.random.default_rng(0)
    weights = np.where(np.arange(70) < 66, -np.inf, 0).astype(np.float32)
    source = Source(normal(random, 70, 1, 16), normal(random, 70, 1, 16), log_weights=weights)
    rows = Rows(normal(random, 1, 1, 16), np.array([69]), (source,))
    rest = Source(source.keys[66:], source.values[66:], shift=66)
    wanted, _, _ = expected(replace(rows, sources=(rest,)), "float32", 1.0)
    np.testing.assert_allclose(attend([rows], scale=1.0)[0], wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [20, 1300, 2600])  # a tile; chunks merged in order; split
@pytest.mark.parametrize("bad", [0, 17, -3])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("kv_store", DTYPES)
def test_a_key_of_nan_shows_where_it_is_read(
    isa: str, length: int, bad: int, with_sinks: bool, kv_store: str
) -> None:
    random = np.random.default_rng(length)
    bad %= length
    keys, values = normal(random, length, 1, 16), normal(random, length, 1, 16)
    broken = keys.copy()
    broken[bad] = np.nan
    positions = np.unique([bad - 1, bad, (bad + length) // 2, length - 1])
    positions = positions[positions >= 0]
    rows = Rows(normal(random, len(positions), 2, 16), positions, (Source(keys, values),))
    options = {
        "scale": 0.3,
        "threads": 2,
        "isa": isa,
        "kv_store": kv_store,
        "sinks": normal(random, 2) if with_sinks else None,
        "wants_sums": True,
    }
    whole, _, _ = attend([rows], **options)
    out, lse, sums = attend([replace(rows, sources=(Source(broken, values),))], **options)
    sees = positions >= bad
    assert np.isnan(out[sees]).all()
    assert np.isnan(lse[sees]).all()
    assert np.isnan(sums[0][:, bad]).all()
    assert out[~sees].tobytes() == whole[~sees].tobytes()


@pytest.mark.parametrize("kv_store", DTYPES)
def test_an_infinite_score_is_not_zero(kv_store: str) -> None:
    random = np.random.default_rng(0)
    keys, values = normal(random, 20, 1, 16), normal(random, 20, 1, 16)
    keys[3] = ml_dtypes.finfo(DTYPES[kv_store]).max
    rows = Rows(np.ones((1, 1, 16), np.float32), np.array([19]), (Source(keys, values),))
    assert np.isnan(attend([rows], scale=1.0, kv_store=kv_store)[0]).all()


@pytest.mark.parametrize("kv_store", DTYPES)
def test_more_heads_than_an_item_has_room_for(kv_store: str) -> None:
    random = np.random.default_rng(0)
    source = Source(normal(random, 90, 1, 16), normal(random, 90, 1, 16))
    rows = Rows(normal(random, 3, 50, 16), np.arange(87, 90), (source,))
    out, _, _ = attend([rows], scale=0.3, kv_store=kv_store)
    assert_close(out, expected(rows, kv_store, 0.3)[0], rows, kv_store, scale=0.3)


@pytest.mark.parametrize(
    ("column", "value"), [(0, 2**60), (1, 2**62), (2, -(2**63)), (5, 2**40), (9, 2**62), (10, 1)]
)
def test_sizes_that_add_up_only_after_a_wrap_are_refused(column: int, value: int) -> None:
    """Sixteen times 2^60 blocks are none in 64 bits."""
    native = _native.Attention("float32", 1, 16, 4, 16)
    segments = np.zeros((16, 11), np.int64)
    segments[:, 9] = -1
    spans = np.array([[0, 1, 16]], np.int64)
    nothing = np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.float32)
    query, position = np.ones((1, 1, 16), np.float32), np.zeros(1, np.int32)
    flat = (np.zeros(1, np.int64), spans, segments, *nothing)
    assert (native(query, position, flat, 1.0)[0] == 0).all()
    if column == 10:
        segments[:, 1] = 1
    segments[:, column] = value
    with pytest.raises(NativeError, match=r"32 bits|do not fit"):
        native(query, position, flat, 1.0)
    segments[:] = 0
    segments[:, 9] = -1
    spans[0, 1] = 2**62
    with pytest.raises(NativeError, match="no such rows"):
        native(query, position, flat, 1.0)
