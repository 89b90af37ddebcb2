"""MiniCPM 1, 2 and 4, dense: Llama with scaled embeddings, residuals and logits.

Source: Hu et al. 2024, arXiv 2404.06395, appendix A (scales that keep a width's hyperparameters).
"""

import math
from dataclasses import replace

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.rope import rope_spec

ARCHITECTURES = ("MiniCPMForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "minicpm"), Heads.of(config)
    has_bias = config.boolean("attention_bias")
    residual_scale = config.number("scale_depth") / math.sqrt(model.num_layers)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention = model.attention(layer, heads, qkv_bias=has_bias, out_bias=has_bias)
        blocks.append(replace(attention, residual_scale=residual_scale))
        blocks.append(replace(model.mlp(layer), residual_scale=residual_scale))
    plain = model.graph(blocks, [rope_spec(config, heads.head_dim)], is_tied=True)
    return replace(
        plain,
        embedding=replace(plain.embedding, scale=config.number("scale_emb")),
        head=replace(plain.head, scale=config.number("dim_model_base") / model.hidden_size),
    )
