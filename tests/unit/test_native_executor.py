"""The native executor against plain numpy, and along every axis that must not show."""

from __future__ import annotations

import resource
import threading
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import reference_model
from native_cases import (
    Builder,
    CachedSequence,
    bits,
    executor,
    llama,
    mixture,
    run,
    sequence_of,
    step_of,
    tokens_of,
)

from vivace import _native
from vivace.blocks import (
    Activation,
    AttentionBlock,
    EmbeddingSpec,
    HeadSpec,
    LayerGroup,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    RopeSpec,
    Routing,
    WeightRef,
)
from vivace.errors import BadFile, NativeError
from vivace.types import CancelFlag, GroupRows, Mask, MaskKind, Segment, Span, Step, Wants

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.4, "float16": 0.05}  # of logits of spread 20


def everything() -> tuple[ModelGraph, dict[str, np.ndarray]]:
    """A graph that uses every field of the block list at once."""
    make = Builder(3)
    hidden, vocab, head_dim, inner = 44, 61, 24, 36
    ropes = (
        RopeSpec(tuple(0.7 / (j + 1) for j in range(6)), attention_factor=1.2, is_interleaved=True),
        RopeSpec(tuple(0.9 / (j + 1) for j in range(12))),
    )

    def attention(layer: int, heads: int, kv_heads: int, **options) -> AttentionBlock:
        q, kv = heads * head_dim, kv_heads * head_dim
        return AttentionBlock(
            layer=layer,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            qkv=make.linear(hidden, q, kv, kv, bias=True),
            out=make.linear(q, hidden, bias=True),
            scale=0.3,
            **options,
        )

    def mlp(layer: int, activation: Activation, *, gated: bool, **options) -> MlpBlock:
        rows = (inner, inner) if gated else (inner,)
        return MlpBlock(
            layer=layer,
            gate_up=make.linear(hidden, *rows, bias=not gated),
            down=make.linear(inner, hidden, bias=True),
            activation=activation,
            **options,
        )

    layer_norm = NormKind.LAYER
    blocks = (
        attention(
            0,
            6,
            2,
            norm=make.norm(hidden, unit_offset=True),
            post_norm=make.norm(hidden),
            q_norm=make.norm(head_dim),
            k_norm=make.norm(head_dim, unit_offset=True),
            soft_cap=1.5,
            sinks=make.tensor(6),
            rope=0,
        ),
        mlp(0, Activation.GELU_TANH, gated=True, norm=make.norm(hidden), residual_scale=0.7),
        attention(
            1,
            5,
            1,
            norm=make.norm(hidden, layer_norm),
            q_norm=make.norm(5 * head_dim),
            k_norm=make.norm(head_dim, layer_norm),
            rope=None,
            group=1,
            residual_scale=1.3,
        ),
        mlp(1, Activation.GELU, gated=False, norm=make.norm(hidden, layer_norm)),
        attention(2, 2, 2, norm=None, rope=1, cache_layer=1, k_norm=make.norm(2 * head_dim)),
        mlp(2, Activation.RELU, gated=False, norm=None, post_norm=make.norm(hidden, layer_norm)),
        LinearBlock(
            3, make.linear(hidden, hidden, bias=True), make.norm(hidden), make.norm(hidden), 0.6
        ),
        make.experts(
            hidden,
            bias=True,
            shared=13,
            shared_gate=True,
            activation=Activation.GELU,
            routing=Routing.SPARSE_MIXER,
            jitter=0.3,
            post_norm=make.norm(hidden, layer_norm),
            residual_scale=0.8,
            layer=4,
        ),
    )
    graph = ModelGraph(
        family="everything",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=256,
        embedding=EmbeddingSpec(make.tensor(vocab, hidden), 2.5, make.tensor(256, hidden)),
        blocks=blocks,
        head=HeadSpec(
            make.linear(hidden, vocab, bias=True), make.norm(hidden, layer_norm), 0.5, 8.0
        ),
        groups=(LayerGroup(2, 2, head_dim), LayerGroup(1, 1, head_dim, window=9)),
        ropes=ropes,
    )
    return graph, make.weights


# ---------------------------------------------------------------- against numpy


def test_llama_equals_numpy() -> None:
    graph, weights = llama()
    sequence = sequence_of(150)
    expected, _ = reference_model.forward(graph, weights, sequence.tokens)
    np.testing.assert_allclose(
        run(executor(graph, weights), sequence, 150), expected, atol=TOLERANCE["float32"]
    )


@pytest.mark.parametrize("isa", _native.isa_names())
def test_every_field_equals_numpy(isa: str) -> None:
    graph, weights = everything()
    sequence = CachedSequence.of(tokens_of(70, 61), [9, 4, 30, 2, 17])
    native = executor(graph, weights, isa=isa)
    expected, states = reference_model.forward(graph, weights, sequence.tokens)
    wants = Wants(
        logits_rows=np.arange(70, dtype=np.int32),
        hidden={i: np.arange(70, dtype=np.int32) for i in range(len(graph.blocks))},
    )
    output = native.forward(step_of(graph, [(sequence, 0, 70)], wants=wants))
    for index, state in enumerate(states):
        np.testing.assert_allclose(output.hidden[index], state, atol=2e-4, rtol=1e-5)
    np.testing.assert_allclose(output.logits, expected, atol=1e-4)
    native.fill_cache(255)
    assert bits(run(native, sequence, 13)) == bits(output.logits)


@pytest.mark.parametrize("weight_format", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_store", ["float32", "bfloat16"])
def test_sixteen_bits_are_near_numpy(weight_format: str, kv_store: str) -> None:
    graph, weights = llama()
    dtype = np.dtype(getattr(ml_dtypes, weight_format, weight_format))
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    sequence = sequence_of(40)
    expected, _ = reference_model.forward(graph, weights, sequence.tokens)
    native = executor(graph, weights, weight_format=weight_format, kv_store=kv_store)
    got = run(native, sequence, 40)
    tolerance = max(TOLERANCE[weight_format], TOLERANCE[kv_store])
    assert 0 < np.abs(got - expected).max() < tolerance


def test_transposed_and_sliced_weights() -> None:
    graph, weights = llama(layers=1)
    attention = graph.blocks[0]
    assert isinstance(attention, AttentionBlock)
    parts = attention.qkv.parts
    fused = np.concatenate([weights[part.name] for part in parts]).T.copy()
    starts = np.cumsum([0] + [part.shape[0] for part in parts])
    refs = tuple(
        WeightRef("fused", part.shape, int(start), True)
        for part, start in zip(parts, starts, strict=False)
    )
    qkv = LinearSpec(attention.qkv.in_features, refs, attention.qkv.biases)
    other = replace(graph, blocks=(replace(attention, qkv=qkv), graph.blocks[1]))
    sequence = sequence_of(20)
    plain = run(executor(graph, weights), sequence, 20)
    assert bits(run(executor(other, weights | {"fused": fused}), sequence, 20)) == bits(plain)


@pytest.mark.parametrize("length", [1, 20])
def test_heads_finished_where_they_are_computed_have_the_same_bits(length: int) -> None:
    """Where a part of QKV ends inside a head, rows are rotated and written after all of it."""
    graph, weights = llama(layers=2)
    blocks = list(graph.blocks)
    for index, block in enumerate(blocks):
        if not isinstance(block, AttentionBlock):
            continue
        q, k, v = block.qkv.parts
        cut = block.head_dim // 2 + 1
        first, rest = (cut, *q.shape[1:]), (q.shape[0] - cut, *q.shape[1:])
        parts = (replace(q, shape=first), replace(q, shape=rest, first_row=cut), k, v)
        qkv = LinearSpec(block.qkv.in_features, parts, (None,) * 4)
        blocks[index] = replace(block, qkv=qkv)
    other = replace(graph, blocks=tuple(blocks))
    sequence = sequence_of(length)
    plain = run(executor(graph, weights), sequence, length)
    assert bits(run(executor(other, weights), sequence, length)) == bits(plain)


@pytest.mark.parametrize("length", [1, 20])
def test_what_is_added_at_once_has_the_same_bits(length: int) -> None:
    """A block with a site keeps its result, calls the site, and is added afterwards."""
    graph, weights = llama(layers=2)
    native, sequence = executor(graph, weights), sequence_of(length)
    plain = run(native, sequence, length)
    seen: list[int] = []
    for index in range(len(graph.blocks)):
        native.set_site(index, lambda x: seen.append(len(x)))
    assert bits(run(native, sequence, length)) == bits(plain)
    assert len(seen) >= len(graph.blocks)


# ---------------------------------------------------------------- axes that must not show


AXES = {
    "chunk of 1": {"chunk": 1},
    "chunk of 7": {"chunk": 7},
    "chunk of 64": {"chunk": 64},
    "one thread": {"threads": 1},
    "blocks of 64": {"block_size": 64},
    **{isa: {"isa": isa} for isa in _native.isa_names()},
}
LENGTH = 1100  # beyond one chunk of entries that are merged
MODELS = {"llama": llama, "mixture": mixture}


def axis_logits(
    axis: dict, model: str, weight_format: str, kv_store: str, wrong: bool = False
) -> np.ndarray:
    """Logits of a long sequence run in some way."""
    options = {"chunk": 512, "threads": 2, "block_size": 16, "isa": None} | axis
    graph, weights = MODELS[model](hidden=32, heads=4, head_dim=16, inner=40)
    sequence = sequence_of(LENGTH, block_size=options["block_size"], blocks=80)
    native = executor(
        graph,
        weights,
        weight_format=weight_format,
        kv_store=kv_store,
        blocks=80,
        block_size=options["block_size"],
        threads=options["threads"],
        isa=options["isa"],
    )
    if wrong:
        native.set_site(1, add_one_ulp)
    return run(native, sequence, options["chunk"])


def add_one_ulp(x: np.ndarray) -> None:
    """A linear whose rows after the first are off by one unit in the last place."""
    x[1:] = np.nextafter(x[1:], np.float32(np.inf))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("weight_format", "kv_store"), [("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_no_axis_shows(model: str, weight_format: str, kv_store: str) -> None:
    expected = axis_logits({}, model, weight_format, kv_store)
    assert np.isfinite(expected).all()
    for name, axis in AXES.items():
        got = axis_logits(axis, model, weight_format, kv_store)
        assert bits(got) == bits(expected), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_wrong_linear_shows(model: str, chunk: int) -> None:
    expected = axis_logits({}, model, "float32", "float32", wrong=True)
    got = axis_logits({"chunk": chunk}, model, "float32", "float32", wrong=True)
    assert bits(got) != bits(expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [2, 7, 32])
def test_batches_do_not_show(model: str, batch: int) -> None:
    graph, weights = MODELS[model]()
    lengths = np.random.default_rng(5).integers(1, 60, batch)
    starts = np.cumsum([0, *(-(-lengths // 16))])
    native = executor(graph, weights, blocks=int(starts[-1]))
    ids = np.random.default_rng(6).permutation(int(starts[-1]))
    sequences = [
        CachedSequence.of(tokens_of(n, seed=10 + i), ids[starts[i] : starts[i + 1]])
        for i, n in enumerate(lengths)
    ]
    alone = [run(native, sequence, 1000) for sequence in sequences]
    native.fill_cache(255)
    parts = [(sequence, 0, len(sequence.tokens) - 1) for sequence in sequences]
    native.forward(step_of(graph, [part for part in parts if part[2] > 0]))
    last = [(sequence, len(sequence.tokens) - 1, len(sequence.tokens)) for sequence in sequences]
    together = native.forward(step_of(graph, last)).logits
    for index, logits in enumerate(alone):
        assert bits(together[index]) == bits(logits[-1])


# ---------------------------------------------------------------- by-products and ranges


def test_hidden_top_logits_and_block_ranges() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    sequence = sequence_of(30)
    rows = np.array([29, 3], np.int32)
    wants = Wants(logits_rows=rows, hidden={0: rows, 4: rows}, num_top_logits=5)
    whole = native.forward(step_of(graph, [(sequence, 0, 30)], wants=wants))
    order = np.lexsort((np.arange(97)[None, :].repeat(2, 0), -whole.logits), axis=1)[:, :5]
    assert whole.top_ids is not None
    assert whole.top_logits is not None
    np.testing.assert_array_equal(whole.top_ids, order)
    np.testing.assert_array_equal(whole.top_logits, np.take_along_axis(whole.logits, order, 1))

    everyone = np.arange(30, dtype=np.int32)
    first = native.forward(
        step_of(graph, [(sequence, 0, 30)], wants=Wants(hidden={1: everyone}, last_block=2))
    )
    assert first.logits.shape == (0, 97)
    rest = step_of(
        graph, [(sequence, 0, 30)], wants=Wants(logits_rows=rows, hidden={4: rows}, first_block=2)
    )
    rest = native.forward(replace(rest, embeddings=(everyone, first.hidden[1])))
    assert bits(rest.logits) == bits(whole.logits)
    assert bits(rest.hidden[4]) == bits(whole.hidden[4])


def test_attention_sums_add_up() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    sequence = sequence_of(50)
    native.forward(step_of(graph, [(sequence, 0, 40)]))
    wants = Wants(logits_rows=np.arange(10, dtype=np.int32), attention_sums=True)
    output = native.forward(step_of(graph, [(sequence, 40, 50)], wants=wants))
    sums = output.attention_sums
    assert sums is not None
    assert [[part.shape for part in block] for block in sums] == [[(4, 50)], [(4, 50)]]
    np.testing.assert_allclose(sums[0][0].sum(-1), 10, rtol=1e-5)
    assert (sums[0][0][:, 49] <= 1).all()  # the last entry is seen by one row


def test_tree_rows_see_their_own_path() -> None:
    """Two drafts after a prompt, side by side: each row's logits are those of its own sequence."""
    graph, weights = llama()
    native = executor(graph, weights)
    prompt, drafts = tokens_of(20), [tokens_of(2, seed=7), tokens_of(2, seed=8)]
    alone = []
    for draft in drafts:
        sequence = CachedSequence.of([*prompt, *draft], [3, 8])
        alone.append(run(native, sequence, 22)[20:])
        native.fill_cache(255)
    sequence = CachedSequence.of([*prompt, *drafts[0], *drafts[1]], [5, 1])
    native.forward(step_of(graph, [(sequence, 0, 20)]))
    tree = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool)
    mask = Mask(MaskKind.TREE, tree=tree)
    step = step_of(graph, [(sequence, 20, 24)], masks=[mask])
    step = replace(step, positions=np.array([20, 21, 20, 21], np.int32))
    np.testing.assert_allclose(native.forward(step).logits, np.concatenate(alone), atol=1e-4)


def test_cancelling_stops_before_the_next_block() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    cancel, seen = CancelFlag(), []
    step = replace(step_of(graph, [(sequence_of(10), 0, 10)]), cancel=cancel)

    def record(x: np.ndarray) -> None:
        seen.append(x.copy())
        cancel.set()

    native.set_site(1, record)
    native.set_site(2, record)
    assert native.forward(step).is_cancelled
    assert len(seen) == 1
    assert seen[0].shape == (10, 48)


def test_sites_edit_and_raise() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    sequence = sequence_of(10)
    plain = run(native, sequence, 10)

    def erase(x: np.ndarray) -> None:
        x[:] = 0

    for index in range(4):
        native.set_site(index, erase)
    skipped = replace(graph, blocks=())
    expected, _ = reference_model.forward(skipped, weights, sequence.tokens)
    np.testing.assert_allclose(run(native, sequence, 10), expected, atol=1e-4)

    def fail(x: np.ndarray) -> None:
        raise KeyError("mine")

    native.set_site(0, fail)
    with pytest.raises(KeyError, match="mine"):
        run(native, sequence, 10)
    for index in range(4):
        native.set_site(index, None)
    assert bits(run(native, sequence, 10)) == bits(plain)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("kv_store", ["float32", "bfloat16"])
def test_blocks_can_be_copied_and_moved(kv_store: str) -> None:
    graph, weights = llama()
    native, other = (executor(graph, weights, kv_store=kv_store) for _ in range(2))
    sequence = sequence_of(40, blocks=60)
    plain = run(native, sequence, 40)[-1]
    native.forward(step_of(graph, [(sequence, 0, 39)]))
    moved = replace(sequence, block_ids=np.array([60, 61, 62], np.int32))
    native.copy_blocks(0, sequence.block_ids.tolist(), [60, 61, 62])
    raw = native.read_blocks(0, sequence.block_ids.tolist())
    assert raw.shape == (3, native.bytes_per_block(0, 16))
    other.write_blocks(0, [60, 61, 62], raw)
    for one in (native, other):
        assert bits(one.forward(step_of(graph, [(moved, 39, 40)])).logits[0]) == bits(plain)


def test_freed_window_blocks_are_never_touched() -> None:
    graph, weights = llama(window=20)
    sequence = sequence_of(90)
    native = executor(graph, weights)
    expected = run(native, sequence, 90)[-1]
    freed = sequence.block_ids.copy()
    freed[: (89 - 20 + 1) // 16] = -1
    gone = replace(sequence, block_ids=freed)
    assert bits(native.forward(step_of(graph, [(gone, 89, 90)])).logits[0]) == bits(expected)
    freed[(89 - 20 + 1) // 16] = -1
    with pytest.raises(NativeError, match="not held"):
        native.forward(step_of(graph, [(replace(sequence, block_ids=freed), 89, 90)]))


# ---------------------------------------------------------------- refusals


def test_tensors_are_checked() -> None:
    graph, weights = llama()
    name = graph.head.linear.parts[0].name
    with pytest.raises(BadFile, match=name):
        executor(graph, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(BadFile, match=r"shape \[98, 48\].*asks for \[97, 48\]"):
        executor(graph, weights | {name: np.zeros((98, 48), np.float32)})
    for key in weights:
        broken = weights[key].copy()
        broken.flat[-1] = np.nan
        with pytest.raises(BadFile, match=f"'{key}' holds NaN"):
            executor(graph, weights | {key: broken})


def test_steps_are_checked() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    good = step_of(graph, [(sequence_of(5), 0, 5)])

    def refuse(match: str, **changes) -> None:
        with pytest.raises(NativeError, match=match):
            native.forward(replace(good, **changes))

    refuse("token 97", tokens=np.full(5, 97, np.int32))
    refuse("token -1", tokens=np.full(5, -1, np.int32))
    refuse("position -2", positions=np.full(5, -2, np.int32))
    refuse("position 4096 is beyond", positions=np.full(5, 4096, np.int32))
    group = good.groups[0]
    refuse("slot 1024", groups=(replace(group, slots=np.full(5, 1024)),))
    refuse("slot -1", groups=(replace(group, slots=np.full(5, -1)),))
    refuse("cover 3 of 5", groups=(replace(group, spans=(Span(0, 3, group.spans[0].segments),)),))
    few = Segment(np.array([64], np.int32), 5)
    refuse("block 64", groups=(replace(group, spans=(Span(0, 5, (few,)),)),))
    many = Segment(np.array([1], np.int32), 17)
    refuse("17 entries", groups=(replace(group, spans=(Span(0, 5, (many,)),)),))
    refuse("row 5", wants=Wants(logits_rows=np.array([5], np.int32)))
    refuse("layer groups", groups=())
    refuse("block 9", wants=Wants(hidden={9: np.array([0], np.int32)}))
    assert np.isfinite(native.forward(good).logits).all()


def test_one_step_at_a_time() -> None:
    """A site that runs another step, or frees the cache under the running one, is refused."""
    graph, weights = llama()
    native = executor(graph, weights)
    step = step_of(graph, [(sequence_of(5), 0, 5)])
    failures = []

    def meddle(_: np.ndarray) -> None:
        for call in (lambda: native.forward(step), lambda: native.allocate([1], 16)):
            try:
                call()
            except NativeError as error:
                failures.append(str(error))

    native.set_site(0, meddle)
    thread = threading.Thread(target=native.forward, args=(step,))
    thread.start()
    thread.join()
    assert len(failures) == 2
    assert all("running" in failure for failure in failures)


def test_unknown_instruction_sets_and_threads_are_refused() -> None:
    graph, weights = llama()
    with pytest.raises(NativeError, match="sse9"):
        executor(graph, weights, isa="sse9")
    with pytest.raises(NativeError, match="threads is 0"):
        executor(graph, weights, threads=0)


@pytest.mark.parametrize("wanted", [[], [29], [0, 29, 41], [41, 3, 3]])
def test_rows_that_nobody_wants_stop_after_the_last_cache_write(wanted: list[int]) -> None:
    """Fewer rows go on, with the same bits, and the cache is complete all the same."""
    graph, weights = everything()
    parts = [(sequence_of(30), 0, 30), (sequence_of(25, seed=2), 0, 25)]
    for index, (sequence, _, _) in enumerate(parts):
        sequence.tokens %= graph.vocab_size
        sequence.block_ids[:] = np.arange(len(sequence.block_ids))[::-1] + 8 * index
    rows = np.array(wanted, np.int32)
    end = len(graph.blocks)
    some = Wants(logits_rows=rows, hidden={0: rows, end - 1: rows, end: rows}, num_top_logits=3)
    every = np.arange(55, dtype=np.int32)
    all_rows = Wants(
        logits_rows=every, hidden={0: every, end - 1: every, end: every}, num_top_logits=3
    )
    narrow, wide = (executor(graph, weights, blocks=96) for _ in range(2))
    output = narrow.forward(step_of(graph, parts, wants=some))
    full = wide.forward(step_of(graph, parts, wants=all_rows))
    assert bits(output.logits) == bits(full.logits[rows])
    for block, states in output.hidden.items():
        assert bits(states) == bits(full.hidden[block][rows])
    assert output.top_ids is not None
    assert full.top_ids is not None
    assert bits(output.top_ids) == bits(full.top_ids[rows])
    ids = np.concatenate([part[0].block_ids for part in parts]).tolist()
    for group in range(len(graph.groups)):
        assert bits(narrow.read_blocks(group, ids)) == bits(wide.read_blocks(group, ids))


@pytest.mark.parametrize("kv_store", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_keys_and_values_that_overflow_are_refused(kv_store: str, value: float) -> None:
    """Else rows that may not read them would still multiply them by zero."""
    graph, weights = llama()
    block = graph.blocks[2]
    graph = replace(graph, blocks=(*graph.blocks[:2], replace(block, norm=None), graph.blocks[3]))
    native, fresh = (executor(graph, weights, kv_store=kv_store) for _ in range(2))
    step = step_of(graph, [(sequence_of(20), 0, 20)])

    def break_row(x: np.ndarray) -> None:
        x[13] = value

    native.set_site(1, break_row)
    with pytest.raises(NativeError, match="block 2 are NaN or infinite: activations overflowed"):
        native.forward(step)
    native.set_site(1, None)
    assert bits(native.forward(step).logits) == bits(fresh.forward(step).logits)


def test_a_step_works_after_one_that_memory_was_too_small_for() -> None:
    graph, weights = llama()
    native = executor(graph, weights)
    step = step_of(graph, [(sequence_of(5), 0, 5)])
    expected = native.forward(step).logits
    rows = 1_000_000  # of 192 bytes
    segments = step.groups[0].spans[0].segments
    huge = Step(
        np.zeros(rows, np.int32),
        np.zeros(rows, np.int32),
        (GroupRows(np.zeros(rows, np.int64), (Span(0, rows, segments),)),),
        Wants(),
    )
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20), limits[1]))
    try:
        with pytest.raises(MemoryError):
            native.forward(huge)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert bits(native.forward(step).logits) == bits(expected)
