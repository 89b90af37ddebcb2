"""What Llama's relatives share: a graph from a config and a few switches."""

from __future__ import annotations

from vivace.blocks import (
    Activation,
    AttentionBlock,
    Block,
    EmbeddingSpec,
    HeadSpec,
    LayerGroup,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    NormSpec,
    WeightRef,
)
from vivace.errors import UnsupportedModel, nearest
from vivace.models.config import Config
from vivace.models.rope import MAX_POSITIONS, max_positions, rope_spec

__all__ = ["llama_like_graph", "windows"]

_MAX_LAYERS = 4096
_MAX_WIDTH = 2**20
_MAX_VOCABULARY = 2**24
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


def windows(config: Config) -> tuple[int | None, ...]:
    """Each layer's window in tokens, as Qwen spells it: None reads all of the past."""
    num_layers = config.integer("num_hidden_layers", high=_MAX_LAYERS)
    window = None
    if config.boolean("use_sliding_window"):
        window = config.integer("sliding_window", 4096, high=MAX_POSITIONS)
    first_windowed = config.integer("max_window_layers", 28, low=0)
    kinds = config.values.get("layer_types")
    if kinds is None:
        return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    is_list = isinstance(kinds, list) and len(kinds) == num_layers
    if not is_list or any(kind not in known for kind in kinds):
        raise config.bad("layer_types", f"{num_layers} strings, each {known[0]} or {known[1]}")
    if window is None and "sliding_attention" in kinds:
        raise config.bad("use_sliding_window", "true where layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def llama_like_graph(
    config: Config,
    family: str,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
    layer_windows: tuple[int | None, ...] | None = None,
) -> ModelGraph:
    """Embedding, per layer attention and a gated MLP behind RMS norms, then the head.

    `head_dim=None` divides the hidden size among the heads; `head_norms` normalises each head's
    query and key; `layer_windows` has one entry per layer, by default no windows.

    Raises `BadFile` for a wrong value and `UnsupportedModel` for an unknown activation.
    """
    hidden = config.integer("hidden_size", high=_MAX_WIDTH)
    num_layers = config.integer("num_hidden_layers", high=_MAX_LAYERS)
    given_windows = layer_windows or (None,) * num_layers
    names = _Names(config, hidden)
    sizes = _HeadSizes(config, hidden, head_dim)
    groups, places = _layer_groups(given_windows, sizes)
    activation = _activation(config)
    mlp = config.integer("intermediate_size", high=_MAX_WIDTH * 16)

    blocks: list[Block] = []
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        group, cache_layer = places[layer]
        outs = {"q_proj": sizes.q_size, "k_proj": sizes.kv_size, "v_proj": sizes.kv_size}
        blocks.append(
            AttentionBlock(
                layer=layer,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                qkv=_linear(attention, hidden, outs, qkv_bias),
                out=_linear(attention, sizes.q_size, {"o_proj": hidden}, out_bias),
                norm=names.norm(f"{prefix}.input_layernorm"),
                scale=sizes.head_dim**-0.5,
                q_norm=names.norm(f"{attention}.q_norm", sizes.head_dim) if head_norms else None,
                k_norm=names.norm(f"{attention}.k_norm", sizes.head_dim) if head_norms else None,
                group=group,
                cache_layer=cache_layer,
            )
        )
        blocks.append(
            MlpBlock(
                layer=layer,
                gate_up=_linear(
                    f"{prefix}.mlp", hidden, {"gate_proj": mlp, "up_proj": mlp}, mlp_bias
                ),
                down=_linear(f"{prefix}.mlp", mlp, {"down_proj": hidden}, mlp_bias),
                activation=activation,
                norm=names.norm(f"{prefix}.post_attention_layernorm"),
            )
        )
    embedding = WeightRef("model.embed_tokens.weight", (names.vocab_size, hidden))
    is_tied = config.boolean("tie_word_embeddings")
    head = embedding if is_tied else WeightRef("lm_head.weight", embedding.shape)
    return ModelGraph(
        family=family,
        vocab_size=names.vocab_size,
        hidden_size=hidden,
        max_positions=max_positions(config),
        embedding=EmbeddingSpec(embedding),
        blocks=tuple(blocks),
        head=HeadSpec(LinearSpec(hidden, (head,), (None,)), names.norm("model.norm")),
        groups=groups,
        ropes=(rope_spec(config, sizes.head_dim),),
    )


class _Names:
    """Norms and the vocabulary of one config."""

    def __init__(self, config: Config, hidden: int) -> None:
        self.hidden = hidden
        self.vocab_size = config.integer("vocab_size", high=_MAX_VOCABULARY)
        self.eps = config.number("rms_norm_eps", 1e-6, high=1.0)

    def norm(self, name: str, size: int | None = None) -> NormSpec:
        return NormSpec(NormKind.RMS, WeightRef(f"{name}.weight", (size or self.hidden,)), self.eps)


class _HeadSizes:
    """Head counts and sizes, checked against one another."""

    def __init__(self, config: Config, hidden: int, head_dim: int | None) -> None:
        self.num_heads = config.integer("num_attention_heads", high=_MAX_WIDTH)
        self.num_kv_heads = config.integer("num_key_value_heads", self.num_heads, high=_MAX_WIDTH)
        if self.num_heads % self.num_kv_heads:
            raise config.bad("num_key_value_heads", f"a divisor of the {self.num_heads} heads")
        if head_dim is None and hidden % self.num_heads:
            raise config.bad(
                "num_attention_heads", f"a divisor of hidden_size {hidden}, or head_dim beside it"
            )
        self.head_dim = head_dim or hidden // self.num_heads
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim


def _layer_groups(
    layer_windows: tuple[int | None, ...], sizes: _HeadSizes
) -> tuple[tuple[LayerGroup, ...], list[tuple[int, int]]]:
    """One group per window, and each layer's (group, index inside it)."""
    distinct = list(dict.fromkeys(layer_windows))
    counts = [0] * len(distinct)
    places = []
    for window in layer_windows:
        group = distinct.index(window)
        places.append((group, counts[group]))
        counts[group] += 1
    groups = tuple(
        LayerGroup(count, sizes.num_kv_heads, sizes.head_dim, window)
        for window, count in zip(distinct, counts, strict=True)
    )
    return groups, places


def _linear(prefix: str, in_features: int, outs: dict[str, int], has_bias: bool) -> LinearSpec:
    parts = tuple(
        WeightRef(f"{prefix}.{name}.weight", (out, in_features)) for name, out in outs.items()
    )
    biases = tuple(
        WeightRef(f"{prefix}.{name}.bias", (out,)) if has_bias else None
        for name, out in outs.items()
    )
    return LinearSpec(in_features, parts, biases)


def _activation(config: Config) -> Activation:
    name = config.text("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{config.source}: hidden_act '{name}' is not supported: {nearest(name, _ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]
