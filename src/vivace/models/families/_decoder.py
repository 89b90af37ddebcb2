"""What families share: the blocks of a Llama under the hub's names, for a family to vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vivace.blocks import (
    Activation,
    AttentionBlock,
    Block,
    EmbeddingSpec,
    Expert,
    HeadSpec,
    LayerGroup,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    NormSpec,
    RopeSpec,
    WeightRef,
)
from vivace.errors import UnsupportedModel, nearest
from vivace.models.config import Config
from vivace.models.rope import max_positions

__all__ = [
    "MAX_HIDDEN",
    "MAX_LAYERS",
    "MAX_WIDTH",
    "Decoder",
    "Heads",
    "activation",
    "fused_linear",
    "linear",
]

MAX_WIDTH = 2**24  # of anything that is a tensor's size
MAX_HIDDEN = 2**20
MAX_LAYERS = 4096
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts and sizes of an attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Config, head_dim: int | None = None) -> Heads:
        """As the config says; a `head_dim` that it does not give is this one, or hidden / heads.

        Raises `BadFile` where counts and sizes do not divide.
        """
        num_heads = config.integer("num_attention_heads", high=MAX_HIDDEN)
        num_kv_heads = config.integer("num_key_value_heads", num_heads, high=MAX_HIDDEN)
        if num_heads % num_kv_heads:
            raise config.bad("num_key_value_heads", f"a divisor of the {num_heads} heads")
        head_dim = config.integer("head_dim", head_dim, high=4096)
        hidden_size = config.integer("hidden_size", high=MAX_HIDDEN)
        if head_dim is None and hidden_size % num_heads:
            raise config.bad(
                "num_attention_heads",
                f"a divisor of hidden_size {hidden_size}, or head_dim beside it",
            )
        return cls(num_heads, num_kv_heads, head_dim or hidden_size // num_heads)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass
class Decoder:
    """Makes a model's norms and blocks, and its graph of them; knows the groups made so far.

    What a method makes is Llama's; a family replaces what differs (`dataclasses.replace`).
    """

    config: Config
    family: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    activation: Activation
    eps: float
    norm_kind: NormKind = NormKind.RMS
    unit_offset: bool = False
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    _group_sizes: dict[LayerGroup, int] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        config: Config,
        family: str,
        *,
        eps: float = 1e-6,
        norm_kind: NormKind = NormKind.RMS,
        unit_offset: bool = False,
        default_activation: tuple[str, str] = ("hidden_act", "silu"),
    ) -> Decoder:
        """Sizes from the usual fields; `default_activation` is a field and its default value."""
        return cls(
            config,
            family,
            hidden_size=config.integer("hidden_size", high=MAX_HIDDEN),
            num_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
            vocab_size=config.integer("vocab_size", high=MAX_WIDTH),
            activation=activation(config, *default_activation),
            eps=config.number("rms_norm_eps", eps, high=1.0),
            norm_kind=norm_kind,
            unit_offset=unit_offset,
        )

    def norm(self, name: str, size: int | None = None) -> NormSpec:
        """A norm of `size` values, of the hidden state by default."""
        weight = WeightRef(f"{name}.weight", (size or self.hidden_size,))
        bias = WeightRef(f"{name}.bias", weight.shape)
        is_layer = self.norm_kind is NormKind.LAYER
        return NormSpec(
            self.norm_kind, weight, self.eps, bias if is_layer else None, self.unit_offset
        )

    def attention(
        self,
        layer: int,
        heads: Heads,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> AttentionBlock:
        """`self_attn` behind `input_layernorm`, in the layer group of its window and sizes."""
        prefix = f"{self.layers}.{layer}"
        attention = f"{prefix}.self_attn"
        group, cache_layer = self.place(heads, window)
        outs = {"q_proj": heads.q_size, "k_proj": heads.kv_size, "v_proj": heads.kv_size}
        return AttentionBlock(
            layer=layer,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            qkv=linear(attention, self.hidden_size, outs, qkv_bias),
            out=linear(attention, heads.q_size, {"o_proj": self.hidden_size}, out_bias),
            norm=self.norm(f"{prefix}.input_layernorm"),
            scale=heads.head_dim**-0.5,
            group=group,
            cache_layer=cache_layer,
        )

    def with_qk_norms(
        self, attention: AttentionBlock, *, over_all_heads: bool = False
    ) -> AttentionBlock:
        """The same with norms on its queries and keys, of each head or over all of them."""
        prefix = f"{self.layers}.{attention.layer}.self_attn"
        q_heads, k_heads = attention.num_heads, attention.num_kv_heads
        q_heads, k_heads = (q_heads, k_heads) if over_all_heads else (1, 1)
        return replace(
            attention,
            q_norm=self.norm(f"{prefix}.q_norm", q_heads * attention.head_dim),
            k_norm=self.norm(f"{prefix}.k_norm", k_heads * attention.head_dim),
        )

    def place(self, heads: Heads, window: int | None = None) -> tuple[int, int]:
        """The group of one more layer, and the layer's index inside it."""
        group = LayerGroup(0, heads.num_kv_heads, heads.head_dim, window)
        cache_layer = self._group_sizes.setdefault(group, 0)
        self._group_sizes[group] += 1
        return list(self._group_sizes).index(group), cache_layer

    def mlp(self, layer: int, inner_size: int | None = None, *, has_bias: bool = False) -> MlpBlock:
        """`mlp` behind `post_attention_layernorm`; its size is `intermediate_size` by default."""
        prefix = f"{self.layers}.{layer}"
        if inner_size is None:
            size = self.config.integer("intermediate_size", high=MAX_WIDTH)
        else:
            size = inner_size
        expert = self.expert(f"{prefix}.mlp", size, has_bias=has_bias)
        norm = self.norm(f"{prefix}.post_attention_layernorm")
        return MlpBlock(layer, expert.gate_up, expert.down, self.activation, norm)

    def expert(
        self,
        prefix: str,
        inner_size: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        *,
        has_bias: bool = False,
    ) -> Expert:
        """A gated MLP without its norm."""
        gate, up, down = names
        outs = {gate: inner_size, up: inner_size}
        return Expert(
            linear(prefix, self.hidden_size, outs, has_bias),
            linear(prefix, inner_size, {down: self.hidden_size}, has_bias),
        )

    def graph(
        self,
        blocks: Sequence[Block],
        ropes: Sequence[RopeSpec],
        *,
        is_tied: bool = False,
        context: int | None = None,
    ) -> ModelGraph:
        """The whole model.

        Args:
            blocks: all blocks, made by this object's methods.
            ropes: what the blocks' `rope` counts.
            is_tied: what holds where the config does not say `tie_word_embeddings`.
            context: positions; None: as the config and its rope scaling say.
        """
        embedding = WeightRef(f"{self.embedding}.weight", (self.vocab_size, self.hidden_size))
        is_tied = self.config.boolean("tie_word_embeddings", is_tied)
        head = embedding if is_tied else WeightRef("lm_head.weight", embedding.shape)
        head_linear = LinearSpec(self.hidden_size, (head,), (None,))
        return ModelGraph(
            family=self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_positions=max_positions(self.config) if context is None else context,
            embedding=EmbeddingSpec(embedding),
            blocks=tuple(blocks),
            head=HeadSpec(head_linear, self.norm(self.final_norm)),
            groups=self.groups,
            ropes=tuple(ropes),
        )

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups of all attentions made so far."""
        return tuple(
            LayerGroup(num_layers, group.num_kv_heads, group.head_dim, group.window)
            for group, num_layers in self._group_sizes.items()
        )


# ---------------------------------------------------------------- parts


def linear(
    prefix: str, in_features: int, outs: Mapping[str, int], has_bias: bool = False
) -> LinearSpec:
    """A tensor `prefix.name.weight` per part, and its bias; `outs` are the parts' outputs."""
    parts = tuple(WeightRef(f"{prefix}.{n}.weight", (out, in_features)) for n, out in outs.items())
    biases = tuple(WeightRef(f"{prefix}.{n}.bias", (out,)) for n, out in outs.items())
    return LinearSpec(in_features, parts, biases if has_bias else (None,) * len(parts))


def fused_linear(
    name: str,
    in_features: int,
    outs: Sequence[int],
    *,
    has_bias: bool = False,
    is_transposed: bool = False,
) -> LinearSpec:
    """Parts that are ranges of outputs of one tensor `name.weight`."""
    firsts = [sum(outs[:index]) for index in range(len(outs))]
    parts = tuple(
        WeightRef(f"{name}.weight", (out, in_features), first, is_transposed)
        for out, first in zip(outs, firsts, strict=True)
    )
    biases = tuple(
        WeightRef(f"{name}.bias", (out,), first) for out, first in zip(outs, firsts, strict=True)
    )
    return LinearSpec(in_features, parts, biases if has_bias else (None,) * len(parts))


def activation(config: Config, field_name: str, default: str) -> Activation:
    """Raises `UnsupportedModel` for one that is not known."""
    name = config.text(field_name, default)
    if name not in _ACTIVATIONS:
        known = nearest(name, _ACTIVATIONS)
        raise UnsupportedModel(f"{config.source}: {field_name} '{name}' is not supported: {known}")
    return _ACTIVATIONS[name]
