"""Routed experts as the hub names them, and which layers have them."""

from __future__ import annotations

from collections.abc import Callable

from vivace.blocks import ExpertsBlock, Routing
from vivace.models.config import Config
from vivace.models.families._decoder import MAX_WIDTH, Decoder, linear

__all__ = ["MIXTRAL_NAMES", "experts_block", "has_experts", "normalised_routing"]

MIXTRAL_NAMES = ("w1", "w3", "w2")  # gate, up, down
_MAX_EXPERTS = 2**17  # of all layers together


def experts_block(
    model: Decoder,
    layer: int,
    routing: Routing,
    *,
    size_field: str = "moe_intermediate_size",
    module: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> ExpertsBlock:
    """`module` with its router `gate` and its `experts`, behind `post_attention_layernorm`.

    Raises `BadFile` where the config gives two numbers of experts, or more active ones than there
    are.
    """
    config, prefix = model.config, f"{model.layers}.{layer}"
    num_experts = _num_experts(config, _MAX_EXPERTS // model.num_layers)
    num_active = config.integer("num_experts_per_tok", high=num_experts)
    inner_size = config.integer(size_field, high=MAX_WIDTH)
    experts = (f"{prefix}.{module}.experts.{index}" for index in range(num_experts))
    return ExpertsBlock(
        layer=layer,
        router=linear(f"{prefix}.{module}", model.hidden_size, {"gate": num_experts}),
        experts=tuple(model.expert(expert, inner_size, names) for expert in experts),
        num_active=num_active,
        activation=model.activation,
        norm=model.norm(f"{prefix}.post_attention_layernorm"),
        routing=routing,
    )


def _num_experts(config: Config, highest: int) -> int:
    """Newer configs call `num_local_experts` what older ones of the same family do not."""
    names = [name for name in ("num_experts", "num_local_experts") if config.has(name)]
    numbers = {config.integer(name, high=highest) for name in names or ["num_experts"]}
    if len(numbers) > 1:
        raise config.bad("num_experts", "the same number as num_local_experts")
    return numbers.pop()


def normalised_routing(config: Config) -> Routing:
    """As `norm_topk_prob` says: whether the chosen experts' shares add up to 1."""
    is_normalised = config.boolean("norm_topk_prob")
    return Routing.SOFTMAX_CHOSEN if is_normalised else Routing.SOFTMAX


def has_experts(config: Config) -> Callable[[int], bool]:
    """Whether a layer has experts in place of an MLP, as Qwen says it."""
    step = config.integer("decoder_sparse_step", 1)
    dense_layers = frozenset(config.integers("mlp_only_layers") or ())
    return lambda layer: layer not in dense_layers and (layer + 1) % step == 0
