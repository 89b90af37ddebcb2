"""OLMoE: Llama with norms over all heads of queries and of keys, and routed experts."""

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._experts import experts_block, normalised_routing
from vivace.models.rope import rope_spec

ARCHITECTURES = ("OlmoeForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "olmoe", eps=1e-5), Heads.of(config)
    has_bias, routing = config.boolean("attention_bias"), normalised_routing(config)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention = model.attention(layer, heads, qkv_bias=has_bias, out_bias=has_bias)
        blocks.append(model.with_qk_norms(attention, over_all_heads=True))
        blocks.append(experts_block(model, layer, routing, size_field="intermediate_size"))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
