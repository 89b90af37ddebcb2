"""Tiny random checkpoints made by transformers, and steps that run them: nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vivace.blocks import ModelGraph
from vivace.executors.native import NativeExecutor
from vivace.registry import Seam
from vivace.types import GroupRows, Mask, Segment, Span, Step, Wants

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BLOCK_SIZE = 16


def reference_model(family: str, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """A transformers model whose weights are so wide that every field of its config matters."""
    config = AutoConfig.for_model(family, **(SIZES | dict(fields)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.5 * noise)
            else:
                width = {"model.embed_tokens.weight": 4.0, "lm_head.weight": 5.0}.get(name, 1.5)
                weight.copy_(noise * width / weight.shape[1] ** 0.5)
    return model.eval()


def save(model: Any, path: Path, config_changes: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint; a change of None removes a config field."""
    model.save_pretrained(path)
    if config_changes is not None:
        file = path / "config.json"
        fields = json.loads(file.read_text()) | dict(config_changes)
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return path


@torch.no_grad()
def reference_logits(model: Any, tokens: np.ndarray, one_by_one: bool = False) -> np.ndarray:
    """transformers' logits [num_tokens, vocab_size] of one sequence."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    if not one_by_one:
        return model(ids).logits[0].numpy()
    cache, rows = None, []
    for index in range(ids.shape[1]):
        out = model(ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0])
    return torch.cat(rows).numpy()


def make_executor(name: str, graph: ModelGraph, weights: Mapping[str, np.ndarray]) -> Any:
    """An executor in float32 arithmetic, for any length, with a float32 cache."""
    graph = dataclasses.replace(graph, max_positions=4096)
    weight_format = Seam("vivace.techniques.weight_formats").create("float32")
    kv_store = Seam("vivace.techniques.kv_stores").create("float32")
    if name == "torch":
        from vivace.executors.torch_ import TorchExecutor

        return TorchExecutor(graph, weights, weight_format, kv_store)
    return NativeExecutor(graph, weights, weight_format, kv_store)


def run_logits(executor: Any, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Logits of all rows of one sequence, `chunk` rows a step, over shuffled cache blocks."""
    graph = executor.graph
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    executor.allocate([num_blocks] * len(graph.groups), BLOCK_SIZE)
    rng = np.random.default_rng(0)
    tables = [rng.permutation(num_blocks).astype(np.int32) for _ in graph.groups]
    rows = []
    for first in range(0, len(tokens), chunk):
        positions = np.arange(first, min(first + chunk, len(tokens)), dtype=np.int32)
        end = first + len(positions)
        groups = tuple(
            GroupRows(
                slots=table[positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
                + positions % BLOCK_SIZE,
                spans=(
                    Span(
                        0,
                        len(positions),
                        (
                            Segment(
                                table[: -(-end // BLOCK_SIZE)],
                                end,
                                mask=Mask(window=group.window or 0),
                            ),
                        ),
                    ),
                ),
            )
            for table, group in zip(tables, graph.groups, strict=True)
        )
        wanted = Wants(logits_rows=np.arange(len(positions), dtype=np.int32))
        step = Step(tokens[positions].astype(np.int32), positions, groups, wanted)
        rows.append(executor.forward(step).logits)
    return np.concatenate(rows)


def random_tokens(num_tokens: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], num_tokens, dtype=np.int32)
