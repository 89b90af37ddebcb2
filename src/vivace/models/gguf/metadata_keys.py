"""What a graph is in the keys under its architecture's name in a GGUF file.

The keys are read back as a graph: a model that they cannot describe is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from vivace.blocks import (
    AttentionBlock,
    ExpertsBlock,
    LinearBlock,
    MlpBlock,
    ModelGraph,
    NormSpec,
    RopeSpec,
    block_norms,
)
from vivace.errors import UnsupportedModel
from vivace.models import graph_from_config
from vivace.models.config import Config
from vivace.models.gguf.architectures import ARCHITECTURES, config_from_metadata
from vivace.models.gguf.names import stored_as_gguf
from vivace.models.rope import inverse_frequencies, rope_parameters

__all__ = ["check_says_the_same", "model_keys", "norms", "rope_factors"]


def norms(graph: ModelGraph) -> Iterator[NormSpec]:
    for block in graph.blocks:
        yield from block_norms(block)
    if graph.head.norm is not None:
        yield graph.head.norm


def model_keys(graph: ModelGraph, config: Config) -> dict[str, Any]:
    """Keys under the architecture's name, from what the graph does."""
    num_layers = config.integer("num_hidden_layers", graph.num_layers)
    attention = {b.layer: b for b in graph.blocks if isinstance(b, AttentionBlock)}
    first = next(iter(attention.values()))
    sizes = [_sizes(graph, attention, layer) for layer in range(num_layers)]
    eps = next(norms(graph)).eps
    is_gpt2 = graph.embedding.positions is not None
    keys: dict[str, Any] = {
        "block_count": num_layers,
        "context_length": config.integer("max_position_embeddings", graph.max_positions),
        "embedding_length": graph.hidden_size,
        "vocab_size": graph.vocab_size,
        "attention.head_count": _one([heads for heads, _, _ in sizes]),
        "attention.head_count_kv": _one([heads for _, heads, _ in sizes]),
        "feed_forward_length": _one([size for _, _, size in sizes]),
        f"attention.layer_norm_{'' if is_gpt2 else 'rms_'}epsilon": eps,
    }
    if not is_gpt2:
        keys |= {"attention.key_length": first.head_dim, "attention.value_length": first.head_dim}
        keys |= _rope_keys(graph, config)
    return keys | _window_keys(graph, attention) | _expert_keys(graph) | _scale_keys(graph, first)


def _sizes(
    graph: ModelGraph, attention: Mapping[int, AttentionBlock], layer: int
) -> tuple[int, int, int]:
    """Query heads, key heads and inner size of a layer, as `deci` files have them."""
    inner, has_matrix = 0, False
    for block in graph.blocks:
        if block.layer == layer:
            if isinstance(block, MlpBlock):
                inner = block.down.in_features
            elif isinstance(block, ExpertsBlock):
                inner = block.experts[0].down.in_features
            has_matrix = has_matrix or isinstance(block, LinearBlock)
    own = attention.get(layer)
    if own is not None:
        return own.num_heads, own.num_kv_heads, inner
    return next(iter(attention.values())).num_heads if has_matrix else 0, 0, inner


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _rope_keys(graph: ModelGraph, config: Config) -> dict[str, Any]:
    rope = graph.ropes[0]
    keys: dict[str, Any] = {"rope.dimension_count": rope.rotary_dim, "rope.freq_base": rope.base}
    if len(graph.ropes) > 1:
        keys["rope.freq_base_swa"] = graph.ropes[1].base
    parameters = rope_parameters(config)
    if parameters.text("rope_type", parameters.text("type", None)) == "yarn":
        declared = config.integer("max_position_embeddings")
        original = parameters.integer("original_max_position_embeddings", declared)
        factor = parameters.number("factor", declared / original)
        return keys | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": rope.attention_factor / (0.1 * math.log(factor) + 1.0),
            "rope.scaling.yarn_beta_fast": parameters.number("beta_fast", 32.0),
            "rope.scaling.yarn_beta_slow": parameters.number("beta_slow", 1.0),
        }
    scale = _uniform_factor(rope)
    if scale is not None and scale != 1.0:
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": scale}
    if rope.bands:
        keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope.bands[0][0],
            "rope.scaling.attn_factor": rope.attention_factor,
        }
    return keys


def _frequency_factors(rope: RopeSpec, inv_freq: Sequence[float]) -> np.ndarray:
    """What the plain frequencies were divided by: [rotary_dim / 2] float32."""
    assert rope.base is not None
    return inverse_frequencies(rope.base, rope.rotary_dim) / np.asarray(inv_freq, np.float32)


def _uniform_factor(rope: RopeSpec) -> float | None:
    factors = _frequency_factors(rope, rope.inv_freq)
    is_uniform = not rope.bands and np.ptp(factors) <= 1e-5 * factors[0]
    return round(float(factors[0]), 5) if is_uniform else None


def rope_factors(graph: ModelGraph, keys: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factors of ropes that keys do not describe, as tensors."""
    if not graph.ropes or keys.get("rope.scaling.type") in ("yarn", "linear"):
        return {}
    rope = graph.ropes[0]
    factors = _frequency_factors(rope, rope.inv_freq)
    if rope.bands:
        long = _frequency_factors(rope, rope.bands[0][1])
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": factors}
    return {} if _uniform_factor(rope) == 1.0 else {"rope_freqs.weight": factors}


def _window_keys(graph: ModelGraph, attention: Mapping[int, AttentionBlock]) -> dict[str, Any]:
    windows = [graph.groups[block.group].window for block in attention.values()]
    widths = {window for window in windows if window is not None}
    if not widths:
        return {}
    pattern = [window is not None for window in windows]
    keys: dict[str, Any] = {"attention.sliding_window": max(widths)}
    return keys if all(pattern) else keys | {"attention.sliding_window_pattern": pattern}


def _expert_keys(graph: ModelGraph) -> dict[str, Any]:
    block = next((b for b in graph.blocks if isinstance(b, ExpertsBlock)), None)
    if block is None:
        return {}
    keys = {
        "expert_count": len(block.experts),
        "expert_used_count": block.num_active,
        "expert_feed_forward_length": block.experts[0].down.in_features,
    }
    if block.shared is not None:
        keys["expert_shared_feed_forward_length"] = block.shared.down.in_features
    return keys


def _scale_keys(graph: ModelGraph, first: AttentionBlock) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if first.soft_cap is not None:
        keys["attn_logit_softcapping"] = first.soft_cap
    if graph.head.soft_cap is not None:
        keys["final_logit_softcapping"] = graph.head.soft_cap
    if graph.family == "minicpm":
        keys["embedding_scale"] = graph.embedding.scale
        keys["residual_scale"] = first.residual_scale
        keys["logit_scale"] = 1 / graph.head.scale
    return keys


def check_says_the_same(
    stored: ModelGraph,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, np.ndarray],
) -> None:
    """Raises `UnsupportedModel` where a reader would make another graph of the file."""
    name = metadata["general.architecture"]
    config = config_from_metadata(metadata, tensors, factors, "the new file")
    read = stored_as_gguf(graph_from_config(config), ARCHITECTURES[name], tensors)
    for field in ("embedding", "blocks", "head", "groups", "ropes", "next_token_heads"):
        if not _alike(getattr(read, field), getattr(stored, field)):
            raise UnsupportedModel(
                f"GGUF's architecture '{name}' cannot say what this '{stored.family}' model does "
                f"(its {field} would be others): keep it as safetensors"
            )


def _alike(a: Any, b: Any) -> bool:
    """Whether two specs are equal but for the rounding of numbers to float32."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if is_dataclass(a) and type(a) is type(b):
        return all(_alike(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b
