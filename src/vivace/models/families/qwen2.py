"""Qwen2 and Qwen2.5: Llama with biases on query, key and value, and windows in the upper layers."""

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._windows import upper_windows
from vivace.models.rope import rope_spec

ARCHITECTURES = ("Qwen2ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "qwen2"), Heads.of(config)
    windows = upper_windows(config)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks.append(model.attention(layer, heads, window=windows[layer], qkv_bias=True))
        blocks.append(model.mlp(layer))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
