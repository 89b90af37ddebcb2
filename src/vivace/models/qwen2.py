"""Qwen2 and Qwen2.5: Llama with biases on query, key and value, and windows in the upper layers."""

from vivace.blocks import ModelGraph
from vivace.models._llama_like import llama_like_graph, windows
from vivace.models.config import Config

ARCHITECTURES = ("Qwen2ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    return llama_like_graph(
        config,
        "qwen2",
        head_dim=config.integer("head_dim", None, high=4096),
        qkv_bias=True,
        layer_windows=windows(config),
    )
