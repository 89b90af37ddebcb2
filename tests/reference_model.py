"""A block list in plain numpy: whole sequences at once, dense attention, float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from vivace.blocks import (
    Activation,
    AttentionBlock,
    Expert,
    ExpertsBlock,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    NormSpec,
    Routing,
    WeightRef,
)
from vivace.models.rope import rope_table
from vivace.types import Mask

__all__ = ["attention", "forward", "route"]

Weights = Mapping[str, np.ndarray]


def forward(
    graph: ModelGraph,
    weights: Weights,
    tokens: np.ndarray,
    mask: Mask | None = None,
    keep: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [n, V] and the states after each block; `keep` rounds keys and values."""
    positions = np.arange(len(tokens))
    embedding = graph.embedding
    h = _tensor(weights, embedding.weight)[tokens] * embedding.scale
    if embedding.positions is not None:
        h = h + _tensor(weights, embedding.positions)[positions]
    states = []
    for block in graph.blocks:
        x = _norm(weights, block.norm, h)
        match block:
            case AttentionBlock():
                x = _attention(graph, weights, block, x, positions, mask, keep)
            case MlpBlock():
                x = _mlp(weights, block, block.activation, x)
            case LinearBlock():
                x = _linear(weights, block.linear, x)
            case ExpertsBlock():
                x = _experts(weights, block, x)
        h = h + block.residual_scale * _norm(weights, block.post_norm, x)
        states.append(h)
    head = graph.head
    logits = _linear(weights, head.linear, _norm(weights, head.norm, h))
    if head.soft_cap is not None:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
    return logits * head.scale, states


def _attention(graph, weights, block, x, positions, mask, keep):
    heads, groups, dim = block.num_heads, block.num_kv_heads, block.head_dim
    qkv = _linear(weights, block.qkv, x)
    q, k, v = np.split(qkv, [heads * dim, (heads + groups) * dim], axis=-1)
    q = _head_norm(weights, block.q_norm, q, heads, dim)
    k = _head_norm(weights, block.k_norm, k, groups, dim)
    v = v.reshape(-1, groups, dim)
    if block.rope is not None:
        spec = graph.ropes[block.rope]
        cos, sin = (part[positions] for part in rope_table(spec, len(positions)))
        q = _rotate(q, cos, sin, spec.is_interleaved)
        k = _rotate(k, cos, sin, spec.is_interleaved)
    sinks = None if block.sinks is None else _tensor(weights, block.sinks)
    mask = mask or Mask(window=graph.groups[block.group].window or 0)
    allowed = mask.allows(positions, len(positions), 0)
    out, _, _ = attention(
        q, keep(k), keep(v), allowed, scale=block.scale, soft_cap=block.soft_cap, sinks=sinks
    )
    return _linear(weights, block.out, out.reshape(len(x), -1))


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    allowed: np.ndarray,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
    log_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense attention: q [n, H, D], k and v [m, G, D], allowed [n, m].

    Returns out [n, H, D], the log of the sum of weights [n, H], and the weights [n, H, m].
    """
    per_group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), per_group, axis=1) for x in (k, v))
    read = np.any(allowed, axis=0)[:, None, None]
    k, v = np.where(read, k, 0), np.where(read, v, 0)  # what nobody reads may be anything
    scores = np.einsum("nhd,mhd->nhm", q.astype(np.float64), k) * scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    if log_weights is not None:
        scores = scores + log_weights
    scores = np.where(allowed[:, None, :], scores, -np.inf)
    if sinks is not None:
        shape = (*scores.shape[:2], 1)
        scores = np.concatenate([scores, np.broadcast_to(sinks[None, :, None], shape)], -1)
    high = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(high), high, 0))
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = (high + np.log(total))[..., 0]
    weights = weights[..., : v.shape[0]]
    return np.einsum("nhm,mhd->nhd", weights, v), lse, weights


def _mlp(weights: Weights, mlp: MlpBlock | Expert, activation: Activation, x: np.ndarray):
    gate, *up = np.split(_linear(weights, mlp.gate_up, x), len(mlp.gate_up.parts), axis=-1)
    gate = _activate(activation, gate)
    return _linear(weights, mlp.down, gate * up[0] if up else gate)


def _experts(weights: Weights, block: ExpertsBlock, x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    for row, logits in enumerate(_linear(weights, block.router, x)):
        for index, weight in route(block, logits):
            one = x[row : row + 1]
            out[row] += weight * _mlp(weights, block.experts[index], block.activation, one)[0]
    if block.shared is not None:
        shared = _mlp(weights, block.shared, block.activation, x)
        if block.shared_gate is not None:
            shared = shared / (1 + np.exp(-_linear(weights, block.shared_gate, x)))
        out += shared
    return out


def route(block: ExpertsBlock, logits: np.ndarray) -> list[tuple[int, float]]:
    """The experts that a row visits and their weights, in order of rank."""
    ranked = np.argsort(-logits, kind="stable")[: block.num_active]
    shares = np.exp(logits - logits.max())
    match block.routing:
        case Routing.SOFTMAX:
            shares = shares[ranked] / shares.sum()
        case Routing.SOFTMAX_CHOSEN:
            shares = shares[ranked] / shares[ranked].sum()
        case Routing.SPARSE_MIXER:
            left, chosen = np.ones(len(logits), bool), []
            for index in ranked:
                top = logits[index]
                with np.errstate(invalid="ignore"):  # 0 / 0, which is no distance
                    distance = (top - logits) / np.maximum(np.abs(logits), top)
                near = left & ~(distance > 2 * block.jitter)
                chosen.append(1 / np.exp(logits[near] - top).sum())
                left[index] = False
            shares = np.array(chosen)
    return list(zip(ranked.tolist(), shares.tolist(), strict=True))


def _rotate(x, cos, sin, is_interleaved):
    half = cos.shape[-1]
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out = x.copy()
    a_at = slice(0, 2 * half, 2) if is_interleaved else slice(0, half)
    b_at = slice(1, 2 * half, 2) if is_interleaved else slice(half, 2 * half)
    a, b = x[..., a_at], x[..., b_at]
    out[..., a_at], out[..., b_at] = a * cos - b * sin, b * cos + a * sin
    return out


def _head_norm(weights, spec, x, heads, dim):
    if spec is not None and spec.weight.shape[0] != dim:
        x = _norm(weights, spec, x)
    x = x.reshape(-1, heads, dim)
    return _norm(weights, spec, x) if spec is not None and spec.weight.shape[0] == dim else x


def _norm(weights: Weights, spec: NormSpec | None, x: np.ndarray) -> np.ndarray:
    if spec is None:
        return x
    weight = _tensor(weights, spec.weight) + spec.unit_offset
    if spec.kind is NormKind.LAYER:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.eps) * weight
    return x if spec.bias is None else x + _tensor(weights, spec.bias)


def _linear(weights: Weights, spec: LinearSpec, x: np.ndarray) -> np.ndarray:
    outs = []
    for part, bias in zip(spec.parts, spec.biases, strict=True):
        out = x @ _tensor(weights, part).T
        outs.append(out if bias is None else out + _tensor(weights, bias))
    return np.concatenate(outs, -1)


def _tensor(weights: Weights, ref: WeightRef) -> np.ndarray:
    stored = weights[ref.name].T if ref.is_transposed else weights[ref.name]
    return stored[ref.first_row : ref.first_row + ref.shape[0]].astype(np.float64)


def _activate(activation: Activation, x: np.ndarray) -> np.ndarray:
    match activation:
        case Activation.SILU:
            return x / (1 + np.exp(-x))
        case Activation.GELU:
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case Activation.GELU_TANH:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case Activation.RELU:
            return np.maximum(x, 0)
