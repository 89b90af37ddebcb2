"""Llama 2 and 3, and what is published in their layout: optional biases, every rope scaling."""

from vivace.blocks import ModelGraph
from vivace.models._llama_like import llama_like_graph
from vivace.models.config import Config

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")


def graph(config: Config) -> ModelGraph:
    has_bias = config.boolean("attention_bias")
    return llama_like_graph(
        config,
        "llama",
        head_dim=config.integer("head_dim", None, high=4096),
        qkv_bias=has_bias,
        out_bias=has_bias,
        mlp_bias=config.boolean("mlp_bias"),
    )
