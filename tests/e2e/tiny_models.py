"""Tiny random models built in code: wide weights, so that every field of the graph matters."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from vivace.blocks import ModelGraph
from vivace.models import graph_from_config
from vivace.models.config import Config
from vivace.models.loading import weight_refs

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
    return graph, weights
