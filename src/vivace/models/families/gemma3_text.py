"""Gemma 3, text: Gemma 2 with head norms for soft caps, and a rope of its own for windows."""

from dataclasses import replace

from vivace.blocks import Block, ModelGraph, RopeSpec
from vivace.models.config import Config
from vivace.models.families._decoder import Heads
from vivace.models.families._windows import layer_windows
from vivace.models.families.gemma2 import gemma, gemma_layer, gemma_window, scaled_embedding
from vivace.models.rope import MAX_POSITIONS, rope_spec

ARCHITECTURES = ("Gemma3ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = gemma(config, "gemma3_text"), Heads.of(config, head_dim=256)
    # Every sixth layer reads all of the past, which older configs say by a number.
    pattern = config.integer("_sliding_window_pattern", 6)
    pattern = config.integer("sliding_window_pattern", pattern)
    windows = layer_windows(config, gemma_window(config), lambda layer: (layer + 1) % pattern != 0)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention, mlp = gemma_layer(model, layer, heads, windows[layer])
        attention = model.with_qk_norms(attention)
        blocks += replace(attention, rope=0 if windows[layer] is None else 1), mlp
    ropes = _ropes(config, heads.head_dim)
    # The declared context is the stretched one.
    context = config.integer("max_position_embeddings", 131_072, high=MAX_POSITIONS)
    return scaled_embedding(model.graph(blocks, ropes, is_tied=True, context=context))


def _ropes(config: Config, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Of the layers that read all of the past, and of those that read a window."""
    nested = config.section("rope_parameters") or Config({}, config.source)
    full = config.section("rope_scaling") or nested.section("full_attention")
    local = nested.section("sliding_attention")
    nothing = Config({}, f"{config.source}: rope_parameters")
    return (
        rope_spec(config, head_dim, 1e6, parameters=full or nothing),
        rope_spec(config, head_dim, base_field="rope_local_base_freq", parameters=local or nothing),
    )
