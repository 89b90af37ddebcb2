"""Tiny random checkpoints made by transformers, and steps that run them: nothing is downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from special_checkpoints import SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM
from variants import VARIANTS

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
GPT2_SIZES = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 160,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BLOCK_SIZE = 16


# Tensors whose width is not the usual one, by how their names end.
WIDTHS = {
    "experts.gate_up_proj": 1.0,
    "experts.down_proj": 1.0,
    "embed_tokens.weight": 4.0,
    "wte.weight": 4.0,
    "lm_head.weight": 5.0,
    "gate.weight": 2.0,  # of experts
    "router.weight": 2.0,
}


def reference_model(family: str, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """A transformers model whose weights are so wide that every field of its config matters."""
    config = AutoConfig.for_model(family, **(sizes_of(family) | dict(fields)))
    torch.manual_seed(seed)
    return randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def sizes_of(family: str) -> dict[str, Any]:
    return GPT2_SIZES if family == "gpt2" else SIZES


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed + 1)
    counts_from_one = "gemma" in model.config.model_type
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or "ln_" in name:
            is_plain = name.endswith("bias") or counts_from_one
            weight.copy_(0.3 * noise if is_plain else 1 + 0.3 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.5 * noise)
        else:
            width = next((w for end, w in WIDTHS.items() if name.endswith(end)), 1.5)
            in_features = weight.shape[0 if name.split(".")[-2].startswith("c_") else -1]
            weight.copy_(noise * width / in_features**0.5)
    return model.eval()


# Seeds at which no router's logits are so near a tie that rounding would turn it.
SEEDS = {
    "mixtral, own head size": 1,
    "qwen2_moe": 1,
    "qwen2_moe, normalised": 1,
    "olmoe": 1,
    "olmoe, normalised": 1,
    "phimoe": 2,
    "phimoe, usual jitter": 6,
    "phimoe, window": 2,
    "phimoe, longrope": 2,
}


def checkpoint(variant: str, path: Path) -> Any:
    """Write the checkpoint of a variant and return the model it came from."""
    family, fields = VARIANTS[variant]
    if family in SPECIAL:
        return SPECIAL[family](sizes_of(family) | fields, randomise, path)
    model = reference_model(family, fields, SEEDS.get(variant, 0))
    save(model, path)
    if variant == "gpt2, hub names":
        _save_as_the_hub_does(model, path)
    if variant == "phimoe, longrope":
        _repair_long_rope(model)
    return model


@contextlib.contextmanager
def routing_margins(model: Any) -> Iterator[list[float]]:
    """Gathers how far each call of a router is from a tie, in logits or in the mixer's ratios."""
    margins: list[float] = []
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    num_active, is_mixer = model.config.num_experts_per_tok, model.config.model_type == "phimoe"

    def note(module: Any, args: Any, output: Any) -> None:
        top = output[0].flatten(0, -2).sort(-1, descending=True).values
        margins.append(float((top[:, :num_active] - top[:, 1 : num_active + 1]).min()))
        for rank in range(num_active if is_mixer else 0):
            best, others = top[:, rank, None], top[:, rank + 1 :]
            ratios = (best - others) / torch.maximum(others.abs(), best)
            margins.append(float((ratios - 2 * model.config.router_jitter_noise).abs().min()))

    hooks = [router.register_forward_hook(note) for router in routers]
    yield margins
    for hook in hooks:
        hook.remove()


def _save_as_the_hub_does(model: Any, path: Path) -> None:
    """The published GPT-2's names have no prefix, and it stores its causal masks."""
    tensors = dict(model.transformer.state_dict())
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path / "model.safetensors")


def _repair_long_rope(model: Any) -> None:
    """transformers 5.23 recomputes Phi-MoE's frequencies without the length: never the long ones.

    The published code takes those past the original context.
    """
    rotary = model.model.rotary_emb
    frequencies = rotary.rope_init_fn

    def with_length(module: Any, args: Any, kwargs: Any) -> None:
        length = int(kwargs["position_ids"].max()) + 1
        module.rope_init_fn = functools.partial(frequencies, seq_len=length)

    rotary.register_forward_pre_hook(with_length, with_kwargs=True)


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
