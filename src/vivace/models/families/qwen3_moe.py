"""Qwen3-MoE: Qwen3 with routed experts, and one optional window in all layers."""

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._experts import experts_block, has_experts, normalised_routing
from vivace.models.families._windows import optional_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "qwen3_moe"), Heads.of(config)
    has_bias, window = config.boolean("attention_bias"), optional_window(config)
    routing, is_routed = normalised_routing(config), has_experts(config)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention = model.attention(
            layer, heads, window=window, qkv_bias=has_bias, out_bias=has_bias
        )
        blocks.append(model.with_qk_norms(attention))
        blocks.append(
            experts_block(model, layer, routing) if is_routed(layer) else model.mlp(layer)
        )
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
