"""Attention over a paged cache in plain torch: segments of entries, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vivace.blocks import AttentionBlock, LayerGroup
from vivace.types import GroupRows, Segment, Span

__all__ = ["PagedCache", "paged_attend"]


class PagedCache:
    """Keys and values of one layer group; a block holds all its layers, so it moves as one.

    Args:
        group: the layers that share the blocks.
        num_blocks, block_size: blocks, and entries per block.
        dtype: how an element is stored.
    """

    def __init__(
        self, group: LayerGroup, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        shape = (
            num_blocks,
            group.num_layers,
            2,
            block_size,
            group.num_kv_heads,
            group.head_dim,
        )
        # Unwritten entries are NaN, so that reading one shows.
        self.blocks = torch.full(shape, float("nan"), dtype=dtype)
        self.block_size = block_size

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values [N, G, D] in `slots` [N] of a layer."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        for part, rows in enumerate((k, v)):
            self.blocks[blocks, layer, part, offsets] = rows.to(self.blocks.dtype)

    def read(self, layer: int, segment: Segment) -> tuple[Tensor, Tensor]:
        """Keys and values of a segment's entries: two [E, G, D] float32."""
        block_ids = torch.as_tensor(np.asarray(segment.block_ids, np.int64))
        entries = self.blocks[block_ids, layer].float()  # [blocks, 2, block_size, G, D]
        k, v = entries[:, 0].flatten(0, 1), entries[:, 1].flatten(0, 1)
        return k[: segment.num_entries], v[: segment.num_entries]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.blocks[list(targets)] = self.blocks[list(sources)]

    def raw(self) -> Tensor:
        """The same storage as bytes: [num_blocks, bytes_per_block] uint8."""
        return self.blocks.flatten(1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one segment gives: its values weighted by its own softmax, and how much it counts."""

    scores: Tensor  # [H, n, E], minus infinity where masked
    out: Tensor  # [n, H, D]
    lse: Tensor  # [n, H] log-sum-exp of the scores


def paged_attend(
    block: AttentionBlock,
    q: Tensor,
    cache: PagedCache,
    rows: GroupRows,
    positions: np.ndarray,
    sinks: Tensor | None,
    sums: list[np.ndarray] | None,
) -> Tensor:
    """Attention of one layer for a step's rows: q [N, H, D] -> [N, H, D].

    `sinks` [H] are logits that join the sum of the softmax without a value. Attention sums, if a
    list is given, are appended: per span [H, entries of all its segments].
    """
    outs = []
    for span in rows.spans:
        here = slice(span.first_row, span.first_row + span.num_rows)
        out, weights = _attend_span(block, q[here].float(), cache, span, positions[here], sinks)
        outs.append(out)
        if sums is not None:
            sums.append(weights.sum(1).numpy())
    return torch.cat(outs)


def _attend_span(
    block: AttentionBlock,
    q: Tensor,
    cache: PagedCache,
    span: Span,
    positions: np.ndarray,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [n, H, D] and softmax weights [H, n, entries of all segments] of a span."""
    parts = [_attend_segment(block, q, cache, segment, positions) for segment in span.segments]
    out, lse = parts[0].out, parts[0].lse
    for part in parts[1:]:
        merged = torch.logaddexp(lse, part.lse)
        out = out * _share(lse, merged) + part.out * _share(part.lse, merged)
        lse = merged
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.float().expand_as(lse))
        out, lse = out * _share(lse, with_sinks), with_sinks
    scores = torch.cat([part.scores for part in parts], dim=-1)
    is_read = torch.isfinite(lse).T[..., None]  # a row that reads nothing has no weights
    weights = torch.exp(scores - torch.where(is_read, lse.T[..., None], 0))
    return out, weights


def _attend_segment(
    block: AttentionBlock,
    q: Tensor,
    cache: PagedCache,
    segment: Segment,
    positions: np.ndarray,
) -> _Part:
    k, v = cache.read(block.cache_layer, segment)
    allowed = segment.mask.allows(positions, segment.num_entries, segment.shift)
    allowed = torch.from_numpy(allowed)  # [n, E]
    v = torch.where(allowed.any(0)[:, None, None], v, 0)  # entries that nobody reads may be NaN
    num_per_group = block.num_heads // block.num_kv_heads
    k, v = (x.repeat_interleave(num_per_group, dim=1) for x in (k, v))  # [E, H, D]
    scores = torch.einsum("nhd,ehd->hne", q, k) * block.scale
    if block.soft_cap is not None:
        scores = torch.tanh(scores / block.soft_cap) * block.soft_cap
    if segment.log_weights is not None:
        scores = scores + torch.from_numpy(np.asarray(segment.log_weights, np.float32))
    scores = scores.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)  # [H, n]
    weights = torch.exp(scores - torch.where(torch.isfinite(lse), lse, 0)[..., None])
    return _Part(scores, torch.einsum("hne,ehd->nhd", weights, v), lse.T)


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total) as [n, H, 1], zero where neither has anything to read."""
    difference = torch.where(torch.isfinite(lse), lse - total, float("-inf"))
    return torch.exp(difference)[..., None]
