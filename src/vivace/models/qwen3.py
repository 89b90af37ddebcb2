"""Qwen3: a head size of its own, norms on each head's query and key, optional biases, windows."""

from vivace.blocks import ModelGraph
from vivace.models._llama_like import llama_like_graph, windows
from vivace.models.config import Config

ARCHITECTURES = ("Qwen3ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    has_bias = config.boolean("attention_bias")
    return llama_like_graph(
        config,
        "qwen3",
        head_dim=config.integer("head_dim", 128, high=4096),
        qkv_bias=has_bias,
        out_bias=has_bias,
        head_norms=True,
        layer_windows=windows(config),
    )
