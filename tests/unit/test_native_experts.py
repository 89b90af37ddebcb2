"""Routed experts and single linears of the native executor, one block at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

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
    sequence_of,
    step_of,
)

from vivace import _native
from vivace.blocks import (
    Activation,
    Block,
    EmbeddingSpec,
    Expert,
    ExpertsBlock,
    HeadSpec,
    LinearBlock,
    LinearSpec,
    ModelGraph,
    Routing,
    WeightRef,
)
from vivace.errors import NativeError
from vivace.executors.native import NativeExecutor
from vivace.techniques.weight_formats.base import Packed
from vivace.techniques.weight_formats.bfloat16 import Bfloat16
from vivace.types import Wants

HIDDEN, VOCAB = 44, 61


def graph_of(make: Builder, *blocks: Block) -> ModelGraph:
    """These blocks alone between an embedding and a head: rows have no past."""
    return ModelGraph(
        family="blocks",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_positions=4096,
        embedding=EmbeddingSpec(make.tensor(VOCAB, HIDDEN)),
        blocks=blocks,
        head=HeadSpec(make.linear(HIDDEN, VOCAB), None),
        groups=(),
    )


def states(native: NativeExecutor, tokens: np.ndarray, chunk: int = 4096) -> list[np.ndarray]:
    """The states after each block, of rows that are run in chunks."""
    sequence = CachedSequence.of(tokens, [])
    chunks = []
    for first in range(0, len(tokens), chunk):
        last = min(first + chunk, len(tokens))
        rows = np.arange(last - first, dtype=np.int32)
        wants = Wants(hidden=dict.fromkeys(range(len(native.graph.blocks)), rows))
        output = native.forward(step_of(native.graph, [(sequence, first, last)], wants=wants))
        chunks.append([output.hidden[i] for i in range(len(native.graph.blocks))])
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, VOCAB, count).astype(np.int32)


def with_logits(make: Builder, block: ExpertsBlock, logits: list[float]) -> ExpertsBlock:
    """The same router logits for every row."""
    (router,), (bias,) = block.router.parts, block.router.biases
    assert bias is not None
    make.weights[router.name][:] = 0
    make.weights[bias.name][:] = logits
    return block


# ---------------------------------------------------------------- against numpy

Case = Callable[[Builder], ExpertsBlock]
MIXER, CHOSEN = Routing.SPARSE_MIXER, Routing.SOFTMAX_CHOSEN
GELU, GELU_TANH, RELU = Activation.GELU, Activation.GELU_TANH, Activation.RELU
CASES: dict[str, Case] = {
    "softmax": lambda make: make.experts(HIDDEN),
    "chosen": lambda make: make.experts(HIDDEN, routing=CHOSEN, activation=GELU),
    "mixer": lambda make: make.experts(HIDDEN, routing=MIXER, jitter=0.3, num_active=2),
    "mixer that never mixes": lambda make: make.experts(HIDDEN, routing=MIXER, num_active=2),
    "mixer of all": lambda make: make.experts(HIDDEN, routing=MIXER, jitter=0.6, num_active=7),
    "biases": lambda make: make.experts(HIDDEN, bias=True, shared=9, shared_gate=True),
    "not gated": lambda make: make.experts(HIDDEN, gated=False, bias=True, activation=RELU),
    "shared": lambda make: make.experts(HIDDEN, shared=100, activation=GELU_TANH, inner=3),
    "shared with a gate": lambda make: make.experts(HIDDEN, shared=5, shared_gate=True),
    "all": lambda make: make.experts(HIDDEN, num_experts=5, num_active=5),
    "one of one": lambda make: make.experts(HIDDEN, num_experts=1, num_active=1),
    "one of many": lambda make: make.experts(HIDDEN, num_experts=70, num_active=1),
    "many": lambda make: make.experts(HIDDEN, num_experts=150, num_active=70, inner=1),
}
SAME_FOR_ALL: dict[str, Case] = {
    f"{name} {logits}": lambda make, options=options, logits=logits: with_logits(
        make, make.experts(HIDDEN, num_experts=5, bias=True, **options), logits
    )
    for logits in (
        [0.0] * 5,
        [1.0, 2, 2, 1, 2],
        [-3.0, -3, -1, -3, -1],
        [9.0, 0, 0, 80, 0],
        [-95.0, -90, -85, -70, -80],
    )
    for name, options in {
        "softmax": {},
        "chosen": {"routing": CHOSEN},
        "mixer": {"routing": MIXER, "jitter": 0.3},
    }.items()
}


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("case", CASES | SAME_FOR_ALL)
def test_experts_equal_numpy(case: str, isa: str) -> None:
    make = Builder(5)
    graph = graph_of(make, (CASES | SAME_FOR_ALL)[case](make))
    tokens = tokens_of(61)
    _, expected = reference_model.forward(graph, make.weights, tokens)
    (got,) = states(executor(graph, make.weights, isa=isa), tokens)
    np.testing.assert_allclose(got, expected[0], atol=1e-5, rtol=1e-5)


def test_some_experts_are_visited_by_all_and_some_by_nobody() -> None:
    make = Builder(6)
    block = make.experts(HIDDEN, bias=True)
    (bias,) = block.router.biases
    assert bias is not None
    make.weights[bias.name][[0, 2]] = -50, 50
    graph = graph_of(make, block)
    tokens = tokens_of(40)

    def run_with(changed: int) -> np.ndarray:
        """With another expert in this one's place."""
        experts = list(block.experts)
        experts[changed] = experts[1]
        blocks = (replace(block, experts=tuple(experts)),)
        return states(executor(replace(graph, blocks=blocks), make.weights), tokens)[0]

    _, expected = reference_model.forward(graph, make.weights, tokens)
    got = run_with(1)
    np.testing.assert_allclose(got, expected[0], atol=1e-5)
    assert bits(run_with(0)) == bits(got)
    assert (run_with(2) != got).any(axis=1).all()


def test_a_linear_equals_numpy() -> None:
    make = Builder(7)
    block = LinearBlock(
        0, make.linear(HIDDEN, HIDDEN, bias=True), make.norm(HIDDEN), make.norm(HIDDEN), 0.5
    )
    graph = graph_of(make, block, replace(block, norm=None, post_norm=None))
    tokens = tokens_of(37)
    _, expected = reference_model.forward(graph, make.weights, tokens)
    for got, state in zip(states(executor(graph, make.weights), tokens), expected, strict=True):
        np.testing.assert_allclose(got, state, atol=1e-5)


# ---------------------------------------------------------------- to the bit


def test_experts_add_up_in_order_of_rank_and_the_shared_one_last() -> None:
    """A mixer that never mixes gives weights of one, so sums of float32 can be told apart."""
    make = Builder(8)
    block = make.experts(HIDDEN, num_experts=4, bias=True, shared=9, routing=MIXER)
    assert block.shared is not None
    with_logits(make, block, [2.0, 1, 9, 3])
    graph = graph_of(make, block)
    tokens = tokens_of(30)

    def core(of: ExpertsBlock) -> np.ndarray:
        """What the block gives before it is added to the state."""
        seen = []
        native = executor(replace(graph, blocks=(of,)), make.weights)
        native.set_site(0, lambda x: seen.append(x.copy()))
        states(native, tokens)
        return seen[0]

    one = replace(block, router=make.linear(HIDDEN, 1), num_active=1, shared=None)
    a, _, c, d, shared = (
        core(replace(one, experts=(expert,))) for expert in (*block.experts, block.shared)
    )
    got = bits(core(block))
    assert got == bits(((c + d) + a) + shared)
    assert got != bits(((a + c) + d) + shared)
    assert got != bits(((shared + c) + d) + a)


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["softmax", "biases", "mixer", "many"])
def test_rows_do_not_know_each_other(case: str, weight_format: str) -> None:
    """More rows than are held at a time, by the rows around, the threads and instruction sets."""
    make = Builder(9)
    graph = graph_of(make, CASES[case](make))
    tokens = tokens_of(1100)
    native = executor(graph, make.weights, weight_format=weight_format, threads=1)
    (expected,) = states(native, tokens)
    for chunk in (1, 7, 64):
        assert bits(states(native, tokens[:200], chunk)[0]) == bits(expected[:200])
    for threads, isa in ((3, None), *((1, isa) for isa in _native.isa_names())):
        other = executor(graph, make.weights, weight_format=weight_format, threads=threads, isa=isa)
        assert bits(states(other, tokens)[0]) == bits(expected), (threads, isa)


# ---------------------------------------------------------------- binding


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
def test_an_expert_may_be_rows_of_a_stacked_tensor(
    weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own rows are packed; rows that are stored as they are stay where they are."""
    graph, weights = mixture()
    stacked: dict[str, np.ndarray] = {}

    def stack(specs: list[LinearSpec], name: str) -> list[LinearSpec]:
        """The same linears with part i of all in one tensor."""
        refs = []
        for i, parts in enumerate(zip(*(spec.parts for spec in specs), strict=True)):
            stacked[f"{name}.{i}"] = np.concatenate([weights[part.name] for part in parts])
            refs.append(
                [
                    WeightRef(f"{name}.{i}", part.shape, n * part.shape[0])
                    for n, part in enumerate(parts)
                ]
            )
        return [
            replace(spec, parts=tuple(parts))
            for spec, parts in zip(specs, zip(*refs, strict=True), strict=True)
        ]

    blocks: list[Block] = []
    for index, block in enumerate(graph.blocks):
        if isinstance(block, ExpertsBlock):
            gate_ups = stack([expert.gate_up for expert in block.experts], f"{index}.gate_up")
            downs = stack([expert.down for expert in block.experts], f"{index}.down")
            block = replace(block, experts=tuple(map(Expert, gate_ups, downs)))
        blocks.append(block)
    other = replace(graph, blocks=tuple(blocks))
    packed: list[np.ndarray] = []
    pack = Bfloat16.pack

    def record(self: Bfloat16, weight: np.ndarray) -> Packed:
        packed.append(weight)
        return pack(self, weight)

    sequence = sequence_of(30)
    plain = executor(graph, weights, weight_format=weight_format)
    monkeypatch.setattr(Bfloat16, "pack", record)
    native = executor(other, weights | stacked, weight_format=weight_format)
    steps = [step_of(graph, [(sequence, 0, 30)]) for _ in range(2)]
    assert bits(plain.forward(steps[0]).logits) == bits(native.forward(steps[1]).logits)
    refs = [ref for ref in other.linears() if ref.name in stacked]
    assert len(refs) > 30
    if weight_format == "float32":
        for ref in refs:
            assert np.shares_memory(native._tensors.matrix(ref).data, stacked[ref.name])
    else:
        whole = {id(array) for array in stacked.values()}
        sizes = Counter(array.shape for array in packed if id(array.base) in whole)
        assert sizes == Counter(ref.shape for ref in refs)


def test_blocks_are_checked_when_bound() -> None:
    make = Builder(10)
    good = make.experts(HIDDEN, num_experts=3, shared=9, shared_gate=True)
    other = make.expert(HIDDEN, 21, gated=True)

    def refuse(match: str, block: Block) -> None:
        with pytest.raises(NativeError, match=match):
            executor(graph_of(make, block), make.weights)

    def refuse_expert(match: str, **changes: LinearSpec) -> None:
        broken = replace(good.experts[2], **changes)
        refuse(f"expert 2's {match}", replace(good, experts=(*good.experts[:2], broken)))
        refuse(f"the shared expert's {match}", replace(good, shared=broken))

    executor(graph_of(make, good), make.weights)
    refuse("router reads 40 features, expected 44", replace(good, router=make.linear(40, 3)))
    refuse("router .*gives 3 features, expected 4", replace(good, router=make.linear(HIDDEN, 2)))
    refuse("expected 4", replace(good, shared_gate=make.linear(HIDDEN, 2)))
    refuse("shared_gate reads 40 features", replace(good, shared_gate=make.linear(40, 1)))
    refuse("shared_gate needs a shared expert", replace(good, shared=None))
    refuse("visits 0 experts of 3", replace(good, num_active=0))
    refuse("visits 4 experts of 3", replace(good, num_active=4))
    refuse("jitter is -0.1", replace(good, jitter=-0.1))
    refuse_expert("gate_up reads 40 features", gate_up=make.linear(40, 20, 20))
    refuse_expert("gate_up needs one part, or two", gate_up=make.linear(HIDDEN, 20, 19))
    refuse_expert("gate_up needs one part, or two", gate_up=make.linear(HIDDEN, 20, 20, 20))
    refuse_expert("down reads 19 features, expected 20", down=make.linear(19, HIDDEN))
    refuse_expert("down gives 43 features, expected 44", down=make.linear(20, 43))
    refuse("expert 2's shape is not", replace(good, experts=(*good.experts[:2], other)))
    linear = LinearBlock(0, make.linear(HIDDEN, 43), None)
    refuse("linear gives 43 features, expected 44", linear)
    refuse("linear reads 43 features, expected 44", replace(linear, linear=make.linear(43, HIDDEN)))
    refuse("norm has 43 weights, expected 44", replace(good, norm=make.norm(43)))
    refuse("post_norm has 43 weights", replace(good, post_norm=make.norm(43)))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_router_logits_that_overflow_are_refused(value: float) -> None:
    make = Builder(11)
    linear = LinearBlock(0, make.linear(HIDDEN, HIDDEN), None)
    experts = make.experts(HIDDEN, shared=9, shared_gate=True)
    graph = graph_of(make, linear, replace(experts, norm=None))
    native = executor(graph, make.weights, threads=2)
    tokens = tokens_of(50)
    plain = states(native, tokens)

    def break_row(x: np.ndarray) -> None:
        x[41] = value

    native.set_site(0, break_row)
    with pytest.raises(NativeError, match="router logits of block 1 are NaN or infinite"):
        states(native, tokens)
    native.set_site(0, None)
    assert bits(states(native, tokens)[1]) == bits(plain[1])


def test_rows_that_nobody_wants_visit_no_expert() -> None:
    """After the last keys and values: the state of one row would overflow the router's logits."""
    graph, weights = llama(layers=1)
    make = Builder(1, weights)
    experts = make.experts(graph.hidden_size)
    blocks = (graph.blocks[0], replace(experts, norm=None))
    native = executor(replace(graph, blocks=blocks), weights)
    step = step_of(native.graph, [(sequence_of(20), 0, 20)])
    huge = np.full((1, graph.hidden_size), 3e38, np.float32)
    step = replace(step, embeddings=(np.array([7], np.int32), huge))
    with pytest.raises(NativeError, match="router logits of block 1"):
        native.forward(step)
    rows = np.array([3, 19], np.int32)
    assert np.isfinite(native.forward(replace(step, wants=Wants(logits_rows=rows))).logits).all()


def test_a_site_edits_what_experts_and_linears_give() -> None:
    make = Builder(12)
    experts = make.experts(HIDDEN, residual_scale=0.5)
    graph = graph_of(make, experts, LinearBlock(1, make.linear(HIDDEN, HIDDEN), None))
    native = executor(graph, make.weights)
    tokens = tokens_of(20)
    embedded = make.weights[graph.embedding.weight.name][tokens]

    def set_to(value: float) -> Callable[[np.ndarray], None]:
        return lambda x: x.fill(value)

    for index in range(2):
        native.set_site(index, set_to(2.0))
    after_experts, after_linear = states(native, tokens)
    assert bits(after_experts) == bits(embedded + np.float32(1))
    assert bits(after_linear) == bits(embedded + np.float32(1) + np.float32(2))
