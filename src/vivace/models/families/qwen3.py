"""Qwen3: a head size of its own, norms on each head's query and key, optional biases, windows."""

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._windows import upper_windows
from vivace.models.rope import rope_spec

ARCHITECTURES = ("Qwen3ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "qwen3"), Heads.of(config, head_dim=128)
    windows, has_bias = upper_windows(config), config.boolean("attention_bias")
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention = model.attention(
            layer, heads, window=windows[layer], qkv_bias=has_bias, out_bias=has_bias
        )
        blocks.append(model.with_qk_norms(attention))
        blocks.append(model.mlp(layer))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
