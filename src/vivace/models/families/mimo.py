"""MiMo: Qwen2 with heads that guess further tokens (P227), which plain decoding leaves out."""

from dataclasses import replace

from vivace.blocks import ModelGraph, NextTokenHead
from vivace.models.config import Config
from vivace.models.families import qwen2
from vivace.models.families._decoder import Decoder, Heads, linear

ARCHITECTURES = ("MiMoForCausalLM",)


def graph(config: Config) -> ModelGraph:
    num_heads = config.integer("num_nextn_predict_layers", 0, low=0, high=64)
    heads = tuple(_next_token_head(config, index) for index in range(num_heads))
    return replace(qwen2.graph(config), family="mimo", next_token_heads=heads)


def _next_token_head(config: Config, index: int) -> NextTokenHead:
    """Blocks as in the model, in a group of their own."""
    model = replace(Decoder.of(config, "mimo"), layers="model.mtp_layers")
    prefix, hidden = f"{model.layers}.{index}", model.hidden_size
    return NextTokenHead(
        hidden_norm=model.norm(f"{prefix}.hidden_layernorm"),
        token_norm=model.norm(f"{prefix}.token_layernorm"),
        projection=linear(prefix, 2 * hidden, {"input_proj": hidden}),
        blocks=(model.attention(index, Heads.of(config), qkv_bias=True), model.mlp(index)),
        norm=model.norm(f"{prefix}.final_layernorm"),
    )
