"""Random small graphs, and sequences that live in scattered cache blocks of the native executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from vivace.blocks import (
    Activation,
    AttentionBlock,
    EmbeddingSpec,
    Expert,
    ExpertsBlock,
    HeadSpec,
    LayerGroup,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    NormSpec,
    RopeSpec,
    Routing,
    WeightRef,
)
from vivace.executors.native import NativeExecutor
from vivace.models.formats.block_tensor import BlockTensor
from vivace.plan import Plan, resolve
from vivace.types import GroupRows, Mask, Segment, Span, Step, Wants

__all__ = [
    "Builder",
    "CachedSequence",
    "bits",
    "executor",
    "llama",
    "mixture",
    "run",
    "sequence_of",
    "step_of",
    "tokens_of",
]


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def tokens_of(count: int, vocab: int = 97, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


@dataclass
class Builder:
    """Names tensors and draws them, wide enough that a wrong field shows."""

    seed: int = 0
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def tensor(self, *shape: int, spread: float = 1.0, center: float = 0.0) -> WeightRef:
        name = f"t{len(self.weights)}"
        random = np.random.default_rng([self.seed, len(self.weights)])
        self.weights[name] = (center + spread * random.standard_normal(shape)).astype(np.float32)
        return WeightRef(name, shape)

    def linear(self, in_features: int, *rows: int, bias: bool = False) -> LinearSpec:
        parts = tuple(self.tensor(n, in_features, spread=in_features**-0.5) for n in rows)
        biases = tuple(self.tensor(n, spread=0.3) if bias else None for n in rows)
        return LinearSpec(in_features, parts, biases)

    def norm(self, size: int, kind: NormKind = NormKind.RMS, **options) -> NormSpec:
        bias = self.tensor(size, spread=0.3) if kind is NormKind.LAYER else None
        return NormSpec(kind, self.tensor(size, spread=0.2, center=1.0), 1e-5, bias, **options)

    def expert(self, hidden: int, inner: int, *, gated: bool, bias: bool = False) -> Expert:
        rows = (inner, inner) if gated else (inner,)
        return Expert(self.linear(hidden, *rows, bias=bias), self.linear(inner, hidden, bias=bias))

    def experts(
        self,
        hidden: int = 48,
        *,
        num_experts: int = 7,
        num_active: int = 3,
        inner: int = 20,
        gated: bool = True,
        bias: bool = False,
        shared: int = 0,
        shared_gate: bool = False,
        layer: int = 0,
        activation: Activation = Activation.SILU,
        **options,
    ) -> ExpertsBlock:
        """Routed MLPs, with one of inner size `shared` that all rows visit unless that is 0."""
        return ExpertsBlock(
            layer=layer,
            router=self.linear(hidden, num_experts, bias=bias),
            experts=tuple(
                self.expert(hidden, inner, gated=gated, bias=bias) for _ in range(num_experts)
            ),
            num_active=num_active,
            activation=activation,
            norm=self.norm(hidden),
            shared=self.expert(hidden, shared, gated=gated, bias=bias) if shared else None,
            shared_gate=self.linear(hidden, 1, bias=bias) if shared_gate else None,
            **options,
        )


def llama(
    *,
    hidden: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    inner: int = 80,
    vocab: int = 97,
    layers: int = 2,
    seed: int = 0,
    window: int | None = None,
) -> tuple[ModelGraph, dict[str, np.ndarray]]:
    """A Llama of odd sizes with a head tied to the embedding."""
    make = Builder(seed)
    embedding = make.tensor(vocab, hidden)
    blocks = []
    for layer in range(layers):
        q, kv = heads * head_dim, kv_heads * head_dim
        blocks += [
            AttentionBlock(
                layer=layer,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                qkv=make.linear(hidden, q, kv, kv),
                out=make.linear(q, hidden),
                norm=make.norm(hidden),
                scale=head_dim**-0.5,
                cache_layer=layer,
            ),
            MlpBlock(
                layer=layer,
                gate_up=make.linear(hidden, inner, inner),
                down=make.linear(inner, hidden),
                activation=Activation.SILU,
                norm=make.norm(hidden),
            ),
        ]
    inv_freq = tuple(10000.0 ** (-2 * j / head_dim) for j in range(head_dim // 2))
    graph = ModelGraph(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=4096,
        embedding=EmbeddingSpec(embedding),
        blocks=tuple(blocks),
        head=HeadSpec(LinearSpec(hidden, (embedding,), (None,)), make.norm(hidden)),
        groups=(LayerGroup(layers, kv_heads, head_dim, window),),
        ropes=(RopeSpec(inv_freq),),
    )
    return graph, make.weights


def mixture(hidden: int = 48, **options) -> tuple[ModelGraph, dict[str, np.ndarray]]:
    """A `llama` whose MLPs are experts of all routings, or a single linear."""
    graph, weights = llama(hidden=hidden, layers=4, **options)
    make = Builder(1, weights)
    others = (
        make.experts(hidden, num_experts=9, num_active=8, shared=33, shared_gate=True, layer=0),
        make.experts(hidden, routing=Routing.SPARSE_MIXER, jitter=0.3, bias=True, layer=1),
        LinearBlock(2, make.linear(hidden, hidden), make.norm(hidden), make.norm(hidden), 0.5),
        make.experts(hidden, routing=Routing.SOFTMAX_CHOSEN, gated=False, shared=7, layer=3),
    )
    blocks = (block for pair in zip(graph.blocks[::2], others, strict=True) for block in pair)
    return replace(graph, blocks=tuple(blocks)), weights


def executor(
    graph: ModelGraph,
    weights: Mapping[str, np.ndarray | BlockTensor],
    *,
    weight_format: str = "float32",
    kv_store: str = "float32",
    blocks: int = 64,
    block_size: int = 16,
    **options,
) -> NativeExecutor:
    """A native executor whose cache is NaN wherever nothing was written."""
    plan = resolve(Plan.of(weight_formats=weight_format, kv_stores=kv_store))
    made = NativeExecutor(
        graph, weights, plan.one("weight_formats"), plan.one("kv_stores"), **options
    )
    made.allocate([blocks] * len(graph.groups), block_size)
    made.fill_cache(255)
    return made


@dataclass
class CachedSequence:
    """Tokens, and the blocks they lie in: one table for all layer groups."""

    tokens: np.ndarray
    block_ids: np.ndarray
    block_size: int = 16

    @staticmethod
    def of(tokens: ArrayLike, block_ids: ArrayLike, block_size: int = 16) -> CachedSequence:
        return CachedSequence(
            np.asarray(tokens, np.int32), np.asarray(block_ids, np.int32), block_size
        )

    def slots(self, first: int, last: int) -> np.ndarray:
        entries = np.arange(first, last)
        return self.block_ids[entries // self.block_size].astype(np.int64) * self.block_size + (
            entries % self.block_size
        )


def sequence_of(
    count: int, *, block_size: int = 16, seed: int = 1, blocks: int = 64
) -> CachedSequence:
    ids = np.random.default_rng(seed).permutation(blocks)[: -(-count // block_size)]
    return CachedSequence.of(tokens_of(count, seed=seed), ids, block_size)


def step_of(
    graph: ModelGraph,
    parts: Sequence[tuple[CachedSequence, int, int]],
    *,
    masks: Sequence[Mask] | None = None,
    wants: Wants | None = None,
) -> Step:
    """A step over rows [first, last) of some sequences; all rows' logits unless told otherwise."""
    spans, row = [], 0
    num_rows = sum(last - first for _, first, last in parts)
    groups = []
    for index, group in enumerate(graph.groups):
        mask = masks[index] if masks else Mask(window=group.window or 0)
        spans, row = [], 0
        for sequence, first, last in parts:
            count = -(-last // sequence.block_size)
            segment = Segment(sequence.block_ids[:count], last, mask=mask)
            spans.append(Span(row, last - first, (segment,)))
            row += last - first
        slots = np.concatenate([s.slots(first, last) for s, first, last in parts])
        groups.append(GroupRows(slots, tuple(spans)))
    return Step(
        np.concatenate([s.tokens[first:last] for s, first, last in parts]),
        np.concatenate([np.arange(first, last, dtype=np.int32) for _, first, last in parts]),
        tuple(groups),
        wants or Wants(logits_rows=np.arange(num_rows, dtype=np.int32)),
    )


def run(native: NativeExecutor, sequence: CachedSequence, chunk: int, **options) -> np.ndarray:
    """Logits [n, V] of a sequence that is run in chunks."""
    total = len(sequence.tokens)
    outputs = [
        native.forward(
            step_of(native.graph, [(sequence, at, min(at + chunk, total))], **options)
        ).logits
        for at in range(0, total, chunk)
    ]
    return np.concatenate(outputs)
