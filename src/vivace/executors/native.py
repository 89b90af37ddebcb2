"""The native executor binds a block list to a C++ program once, then runs steps in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vivace import _native
from vivace.blocks import (
    AttentionBlock,
    Block,
    Expert,
    ExpertsBlock,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormSpec,
    Role,
    WeightRef,
    weight_refs,
)
from vivace.errors import BadFile, NativeError, UnsupportedModel
from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.matrices import matrix_formats, matrix_of, not_finite, pack_matrix
from vivace.models.quantized.matrices import QuantizedMatrix
from vivace.models.rope import rope_table
from vivace.techniques.kv_stores.base import KVStore
from vivace.techniques.weight_formats.base import Packed, WeightFormat
from vivace.types import GroupRows, Segment, Step, StepOutput

__all__ = ["NativeExecutor", "Site"]

# site(x): x [N, hidden] float32 is what a block's last linear gave, before the post norm and the
# residual add; it may be edited in place and is gone when the call returns.
Site = Callable[[np.ndarray], None]

Stored = np.ndarray | BlockTensor | QuantizedMatrix | Packed  # a tensor of a checkpoint
_Bound = tuple[Packed, np.ndarray | None]  # a matrix and its bias
_BoundNorm = tuple[np.ndarray, np.ndarray | None]

_FIRST_ROPE_POSITIONS = 4096  # tables grow when a step goes beyond
_NO_CANCEL = np.zeros(1, np.int32)
_NO_BYTES = np.zeros(0, np.uint8)
_NO_FLOATS = np.zeros(0, np.float32)


class NativeExecutor:
    """Runs a `ModelGraph` on a CPU; see `vivace.types.Executor` for the methods' contract.

    Args:
        graph: the block list.
        weights: checkpoint tensors by name, mapped or in memory, as arrays or quantized blocks.
        weight_format: stores the matrices; those stored so already stay mapped.
        role_formats: store those of some roles instead.
        kv_store: stores keys and values.
        threads: number of threads; None: as many as this process may use.
        isa: instruction set, at most what the machine has; None: the best one.
        max_positions: positions that may occur; None: the graph's.
    Raises:
        BadFile: a tensor is missing, of another shape, or not finite.
        InvalidOption: a format cannot store a matrix.
        UnsupportedModel: the graph is only a share of a model.
    """

    merge_entries = 1024  # kChunkEntries of native/src/attention.h

    def __init__(
        self,
        graph: ModelGraph,
        weights: Mapping[str, Stored],
        weight_format: WeightFormat,
        kv_store: KVStore,
        *,
        role_formats: Mapping[Role, WeightFormat] | None = None,
        threads: int | None = None,
        isa: str | None = None,
        max_positions: int | None = None,
    ) -> None:
        if graph.shard.world_size != 1:
            raise UnsupportedModel(
                f"the graph is a share among {graph.shard.world_size} processes: "
                "the native executor runs whole models, shard it to one"
            )
        self.graph = graph
        self.max_positions = graph.max_positions if max_positions is None else max_positions
        self._kv_store = kv_store
        self._program = _native.Program(
            graph.hidden_size, graph.vocab_size, kv_store.kernel, threads, isa
        )
        formats = matrix_formats(graph, weight_format, role_formats)
        self._tensors = _Tensors(graph, weights, formats, self._program)
        self._num_rope_positions = 0
        self._grow_ropes(min(_FIRST_ROPE_POSITIONS, self.max_positions))
        for group in graph.groups:
            self._program.add_group(group.num_layers, group.num_kv_heads, group.head_dim)
        self._bind()
        self._attention_heads = [
            block.num_heads for block in graph.blocks if isinstance(block, AttentionBlock)
        ]

    @property
    def isa(self) -> str:
        return self._program.isa

    @property
    def num_threads(self) -> int:
        return self._program.num_threads

    def set_site(self, block_index: int, site: Site | None) -> None:
        """Call `site` with a block's result from now on; None: call nothing there."""
        self._program.set_site(block_index, site)

    # ------------------------------------------------------------ the cache

    def allocate(self, num_blocks: Sequence[int], block_size: int) -> None:
        self._program.allocate(list(num_blocks), block_size)

    def copy_blocks(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._program.copy_blocks(group, _int32(sources), _int32(targets))

    def read_blocks(self, group: int, block_ids: Sequence[int]) -> np.ndarray:
        return self._program.read_blocks(group, _int32(block_ids))

    def write_blocks(self, group: int, block_ids: Sequence[int], raw: np.ndarray) -> None:
        self._program.write_blocks(group, _int32(block_ids), raw)

    def bytes_per_block(self, group: int, block_size: int) -> int:
        return block_size * self._kv_store.layout(self.graph.groups[group]).bytes_per_token

    def fill_cache(self, byte: int) -> None:
        """Set every byte of the cache; 255 makes every element NaN."""
        self._program.fill_cache(byte)

    # ------------------------------------------------------------ a step

    def forward(self, step: Step) -> StepOutput:
        """Run a step.

        Raises:
            NativeError: the metadata does not fit the model or the cache, or activations overflow.
        """
        wants, positions = step.wants, step.positions
        if len(positions) and self.graph.ropes and positions.max() >= self._num_rope_positions:
            self._grow_ropes(int(positions.max()) + 1)
        num_blocks = len(self.graph.blocks)
        last_block = num_blocks if wants.last_block is None else wants.last_block
        num_logits = len(wants.logits_rows) if last_block == num_blocks else 0
        output = StepOutput(np.empty((num_logits, self.graph.vocab_size), np.float32))
        top = None
        if wants.num_top_logits:
            shape = (num_logits, wants.num_top_logits)
            top = np.empty(shape, np.int32), np.empty(shape, np.float32)
            output.top_ids, output.top_logits = top
        hidden = []
        for index, rows in wants.hidden.items():
            output.hidden[index] = np.empty((len(rows), self.graph.hidden_size), np.float32)
            hidden.append((index, rows, output.hidden[index]))
        sums = None
        if wants.attention_sums:
            sums, output.attention_sums = self._empty_sums(step, wants.first_block, last_block)
        output.is_cancelled = self._program.run(
            step.tokens,
            positions,
            step.embeddings,
            [flatten(group) for group in step.groups],
            wants.logits_rows,
            output.logits,
            hidden,
            top,
            sums,
            wants.first_block,
            last_block,
            _NO_CANCEL if step.cancel is None else step.cancel.array,
        )
        return output

    def _empty_sums(
        self, step: Step, first_block: int, last_block: int
    ) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """One buffer for all sums of a step, and its views per attention block and span."""
        shapes = []
        for block in self.graph.blocks[first_block:last_block]:
            if isinstance(block, AttentionBlock):
                spans = step.groups[block.group].spans
                entries = [sum(segment.num_entries for segment in span.segments) for span in spans]
                shapes.append([(block.num_heads, count) for count in entries])
        buffer = np.zeros(sum(heads * n for row in shapes for heads, n in row), np.float32)
        views, start = [], 0
        for row in shapes:
            views.append([])
            for heads, count in row:
                views[-1].append(buffer[start : start + heads * count].reshape(heads, count))
                start += heads * count
        return buffer, views

    # ------------------------------------------------------------ binding

    def _grow_ropes(self, num_positions: int) -> None:
        if num_positions > self.max_positions:
            raise NativeError(
                f"position {num_positions - 1} is beyond the context of {self.max_positions}"
            )
        num_positions = max(num_positions, min(2 * self._num_rope_positions, self.max_positions))
        for index, spec in enumerate(self.graph.ropes):
            cos, sin = rope_table(spec, num_positions)
            self._program.set_rope(index, cos, sin, spec.is_interleaved)
        self._num_rope_positions = num_positions

    def _bind(self) -> None:
        graph, tensors, program = self.graph, self._tensors, self._program
        embedding = graph.embedding
        positions = embedding.positions
        program.set_embedding(
            tensors.matrix(embedding.weight),
            embedding.scale,
            None if positions is None else tensors.matrix(positions),
        )
        for block in graph.blocks:
            self._bind_block(block)
        head = graph.head
        program.set_head(head, tensors.linear(head.linear), tensors.norm(head.norm))

    def _bind_block(self, block: Block) -> None:
        tensors, program = self._tensors, self._program
        norms = tensors.norm(block.norm), tensors.norm(block.post_norm)
        match block:
            case AttentionBlock():
                program.add_attention(
                    block,
                    tensors.linear(block.qkv),
                    tensors.linear(block.out),
                    *norms,
                    tensors.norm(block.q_norm),
                    tensors.norm(block.k_norm),
                    None if block.sinks is None else tensors.vector(block.sinks),
                )
            case MlpBlock():
                program.add_mlp(
                    block, tensors.linear(block.gate_up), tensors.linear(block.down), *norms
                )
            case LinearBlock():
                program.add_linear(block, tensors.linear(block.linear), *norms)
            case ExpertsBlock():
                program.add_experts(
                    block,
                    tensors.linear(block.router),
                    None if block.shared_gate is None else tensors.linear(block.shared_gate),
                    [tensors.expert(expert) for expert in block.experts],
                    None if block.shared is None else tensors.expert(block.shared),
                    *norms,
                )


class _Tensors:
    """Checkpoint tensors as the program wants them; a matrix used twice is packed once."""

    def __init__(
        self,
        graph: ModelGraph,
        weights: Mapping[str, Stored],
        formats: Mapping[WeightRef, WeightFormat],
        program: _native.Program,
    ) -> None:
        self._weights, self._formats, self._program = weights, formats, program
        self._packed: dict[WeightRef, Packed] = {}
        self._num_rows: dict[str, int] = {}  # rows that the graph uses of a tensor
        for ref in weight_refs(graph):
            end = ref.first_row + ref.shape[0]
            self._num_rows[ref.name] = max(end, self._num_rows.get(ref.name, 0))

    def expert(self, spec: Expert) -> tuple[list[_Bound], list[_Bound]]:
        return self.linear(spec.gate_up), self.linear(spec.down)

    def linear(self, spec: LinearSpec) -> list[_Bound]:
        parts = zip(spec.parts, spec.biases, strict=True)
        return [
            (self.matrix(part), None if bias is None else self.vector(bias)) for part, bias in parts
        ]

    def norm(self, spec: NormSpec | None) -> _BoundNorm | None:
        if spec is None:
            return None
        weight = self.vector(spec.weight)
        bias = None if spec.bias is None else self.vector(spec.bias)
        return (weight + np.float32(1) if spec.unit_offset else weight), bias

    def vector(self, ref: WeightRef) -> np.ndarray:
        vector = np.ascontiguousarray(self._stored(ref), np.float32)
        if not np.isfinite(vector).all():
            raise not_finite(ref.name)
        return vector

    def matrix(self, ref: WeightRef) -> Packed:
        if ref not in self._packed:
            self._packed[ref] = pack_matrix(
                ref.name, self._stored(ref), self._formats[ref], self._program.is_finite
            )
        return self._packed[ref]

    def _stored(self, ref: WeightRef) -> Stored:
        if ref.name not in self._weights:
            raise BadFile(f"the checkpoint has no tensor '{ref.name}': expected {list(ref.shape)}")
        stored = self._weights[ref.name]
        wanted = (self._num_rows[ref.name], *ref.shape[1:])
        is_turned = ref.is_transposed and not isinstance(stored, Packed)
        shape = stored.shape[::-1] if is_turned else stored.shape
        if shape != wanted:
            raise BadFile(
                f"tensor '{ref.name}' has the shape {list(shape)}, "
                f"but the config asks for {list(wanted)}: config and weights do not belong together"
            )
        return matrix_of(self._weights, ref)


def _int32(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, np.int32)


def flatten(rows: GroupRows) -> tuple[np.ndarray, ...]:
    """A group's rows as (slots, spans, segments, block_ids, trees, log_weights).

    Columns of `spans`: first_row, num_rows, num_segments; of `segments`: num_blocks, num_entries,
    shift, then the mask's kind, window, num_sinks, block_size, span_start, span_end, number of
    draft entries (-1: no tree), and whether log-weights follow.
    """
    segments = [segment for span in rows.spans for segment in span.segments]
    spans = [(span.first_row, span.num_rows, len(span.segments)) for span in rows.spans]
    trees = [s.mask.tree for s in segments if s.mask.tree is not None]
    log_weights = [s.log_weights for s in segments if s.log_weights is not None]
    return (
        rows.slots,
        np.array(spans, np.int64).reshape(-1, 3),
        np.array([_segment_row(segment) for segment in segments], np.int64).reshape(-1, 11),
        _joined([segment.block_ids for segment in segments], np.int32),
        _joined([tree.ravel() for tree in trees], np.uint8) if trees else _NO_BYTES,
        _joined(log_weights, np.float32) if log_weights else _NO_FLOATS,
    )


def _segment_row(segment: Segment) -> tuple[int, ...]:
    mask = segment.mask
    return (
        len(segment.block_ids),
        segment.num_entries,
        segment.shift,
        mask.kind,
        mask.window,
        mask.num_sinks,
        mask.block_size,
        mask.span_start,
        mask.span_end,
        -1 if mask.tree is None else mask.tree.shape[1],
        segment.log_weights is not None,
    )


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0], dtype)
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
