"""The default model's config in the checkpoint's own words, and its initial weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vivace.blocks import ModelGraph, block_linears
from vivace.training.recipe import Recipe

__all__ = ["initial_weights", "model_config"]


def model_config(recipe: Recipe) -> dict[str, Any]:
    """What `config.json` says of the shape; token ids are the exporter's."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocab_size,
        **recipe.shape,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def initial_weights(graph: ModelGraph, seed: int) -> dict[str, Tensor]:
    """Normal matrices of deviation 1/sqrt(in); blocks start as the identity (zero outputs)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> Tensor:
        return torch.randn(shape, generator=generator) * deviation

    embedding = graph.embedding.weight
    weights = {embedding.name: normal(embedding.shape, 0.02)}
    assert graph.head.norm is not None
    norms = [graph.head.norm]
    for block in graph.blocks:
        inner, outer = block_linears(block)  # of an attention or a plain MLP
        for part in inner.parts:
            weights[part.name] = normal(part.shape, 1 / math.sqrt(inner.in_features))
        for part in outer.parts:
            weights[part.name] = torch.zeros(part.shape)
        assert block.norm is not None
        norms.append(block.norm)
    return weights | {norm.weight.name: torch.ones(norm.weight.shape) for norm in norms}
