"""Gemma 2: norms before and after each block, soft caps, windows in every second layer."""

from dataclasses import replace

import numpy as np

from vivace.blocks import AttentionBlock, Block, MlpBlock, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._windows import layer_windows
from vivace.models.rope import MAX_POSITIONS, rope_spec

ARCHITECTURES = ("Gemma2ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = gemma(config, "gemma2"), Heads.of(config, head_dim=256)
    windows = layer_windows(config, gemma_window(config), lambda layer: layer % 2 == 0)
    soft_cap = _soft_cap(config, "attn_logit_softcapping", 50.0)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention, mlp = gemma_layer(model, layer, heads, windows[layer])
        blocks += replace(attention, soft_cap=soft_cap), mlp
    plain = model.graph(blocks, [rope_spec(config, heads.head_dim)], is_tied=True)
    soft_cap = _soft_cap(config, "final_logit_softcapping", 30.0)
    return replace(scaled_embedding(plain), head=replace(plain.head, soft_cap=soft_cap))


def gemma(config: Config, family: str) -> Decoder:
    """Gemma's norms, whose weights count from 1, and its activation's name and default."""
    named = ("hidden_activation", "gelu_pytorch_tanh")
    return Decoder.of(config, family, unit_offset=True, default_activation=named)


def gemma_window(config: Config) -> int:
    return config.integer("sliding_window", 4096, high=MAX_POSITIONS)


def gemma_layer(
    model: Decoder, layer: int, heads: Heads, window: int | None
) -> tuple[AttentionBlock, MlpBlock]:
    """Attention and MLP with a norm before and one after each, and the scale of the queries."""
    config, prefix = model.config, f"{model.layers}.{layer}"
    has_bias = config.boolean("attention_bias")
    attention = model.attention(layer, heads, window=window, qkv_bias=has_bias, out_bias=has_bias)
    attention = replace(
        attention,
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        post_norm=model.norm(f"{prefix}.post_attention_layernorm"),
    )
    mlp = replace(
        model.mlp(layer),
        norm=model.norm(f"{prefix}.pre_feedforward_layernorm"),
        post_norm=model.norm(f"{prefix}.post_feedforward_layernorm"),
    )
    return attention, mlp


def scaled_embedding(plain: ModelGraph) -> ModelGraph:
    """Embeddings times the root of their size, which is rounded to float32."""
    scale = float(np.float32(plain.hidden_size**0.5))
    return replace(plain, embedding=replace(plain.embedding, scale=scale))


def _soft_cap(config: Config, name: str, default: float) -> float | None:
    return None if config.is_null(name) else config.number(name, default)
