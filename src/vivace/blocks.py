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

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "Activation",
    "AttentionBlock",
    "Block",
    "EmbeddingSpec",
    "HeadSpec",
    "LayerGroup",
    "LinearSpec",
    "MlpBlock",
    "ModelGraph",
    "NormKind",
    "NormSpec",
    "RopeSpec",
    "Shard",
    "WeightRef",
]


class NormKind(StrEnum):
    RMS = "rms"  # x / sqrt(mean(x²) + eps) * weight
    LAYER = "layer"  # (x - mean) / sqrt(var + eps) * weight + bias


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"  # exact, by erf
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


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


Block = AttentionBlock | MlpBlock


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
    shard: Shard = Shard()

    @property
    def num_layers(self) -> int:
        return 1 + max((block.layer for block in self.blocks), default=-1)

    def linears(self) -> dict[str, WeightRef]:
        """Every matrix a weight format may store, by checkpoint name."""
        refs = {ref.name: ref for ref in self.head.linear.parts}
        for block in self.blocks:
            specs = (
                (block.qkv, block.out)
                if isinstance(block, AttentionBlock)
                else (block.gate_up, block.down)
            )
            refs |= {ref.name: ref for spec in specs for ref in spec.parts}
        return refs
