"""Llama-Nemotron from Puzzle (P026, P228): each layer has blocks of its own, simpler or none.

Source: Bercovich et al. 2024, arXiv 2411.19146.
"""

from dataclasses import replace

from vivace.blocks import AttentionBlock, Block, LinearBlock, MlpBlock, ModelGraph
from vivace.errors import UnsupportedModel
from vivace.models.config import Config
from vivace.models.families._decoder import MAX_WIDTH, Decoder, Heads, linear
from vivace.models.rope import rope_spec

ARCHITECTURES = ("DeciLMForCausalLM",)
_UNSUPPORTED = ("window_length", "num_sink_tokens", "sparsify")


def graph(config: Config) -> ModelGraph:
    model, heads = Decoder.of(config, "nemotron_nas"), Heads.of(config)
    blocks: list[Block] = []
    for layer, choices in enumerate(config.sections("block_configs", model.num_layers)):
        choice = choices.required_section("attention")
        simple = _simple(model, layer, choice, "self_attn", "linear_attn", "input_layernorm")
        blocks += [_attention(model, heads, layer, choice)] if simple is None else simple
        choice = choices.required_section("ffn")
        simple = _simple(model, layer, choice, "mlp", "linear_mlp", "post_attention_layernorm")
        blocks += [_mlp(model, layer, choice)] if simple is None else simple
    if not model.groups:
        raise config.bad("block_configs", "attention in at least one layer")
    return model.graph(blocks, [rope_spec(config, heads.head_dim)])


def _simple(
    model: Decoder, layer: int, choice: Config, module: str, name: str, norm: str
) -> list[Block] | None:
    """No block or a single matrix behind `norm`, where that was chosen; else None."""
    if choice.boolean("no_op"):
        return []
    prefix, hidden = f"{model.layers}.{layer}", model.hidden_size
    if choice.boolean("replace_with_linear"):
        spec = linear(f"{prefix}.{module}", hidden, {name: hidden})
        return [LinearBlock(layer, spec, model.norm(f"{prefix}.{norm}"))]
    for field in _UNSUPPORTED:
        if choice.has(field):
            raise UnsupportedModel(
                f"{choice.source}: field '{field}' is not supported by 'nemotron_nas': "
                "use a checkpoint without it"
            )
    return None


def _attention(model: Decoder, heads: Heads, layer: int, choice: Config) -> AttentionBlock:
    heads_per_group = choice.integer("n_heads_in_group")
    if heads.num_heads % heads_per_group:
        raise choice.bad("n_heads_in_group", f"a divisor of the {heads.num_heads} heads")
    heads = replace(heads, num_kv_heads=heads.num_heads // heads_per_group)
    has_bias = model.config.boolean("attention_bias")
    return model.attention(layer, heads, qkv_bias=has_bias, out_bias=has_bias)


def _mlp(model: Decoder, layer: int, choice: Config) -> MlpBlock:
    size = int(2 * choice.number("ffn_mult", high=1024.0) * model.hidden_size / 3)
    size = -(-size // 256) * 256  # the next multiple
    if not 0 < size <= MAX_WIDTH:
        raise choice.bad("ffn_mult", f"a factor that gives 1 to {MAX_WIDTH} inner values")
    return model.mlp(layer, size, has_bias=model.config.boolean("mlp_bias"))
