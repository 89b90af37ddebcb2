"""From scheduled streams to the flat rows of one forward, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vivace.blocks import LayerGroup, ModelGraph
from vivace.engine.request import Stream
from vivace.engine.scheduler import Scheduled
from vivace.techniques.decoders.base import Decoder, Rows
from vivace.types import CancelFlag, GroupRows, Mask, RequestKind, Segment, Span, Step, Wants

__all__ = ["Batch", "Part", "build_batch", "hidden_block"]


@dataclass(slots=True)
class Part:
    """One stream's rows [first_row, first_row + num_rows) of a batch."""

    stream: Stream
    rows: Rows
    start: int  # the entry of its first row
    first_row: int
    collected: range  # entries whose logits or states go into the request's result

    @property
    def num_rows(self) -> int:
        return len(self.rows.token_ids)

    @property
    def num_sampled(self) -> int:
        return len(self.rows.sampled) if self.stream.generates else 0

    @property
    def num_scored(self) -> int:
        return len(self.collected) if self.stream.collects_logprobs else 0


@dataclass(slots=True)
class Batch:
    """A step, and where its results belong.

    Wanted logits: first the sampled rows of all parts, then the scored ones, both in order.
    """

    parts: list[Part]
    step: Step
    cancel: CancelFlag
    num_blocks_of_model: int

    def holds_only(self, request_ids: set[int]) -> bool:
        return all(part.stream.job.id in request_ids for part in self.parts)


def build_batch(
    scheduled: Sequence[Scheduled],
    decoder: Decoder,
    graph: ModelGraph,
    block_size: int,
) -> Batch:
    parts, first_row, num_blocks_of_model = [], 0, len(graph.blocks)
    for item in scheduled:
        progress = item.stream.progress
        rows = decoder.rows(progress, item.num_rows)
        start = progress.num_computed
        collected = item.stream.rows_to_collect(start, start + item.num_rows)
        parts.append(Part(item.stream, rows, start, first_row, collected))
        first_row += item.num_rows
    cancel = CancelFlag()
    step = Step(
        tokens=np.array([t for part in parts for t in part.rows.token_ids], np.int32),
        positions=np.array([p for part in parts for p in part.rows.positions], np.int32),
        groups=tuple(
            _group_rows(parts, index, group, block_size) for index, group in enumerate(graph.groups)
        ),
        wants=_wants(parts, num_blocks_of_model),
        embeddings=_embeddings(parts),
        cancel=cancel,
    )
    return Batch(parts, step, cancel, num_blocks_of_model)


def _group_rows(parts: list[Part], index: int, group: LayerGroup, block_size: int) -> GroupRows:
    mask = Mask(window=group.window or 0)
    slots: list[int] = []
    spans: list[Span] = []
    for part in parts:
        table = part.stream.sequence.table
        assert table is not None
        stop = part.start + part.num_rows
        blocks, dropped = table.blocks[index], table.num_dropped[index]
        slots += [
            blocks[entry // block_size - dropped] * block_size + entry % block_size
            for entry in range(part.start, stop)
        ]
        used = -(-stop // block_size) - dropped  # a table may hold more in reserve
        first = dropped * block_size
        segment = Segment(np.array(blocks[:used], np.int32), stop - first, first, mask)
        spans.append(Span(part.first_row, part.num_rows, (segment,)))
    return GroupRows(np.array(slots, np.int64), tuple(spans))


def _wants(parts: list[Part], num_blocks_of_model: int) -> Wants:
    sampled = [p.first_row + at for p in parts if p.num_sampled for at in p.rows.sampled]
    scored: list[int] = []
    hidden: dict[int, list[int]] = {}
    for part in parts:
        rows = [part.first_row + entry - part.start for entry in part.collected]
        if part.stream.collects_logprobs:
            scored += rows
        elif rows:
            hidden.setdefault(hidden_block(part.stream, num_blocks_of_model), []).extend(rows)
    return Wants(
        logits_rows=np.array(sampled + scored, np.int32),
        hidden={block: np.array(rows, np.int32) for block, rows in hidden.items()},
    )


def hidden_block(stream: Stream, num_blocks_of_model: int) -> int:
    request = stream.job.request
    if request.kind is RequestKind.EMBED or request.hidden_block is None:
        return num_blocks_of_model
    return request.hidden_block


def _embeddings(parts: list[Part]) -> tuple[np.ndarray, np.ndarray] | None:
    rows, vectors = [], []
    for part in parts:
        offsets, given = part.stream.sequence.given_rows(part.start, part.start + part.num_rows)
        rows += [part.first_row + offset for offset in offsets]
        vectors += given
    if not rows:
        return None
    return np.array(rows, np.int32), np.stack(vectors)
