"""Phi-3.5-MoE: Mixtral with layer norms, biases, long ropes, and a router that mixes sparsely."""

from dataclasses import replace

from vivace.blocks import Block, ExpertsBlock, ModelGraph, NormKind, Routing, WeightRef
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._experts import MIXTRAL_NAMES, experts_block
from vivace.models.families._windows import sliding_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("PhiMoEForCausalLM", "PhimoeForCausalLM")


def graph(config: Config) -> ModelGraph:
    model = Decoder.of(config, "phimoe", eps=1e-5, norm_kind=NormKind.LAYER)
    heads, window = Heads.of(config), sliding_window(config)
    has_bias = config.boolean("attention_bias")
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks.append(
            model.attention(layer, heads, window=window, qkv_bias=has_bias, out_bias=has_bias)
        )
        blocks.append(_experts(model, layer))
    plain = model.graph(blocks, [rope_spec(config, heads.head_dim, 1e6)])
    if not config.boolean("lm_head_bias"):
        return plain
    bias = WeightRef("lm_head.bias", (model.vocab_size,))
    head = replace(plain.head.linear, biases=(bias,))
    return replace(plain, head=replace(plain.head, linear=head))


def _experts(model: Decoder, layer: int) -> ExpertsBlock:
    block = experts_block(
        model,
        layer,
        Routing.SPARSE_MIXER,
        size_field="intermediate_size",
        module="block_sparse_moe",
        names=MIXTRAL_NAMES,
    )
    if block.num_active != 2:
        raise model.config.bad("num_experts_per_tok", "2")
    return replace(block, jitter=model.config.number("router_jitter_noise", 0.01, high=1.0))
