"""Phi-3, Phi-3.5 mini and Phi-4: Llama with fused projections, partial and long ropes, a window."""

from dataclasses import replace

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import MAX_WIDTH, Decoder, Heads, fused_linear
from vivace.models.families._windows import sliding_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("Phi3ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "phi3", eps=1e-5), Heads.of(config)
    window = sliding_window(config)
    inner_size = config.integer("intermediate_size", high=MAX_WIDTH)
    qkv_sizes = (heads.q_size, heads.kv_size, heads.kv_size)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        prefix, hidden = f"{model.layers}.{layer}", model.hidden_size
        qkv = fused_linear(f"{prefix}.self_attn.qkv_proj", hidden, qkv_sizes)
        gate_up = fused_linear(f"{prefix}.mlp.gate_up_proj", hidden, (inner_size, inner_size))
        blocks.append(replace(model.attention(layer, heads, window=window), qkv=qkv))
        blocks.append(replace(model.mlp(layer), gate_up=gate_up))
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])
