"""GPT-2: layer norms, learned positions, fused projections stored as (in, out), a plain MLP."""

from dataclasses import replace

from vivace.blocks import (
    AttentionBlock,
    Block,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    WeightRef,
)
from vivace.models.config import Config
from vivace.models.families import _decoder
from vivace.models.families._decoder import Decoder, Heads, activation, fused_linear
from vivace.models.rope import MAX_POSITIONS

ARCHITECTURES = ("GPT2LMHeadModel",)
NAME_PREFIX = "transformer."


def graph(config: Config) -> ModelGraph:
    model = Decoder(
        config,
        "gpt2",
        hidden_size=config.integer("n_embd", high=_decoder.MAX_HIDDEN),
        num_layers=config.integer("n_layer", high=_decoder.MAX_LAYERS),
        vocab_size=config.integer("vocab_size", high=_decoder.MAX_WIDTH),
        activation=activation(config, "activation_function", "gelu_new"),
        eps=config.number("layer_norm_epsilon", 1e-5, high=1.0),
        norm_kind=NormKind.LAYER,
        layers="h",
        embedding="wte",
        final_norm="ln_f",
    )
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks += _attention(model, layer), _mlp(model, layer)
    context = config.integer("n_positions", high=MAX_POSITIONS)
    positions = WeightRef("wpe.weight", (context, model.hidden_size))
    plain = model.graph(blocks, [], is_tied=True, context=context)
    return replace(plain, embedding=replace(plain.embedding, positions=positions))


def _attention(model: Decoder, layer: int) -> AttentionBlock:
    config, prefix, hidden = model.config, f"{model.layers}.{layer}", model.hidden_size
    num_heads = config.integer("n_head", high=_decoder.MAX_HIDDEN)
    if hidden % num_heads:
        raise config.bad("n_head", f"a divisor of n_embd {hidden}")
    heads = Heads(num_heads, num_heads, hidden // num_heads)
    scale = heads.head_dim**-0.5 if config.boolean("scale_attn_weights", True) else 1.0
    if config.boolean("scale_attn_by_inverse_layer_idx"):
        scale /= layer + 1
    return replace(
        model.attention(layer, heads),
        qkv=_linear(f"{prefix}.attn.c_attn", hidden, (hidden, hidden, hidden)),
        out=_linear(f"{prefix}.attn.c_proj", hidden, (hidden,)),
        norm=model.norm(f"{prefix}.ln_1"),
        scale=scale,
        rope=None,
    )


def _mlp(model: Decoder, layer: int) -> MlpBlock:
    prefix, hidden = f"{model.layers}.{layer}", model.hidden_size
    inner_size = model.config.integer("n_inner", 4 * hidden, high=_decoder.MAX_WIDTH)
    up = _linear(f"{prefix}.mlp.c_fc", hidden, (inner_size,))
    down = _linear(f"{prefix}.mlp.c_proj", inner_size, (hidden,))
    return MlpBlock(layer, up, down, model.activation, model.norm(f"{prefix}.ln_2"))


def _linear(name: str, in_features: int, outs: tuple[int, ...]) -> LinearSpec:
    return fused_linear(name, in_features, outs, has_bias=True, is_transposed=True)
