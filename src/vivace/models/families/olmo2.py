"""OLMo 2: norms only after attention and MLP, and over all heads of queries and of keys."""

from dataclasses import replace

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.rope import rope_spec

ARCHITECTURES = ("Olmo2ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "olmo2", eps=1e-5), Heads.of(config)
    has_bias = config.boolean("attention_bias")
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        prefix = f"{model.layers}.{layer}"
        attention = model.attention(layer, heads, qkv_bias=has_bias, out_bias=has_bias)
        attention = model.with_qk_norms(attention, over_all_heads=True)
        after = model.norm(f"{prefix}.post_attention_layernorm")
        blocks.append(replace(attention, norm=None, post_norm=after))
        after = model.norm(f"{prefix}.post_feedforward_layernorm")
        blocks.append(replace(model.mlp(layer), norm=None, post_norm=after))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
