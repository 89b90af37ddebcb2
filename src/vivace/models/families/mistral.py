"""Mistral and Mistral Nemo: Llama with one window in all layers, or none."""

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._windows import sliding_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("MistralForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "mistral"), Heads.of(config)
    window = sliding_window(config, 4096)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks += model.attention(layer, heads, window=window), model.mlp(layer)
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
