"""SmolLM3: Llama with layers that have no rope, every fourth by default, and optional windows."""

from dataclasses import replace

from vivace.blocks import Block, ModelGraph
from vivace.models.config import Config
from vivace.models.families._decoder import Decoder, Heads
from vivace.models.families._windows import layer_windows, optional_window
from vivace.models.rope import rope_spec

ARCHITECTURES = ("SmolLM3ForCausalLM",)


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "smollm3"), Heads.of(config)
    has_bias, mlp_bias = config.boolean("attention_bias"), config.boolean("mlp_bias")
    has_rope = _has_rope(config, model.num_layers)
    windows = layer_windows(config, optional_window(config), lambda layer: not has_rope[layer])
    blocks: list[Block] = []
    for layer in range(model.num_layers):
        attention = model.attention(
            layer, heads, window=windows[layer], qkv_bias=has_bias, out_bias=has_bias
        )
        blocks.append(replace(attention, rope=0 if has_rope[layer] else None))
        blocks.append(model.mlp(layer, has_bias=mlp_bias))
    return model.graph(blocks, [rope_spec(config, heads.head_dim, 2e6)], is_tied=True)


def _has_rope(config: Config, num_layers: int) -> list[bool]:
    """Per layer; the field's name means the opposite of its ones."""
    interval = config.integer("no_rope_layer_interval", 4)
    given = config.integers("no_rope_layers")
    if given is None:
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(given) < num_layers or set(given) - {0, 1}:
        raise config.bad("no_rope_layers", f"{num_layers} numbers, 0 for a layer without rope or 1")
    return [item == 1 for item in given[:num_layers]]
