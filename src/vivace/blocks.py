"""A model is data: a frozen list of blocks over flat rows. Nothing here computes.

A model family (`vivace.models`) maps a checkpoint to a `ModelGraph`; the executors
(`vivace.executors`) run it. Shape words: `num_rows` flat rows of a step, `hidden_size`,
`num_heads` query heads, `num_kv_heads` key/value heads, `head_dim`.

A row's hidden state `h` (float32) passes through the blocks in order:

    h = embedding(token) * embedding.scale
    for block in blocks:   h = h + block.residual_scale * post_norm(core(norm(h)))
    logits = soft_cap(head(final_norm(h))) * head.scale
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

__all__ = [
    "Activation",
    "AttentionBlock",
    "Block",
    "EmbeddingSpec",
    "Expert",
    "ExpertsBlock",
    "HeadSpec",
    "LayerGroup",
    "LinearBlock",
    "LinearSpec",
    "MlpBlock",
    "ModelGraph",
    "NextTokenHead",
    "NormKind",
    "NormSpec",
    "Role",
    "RopeSpec",
    "Routing",
    "Shard",
    "WeightRef",
    "block_linears",
    "block_norms",
    "matrix_roles",
    "replace_refs",
    "weight_refs",
]


class NormKind(StrEnum):
    RMS = "rms"  # x / sqrt(mean(x²) + eps) * weight
    LAYER = "layer"  # (x - mean) / sqrt(var + eps) * weight + bias


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"  # exact, by erf
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Routing(StrEnum):
    """How a row's router logits become the experts it visits and their weights, in rank order.

    The largest logits win, the lower expert on ties.
    """

    SOFTMAX = "softmax"  # softmax over all experts; the chosen ones keep their share
    SOFTMAX_CHOSEN = "softmax_chosen"  # softmax over the chosen ones alone
    SPARSE_MIXER = "sparse_mixer"  # see `ExpertsBlock.jitter`


@dataclass(frozen=True, slots=True)
class WeightRef:
    """A unit of weights: one checkpoint tensor, or a range of its rows.

    `shape` is the shape after slicing and transposing: for a linear `(out, in)`.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int = 0  # rows [first_row, first_row + shape[0]) of the stored tensor
    is_transposed: bool = False  # stored as (in, out), as GPT-2 does


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm over the last axis; `unit_offset` means weight + 1 (Gemma)."""

    kind: NormKind
    weight: WeightRef
    eps: float
    bias: WeightRef | None = None
    unit_offset: bool = False


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A group of linears that read the same input: QKV, gate·up, or a single one.

    Part i maps `in_features` to `parts[i].shape[0]` outputs; outputs are concatenated in order.
    """

    in_features: int
    parts: tuple[WeightRef, ...]  # each (out, in_features)
    biases: tuple[WeightRef | None, ...]  # one per part
    adapter_id: int = 0  # 0: none

    @property
    def out_features(self) -> int:
        return sum(part.shape[0] for part in self.parts)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding as data.

    Pair j of a head is rotated at position p by the angle p * inv_freq[j]; the cosine and the sine
    are multiplied by `attention_factor`. `rotary_dim` is 2 * len(inv_freq) and may be smaller than
    `head_dim`. Where frequencies depend on the position (dynamic and long rope), `bands` lists
    `(first_position, inv_freq, attention_factor)` that replace the first ones from that position
    on; `dynamic` computes them per position: see `models.rope`.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    is_interleaved: bool = False  # pairs (2j, 2j+1) instead of (j, j + rotary_dim/2)
    bands: tuple[tuple[int, tuple[float, ...], float], ...] = ()
    dynamic: tuple[float, float, int] | None = None  # base, factor, original context
    base: float | None = None  # of the frequencies before any scaling, where there is one

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose caches share one block table: same heads, same sizes, same window."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None  # a query at p reads q > p - window; None: all of the past


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Attention of one layer, reading and writing cache layer `cache_layer` of `group`."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: LinearSpec  # parts: q [num_heads*head_dim, hidden], k, v [num_kv_heads*head_dim, hidden]
    out: LinearSpec
    norm: NormSpec | None
    scale: float  # multiplies q·k
    rope: int | None = 0  # index into ModelGraph.ropes
    q_norm: NormSpec | None = None  # weight [head_dim], or [num_heads*head_dim] over all heads
    k_norm: NormSpec | None = None
    post_norm: NormSpec | None = None
    soft_cap: float | None = None  # cap * tanh(score / cap)
    sinks: WeightRef | None = None  # one logit per query head that joins the softmax's sum
    group: int = 0  # index into ModelGraph.groups
    cache_layer: int = 0  # index of this layer inside its group
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class MlpBlock:
    """down(act(gate) * up) with parts (gate, up), or down(act(up)) with one part."""

    layer: int
    gate_up: LinearSpec
    down: LinearSpec
    activation: Activation
    norm: NormSpec | None
    post_norm: NormSpec | None = None
    residual_scale: float = 1.0

    @property
    def is_gated(self) -> bool:
        return len(self.gate_up.parts) == 2


@dataclass(frozen=True, slots=True)
class LinearBlock:
    """One matrix in the place of an attention or an MLP (Puzzle, P026)."""

    layer: int
    linear: LinearSpec  # one part (hidden, hidden)
    norm: NormSpec | None
    post_norm: NormSpec | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Expert:
    """An MLP that some rows visit; parts as in `MlpBlock`."""

    gate_up: LinearSpec
    down: LinearSpec

    @property
    def is_gated(self) -> bool:
        return len(self.gate_up.parts) == 2


@dataclass(frozen=True, slots=True)
class ExpertsBlock:
    """Routed MLPs: sum over a row's `num_active` experts, in rank order, of weight * expert(x).

    A shared expert is visited by every row and added last, times sigmoid(shared_gate(x)) where
    there is a gate. With `Routing.SPARSE_MIXER` (Liu et al. 2024, arXiv 2409.12136) the expert of
    rank r has the largest logit `top` among those not chosen yet; its weight is its share in a
    softmax over the logits `s` not chosen yet with (top - s) / max(|s|, top) <= 2 * jitter.
    """

    layer: int
    router: LinearSpec  # one part (num_experts, hidden)
    experts: tuple[Expert, ...]  # all of one shape
    num_active: int
    activation: Activation
    norm: NormSpec | None
    routing: Routing = Routing.SOFTMAX
    jitter: float = 0.0
    shared: Expert | None = None
    shared_gate: LinearSpec | None = None  # one part (1, hidden)
    post_norm: NormSpec | None = None
    residual_scale: float = 1.0


Block = AttentionBlock | MlpBlock | ExpertsBlock | LinearBlock


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    weight: WeightRef  # (vocab_size, hidden_size)
    scale: float = 1.0
    positions: WeightRef | None = None  # learned positions (GPT-2), (max_positions, hidden_size)


@dataclass(frozen=True, slots=True)
class HeadSpec:
    linear: LinearSpec  # may name the embedding's weight (tied)
    norm: NormSpec | None
    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class NextTokenHead:
    """An extra head that guesses one token further (MiMo, P227); executors leave it out.

    Its input is projection([hidden_norm(h), token_norm(embedding of the next token)]), its blocks
    and its norm follow, and the model's own head gives the logits.
    """

    hidden_norm: NormSpec
    token_norm: NormSpec
    projection: LinearSpec  # one part (hidden, 2 * hidden)
    blocks: tuple[Block, ...]  # cache layers of a group of their own
    norm: NormSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the model this process holds. Shapes in a graph are local to the rank."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A whole model. `blocks` order is execution order; every block can be skipped."""

    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int  # the context the checkpoint declares
    embedding: EmbeddingSpec
    blocks: tuple[Block, ...]
    head: HeadSpec
    groups: tuple[LayerGroup, ...]
    ropes: tuple[RopeSpec, ...] = ()
    next_token_heads: tuple[NextTokenHead, ...] = ()
    shard: Shard = Shard()

    @property
    def num_layers(self) -> int:
        return 1 + max((block.layer for block in self.blocks), default=-1)

    def linears(self) -> tuple[WeightRef, ...]:
        """Every matrix a weight format may store, once each."""
        specs = [
            self.head.linear,
            *(spec for block in self.blocks for spec in block_linears(block)),
        ]
        return tuple(dict.fromkeys(ref for spec in specs for ref in spec.parts))


class Role(StrEnum):
    """What a matrix is for; formats may differ by it. A tied embedding has the head's."""

    BODY = "body"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"


def matrix_roles(graph: ModelGraph) -> dict[WeightRef, Role]:
    """Every matrix that a format stores, once each, the embedding's last."""
    roles = dict.fromkeys(graph.linears(), Role.BODY)
    for block in graph.blocks:
        if isinstance(block, ExpertsBlock):
            specs = (block.router, *(() if block.shared_gate is None else (block.shared_gate,)))
            roles |= {ref: Role.ROUTER for spec in specs for ref in spec.parts}
    roles |= dict.fromkeys(graph.head.linear.parts, Role.HEAD)
    for ref in (graph.embedding.weight, graph.embedding.positions):
        if ref is not None:
            roles.setdefault(ref, Role.EMBEDDING)
    return roles


def block_linears(block: Block) -> tuple[LinearSpec, ...]:
    """A block's linears, in the order in which they run; experts in their own order."""
    match block:
        case AttentionBlock():
            return block.qkv, block.out
        case MlpBlock():
            return block.gate_up, block.down
        case LinearBlock():
            return (block.linear,)
        case ExpertsBlock():
            experts = (*block.experts, *(() if block.shared is None else (block.shared,)))
            inner = tuple(spec for expert in experts for spec in (expert.gate_up, expert.down))
            gate = () if block.shared_gate is None else (block.shared_gate,)
            return (block.router, *gate, *inner)


def block_norms(block: Block) -> tuple[NormSpec, ...]:
    """A block's norms."""
    norms = [block.norm, block.post_norm]
    if isinstance(block, AttentionBlock):
        norms += [block.q_norm, block.k_norm]
    return tuple(norm for norm in norms if norm is not None)


def weight_refs(spec: Any) -> Iterator[WeightRef]:
    """Every tensor that a graph or a part of it uses, in the order of fields; tied ones twice."""
    if isinstance(spec, WeightRef):
        yield spec
    elif isinstance(spec, tuple):
        for item in spec:
            yield from weight_refs(item)
    elif is_dataclass(spec):
        for field in fields(spec):
            yield from weight_refs(getattr(spec, field.name))


def replace_refs(spec: Any, new: Callable[[WeightRef], WeightRef]) -> Any:
    """A graph or a part of it with `new(ref)` in the place of every reference."""
    if isinstance(spec, WeightRef):
        return new(spec)
    if isinstance(spec, tuple):
        return tuple(replace_refs(item, new) for item in spec)
    if is_dataclass(spec) and not isinstance(spec, type):
        changed = {f.name: replace_refs(getattr(spec, f.name), new) for f in fields(spec)}
        return replace(spec, **changed)
    return spec
