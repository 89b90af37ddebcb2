"""Llama 2 and 3, and what is published in their layout: optional biases, every rope scaling."""

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.rope import rope_spec

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "llama"), Heads.of(config)
    has_bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks.append(model.attention(layer, heads, qkv_bias=has_bias, out_bias=has_bias))
        blocks.append(model.mlp(layer, has_bias=mlp_bias))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
