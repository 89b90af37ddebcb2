"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with routed experts and a shared one behind a gate."""

from dataclasses import replace

from vivace.blocks import Block, ExpertsBlock, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import MAX_WIDTH, Decoder, Heads, linear
from vivace.models.families._experts import experts_block, has_experts, normalised_routing
from vivace.models.families._windows import layer_windows, optional_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("Qwen2MoeForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "qwen2_moe"), Heads.of(config)
    qkv_bias, is_routed = config.boolean("qkv_bias", True), has_experts(config)
    windows = _windows(config)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks.append(model.attention(layer, heads, window=windows[layer], qkv_bias=qkv_bias))
        blocks.append(_experts(model, layer) if is_routed(layer) else model.mlp(layer))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])


def _experts(model: Decoder, layer: int) -> ExpertsBlock:
    prefix, hidden = f"{model.layers}.{layer}.mlp", model.hidden_size
    shared_size = model.config.integer("shared_expert_intermediate_size", high=MAX_WIDTH)
    return replace(
        experts_block(model, layer, normalised_routing(model.config)),
        shared=model.expert(f"{prefix}.shared_expert", shared_size),
        shared_gate=linear(prefix, hidden, {"shared_expert_gate": 1}),
    )


def _windows(config: Config) -> tuple[int | None, ...]:
    """Every second layer below `max_window_layers`, unlike Qwen2."""
    end = config.integer("max_window_layers", 28, low=0)
    return layer_windows(
        config, optional_window(config), lambda layer: layer < end and layer % 2 == 0
    )
