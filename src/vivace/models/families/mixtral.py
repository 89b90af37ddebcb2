"""Mixtral: Mistral with routed experts in place of the MLPs."""

from vivace.blocks import Block, ModelGraph, Routing
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._experts import MIXTRAL_NAMES, experts_block
from vivace.models.families._windows import sliding_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("MixtralForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "mixtral", eps=1e-5), Heads.of(config)
    window = sliding_window(config)
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        blocks.append(model.attention(layer, heads, window=window))
        blocks.append(
            experts_block(
                model,
                layer,
                Routing.SOFTMAX_CHOSEN,
                size_field="intermediate_size",
                module="block_sparse_moe",
                names=MIXTRAL_NAMES,
            )
        )
    return model.graph(blocks, [rope_spec(config, heads.head_dim, 1e6)])
