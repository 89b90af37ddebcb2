"""Routed experts in plain torch: who visits whom, with which weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vivace.blocks import Expert, ExpertsBlock, Routing

__all__ = ["combine_experts", "route"]


def combine_experts(
    block: ExpertsBlock, x: Tensor, logits: Tensor, run: Callable[[Expert, Tensor], Tensor]
) -> Tensor:
    """Every row's experts, weighted and added in rank order: x [N, hidden] -> [N, hidden].

    Args:
        block: the experts.
        x: rows after the norm.
        logits: the router's, [N, num_experts].
        run: an expert over rows, [n, hidden] -> [n, hidden].
    """
    chosen, weights = route(block, logits)
    outs = x.new_zeros(len(x), block.num_active, x.shape[-1])
    for index, expert in enumerate(block.experts):
        rows, ranks = torch.nonzero(chosen == index, as_tuple=True)
        if len(rows):
            outs = outs.index_put((rows, ranks), run(expert, x[rows]))
    total = torch.zeros_like(x)
    for rank in range(block.num_active):
        total = total + weights[:, rank, None] * outs[:, rank]
    return total


def route(block: ExpertsBlock, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights, by rank: [N, num_active] int64 and float32."""
    logits = logits.float()
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    chosen = order[:, : block.num_active]
    match block.routing:
        case Routing.SOFTMAX:
            return chosen, torch.softmax(logits, dim=-1).gather(-1, chosen)
        case Routing.SOFTMAX_CHOSEN:
            return chosen, torch.softmax(logits.gather(-1, chosen), dim=-1)
        case Routing.SPARSE_MIXER:
            return chosen, _sparse_mixer_weights(logits, chosen, block.jitter)


def _sparse_mixer_weights(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """Each rank's share among the experts that are left and near enough to its own logit."""
    left, weights = logits, []
    for rank in range(chosen.shape[-1]):
        expert = chosen[:, rank, None]
        top = logits.gather(-1, expert)
        is_near = top - left <= 2 * jitter * torch.maximum(logits.abs(), top)
        shares = torch.softmax(left.masked_fill(~is_near, float("-inf")), dim=-1)
        weights.append(shares.gather(-1, expert))
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, dim=-1)
