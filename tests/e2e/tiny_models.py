"""Tiny random models built in code: wide weights, so that every field of the graph matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from vivace.blocks import (
    Block,
    Expert,
    ExpertsBlock,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    Routing,
    WeightRef,
    weight_refs,
)
from vivace.models import graph_from_config
from vivace.models.config import Config

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def random_llama(
    dtype: str = "float32", seed: int = 0, **changes: Any
) -> tuple[ModelGraph, dict[str, np.ndarray]]:
    """A Llama of a few thousand weights: the graph and its tensors of `dtype`."""
    graph = graph_from_config(Config(TINY_LLAMA | changes, "config.json"))
    return graph, random_weights(graph, dtype, seed)


def random_mixture(
    dtype: str = "float32", seed: int = 0, **changes: Any
) -> tuple[ModelGraph, dict[str, np.ndarray]]:
    """The same Llama with experts of each routing, or one linear, in the place of MLPs."""
    changes = {"num_hidden_layers": 4} | changes
    graph = graph_from_config(Config(TINY_LLAMA | changes, "config.json"))
    routings = (Routing.SOFTMAX, Routing.SPARSE_MIXER, Routing.SOFTMAX_CHOSEN)

    def other(block: Block) -> Block:
        if not isinstance(block, MlpBlock):
            return block
        if block.layer == len(routings):
            linear = _linear("linear", graph.hidden_size, graph.hidden_size)
            return LinearBlock(block.layer, linear, block.norm)
        return _experts(block, graph.hidden_size, routings[block.layer])

    graph = replace(graph, blocks=tuple(map(other, graph.blocks)))
    return graph, random_weights(graph, dtype, seed)


def _experts(block: MlpBlock, hidden: int, routing: Routing) -> ExpertsBlock:
    """Six small experts in a block's place; in the first layer a shared one with a gate beside."""
    name = f"layers.{block.layer}"

    def expert(part: str, inner: int) -> Expert:
        gate_up = _linear(f"{name}.{part}.gate_up", hidden, inner, inner)
        return Expert(gate_up, _linear(f"{name}.{part}.down", inner, hidden))

    is_first = block.layer == 0
    return ExpertsBlock(
        block.layer,
        _linear(f"{name}.router", hidden, 6),
        tuple(expert(str(i), 24) for i in range(6)),
        num_active=2,
        activation=block.activation,
        norm=block.norm,
        routing=routing,
        jitter=0.3,
        shared=expert("shared", 40) if is_first else None,
        shared_gate=_linear(f"{name}.shared_gate", hidden, 1) if is_first else None,
    )


def _linear(name: str, in_features: int, *rows: int) -> LinearSpec:
    refs = tuple(WeightRef(f"{name}.{i}", (n, in_features)) for i, n in enumerate(rows))
    return LinearSpec(in_features, refs, (None,) * len(refs))


def random_weights(graph: ModelGraph, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A graph's tensors of `dtype`."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    weights = {}
    for ref in weight_refs(graph):
        if ref.name in weights:
            continue
        noise = rng.standard_normal(ref.shape, dtype=np.float32)
        is_norm = len(ref.shape) == 1
        scaled = 1 + 0.2 * noise if is_norm else noise * 1.5 / np.sqrt(ref.shape[-1])
        weights[ref.name] = scaled.astype(kind)
    return weights
