"""The torch executor: the block list, plain and differentiable; the truth for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vivace.blocks import (
    Activation,
    AttentionBlock,
    Block,
    Expert,
    ExpertsBlock,
    LayerGroup,
    LinearBlock,
    LinearSpec,
    MlpBlock,
    ModelGraph,
    NormKind,
    NormSpec,
    Role,
    WeightRef,
)
from vivace.errors import UnsupportedModel
from vivace.executors.torch_attention import PagedCache, paged_attend
from vivace.executors.torch_experts import combine_experts
from vivace.models.matrices import matrix_formats, matrix_of
from vivace.models.rope import rope_table
from vivace.techniques.kv_stores.base import KVStore
from vivace.techniques.weight_formats.base import Packed, WeightFormat
from vivace.types import Step, StepOutput

__all__ = ["Attend", "TorchExecutor", "TorchModel", "dense_causal_attend", "to_torch"]

# attend(block, q [N, H, D], k [N, G, D], v [N, G, D]) -> [N, H, D]
Attend = Callable[[AttentionBlock, Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]  # cos and sin of a step's rows


class TorchModel:
    """A `ModelGraph` over torch tensors; attention's core is the caller's `attend`.

    Args:
        graph: the block list.
        weights: checkpoint tensors by name; parameters where gradients are wanted.
    """

    def __init__(self, graph: ModelGraph, weights: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.weights = weights
        device = weights[graph.embedding.weight.name].device
        tables = [rope_table(spec, graph.max_positions) for spec in graph.ropes]
        self.rope_tables = [
            (torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device))
            for cos, sin in tables
        ]

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Embeddings of rows; `token_ids` and `positions` [N] int64 -> [N, hidden]."""
        spec = self.graph.embedding
        hidden = self.rows(spec.weight, token_ids)
        if spec.scale != 1.0:
            hidden = hidden * spec.scale
        if spec.positions is not None:
            hidden = hidden + self.rows(spec.positions, positions)
        return hidden

    def forward(self, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run all blocks over `hidden` [N, hidden] -> [N, hidden], before the final norm."""
        rotations = self.rotations(positions)
        for block in self.graph.blocks:
            hidden = self.run_block(block, hidden, rotations, attend)
        return hidden

    def rotations(self, positions: Tensor) -> list[Rotation]:
        """The rows of every rope table: (cos, sin), each [N, rotary_dim / 2] float32."""
        return [(cos[positions], sin[positions]) for cos, sin in self.rope_tables]

    def run_block(
        self, block: Block, hidden: Tensor, rotations: list[Rotation], attend: Attend
    ) -> Tensor:
        """One block with its norms and its residual: [N, hidden] -> [N, hidden]."""
        x = hidden if block.norm is None else self.norm(block.norm, hidden)
        match block:
            case AttentionBlock():
                x = self._attention(block, x, rotations, attend)
            case MlpBlock():
                x = self._mlp(block, block.activation, x)
            case LinearBlock():
                (x,) = self._linears(block.linear, x)
            case ExpertsBlock():
                x = self._experts(block, x)
        if block.post_norm is not None:
            x = self.norm(block.post_norm, x)
        return hidden + (x if block.residual_scale == 1.0 else x * block.residual_scale)

    def final_norm(self, hidden: Tensor) -> Tensor:
        spec = self.graph.head.norm
        return hidden if spec is None else self.norm(spec, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of rows before the final norm: [N, hidden] -> [N, vocab_size]."""
        head = self.graph.head
        logits = torch.cat(self._linears(head.linear, self.final_norm(hidden)), dim=-1)
        if head.soft_cap is not None:
            logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
        return logits if head.scale == 1.0 else logits * head.scale

    def linear(self, x: Tensor, ref: WeightRef) -> Tensor:
        """x [N, in] times a matrix of the checkpoint: [N, out]."""
        return functional.linear(x, self.weight(ref))

    def rows(self, ref: WeightRef, index: Tensor) -> Tensor:
        """Rows of a matrix of the checkpoint: [len(index), in]."""
        return functional.embedding(index, self.weight(ref))

    def weight(self, ref: WeightRef) -> Tensor:
        """The unit of weights that `ref` names, of shape `ref.shape`."""
        weight = self.weights[ref.name]
        if ref.is_transposed:
            weight = weight.T
        return weight[ref.first_row : ref.first_row + ref.shape[0]]

    def norm(self, spec: NormSpec, x: Tensor) -> Tensor:
        x = x.float()
        weight = self.weight(spec.weight)
        if spec.unit_offset:
            weight = weight + 1
        if spec.kind is NormKind.LAYER:
            bias = None if spec.bias is None else self.weight(spec.bias)
            return functional.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps) * weight

    def _attention(
        self,
        block: AttentionBlock,
        x: Tensor,
        rotations: list[Rotation],
        attend: Attend,
    ) -> Tensor:
        q, k, v = self._linears(block.qkv, x)
        q = self._heads(block.q_norm, q, block.num_heads)
        k = self._heads(block.k_norm, k, block.num_kv_heads)
        v = self._heads(None, v, block.num_kv_heads)
        if block.rope is not None:
            is_interleaved = self.graph.ropes[block.rope].is_interleaved
            q = _rotate(q, *rotations[block.rope], is_interleaved)
            k = _rotate(k, *rotations[block.rope], is_interleaved)
        (out,) = self._linears(block.out, attend(block, q, k, v).flatten(1))
        return out

    def _mlp(self, spec: MlpBlock | Expert, activation: Activation, x: Tensor) -> Tensor:
        parts = self._linears(spec.gate_up, x)
        inner = _activate(activation, parts[0])
        (out,) = self._linears(spec.down, inner * parts[1] if spec.is_gated else inner)
        return out

    def _experts(self, block: ExpertsBlock, x: Tensor) -> Tensor:
        def run(expert: Expert, rows: Tensor) -> Tensor:
            return self._mlp(expert, block.activation, rows)

        (logits,) = self._linears(block.router, x)
        out = combine_experts(block, x, logits, run)
        if block.shared is None:
            return out
        shared = run(block.shared, x)
        if block.shared_gate is not None:
            (gate,) = self._linears(block.shared_gate, x)
            shared = torch.sigmoid(gate) * shared
        return out + shared

    def _heads(self, spec: NormSpec | None, x: Tensor, num_heads: int) -> Tensor:
        """Split into heads: [N, heads * D] -> [N, heads, D], with a norm per head or over all."""
        is_per_head = spec is not None and spec.weight.shape[0] * num_heads == x.shape[-1]
        if spec is not None and not is_per_head:
            x = self.norm(spec, x)
        x = x.unflatten(-1, (num_heads, -1))
        return self.norm(spec, x) if spec is not None and is_per_head else x

    def _linears(self, spec: LinearSpec, x: Tensor) -> list[Tensor]:
        """The outputs of a group of linears, one tensor [N, out] per part."""
        return [
            self.linear(x, part) if bias is None else self.linear(x, part) + self.weight(bias)
            for part, bias in zip(spec.parts, spec.biases, strict=True)
        ]


class TorchExecutor:
    """Runs engine steps in torch with a paged cache: slow, plain, the truth for tests.

    Args:
        graph: the block list.
        weights: checkpoint tensors by name, as numpy arrays (bfloat16 from ml_dtypes).
        weight_format: the arithmetic of matrices.
        kv_store: how keys and values are stored.
        role_formats: the arithmetic of matrices of some roles instead.
    """

    merge_entries = 1

    def __init__(
        self,
        graph: ModelGraph,
        weights: Mapping[str, np.ndarray],
        weight_format: WeightFormat,
        kv_store: KVStore,
        role_formats: Mapping[Role, WeightFormat] | None = None,
    ) -> None:
        if graph.shard.world_size != 1:
            raise UnsupportedModel(
                f"the graph is a share among {graph.shard.world_size} processes: "
                "the torch executor runs whole models, shard it to one"
            )
        self.graph = graph
        self.kv_store = kv_store
        formats = matrix_formats(graph, weight_format, role_formats)
        self.model = _PackedModel(graph, weights, formats)
        self.caches: list[PagedCache] = []

    def allocate(self, num_blocks: Sequence[int], block_size: int) -> None:
        """(Re)allocate the cache: `num_blocks[g]` blocks for layer group g."""
        self.caches = [
            PagedCache(group, num, block_size, self._dtype(group))
            for group, num in zip(self.graph.groups, num_blocks, strict=True)
        ]

    def bytes_per_block(self, group: int, block_size: int) -> int:
        return block_size * self.kv_store.layout(self.graph.groups[group]).bytes_per_token

    def copy_blocks(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.caches[group].copy(sources, targets)

    def read_blocks(self, group: int, block_ids: Sequence[int]) -> np.ndarray:
        return self.caches[group].raw()[list(block_ids)].numpy()

    def write_blocks(self, group: int, block_ids: Sequence[int], raw: np.ndarray) -> None:
        self.caches[group].raw()[list(block_ids)] = torch.from_numpy(raw)

    @torch.no_grad()
    def forward(self, step: Step) -> StepOutput:
        """One step; a cancelled one returns no logits and leaves its cache writes behind."""
        wants, blocks = step.wants, self.graph.blocks
        last = len(blocks) if wants.last_block is None else wants.last_block
        positions = torch.from_numpy(step.positions.astype(np.int64))
        hidden = self._first_hidden(step, positions)
        rotations = self.model.rotations(positions)
        output = StepOutput(np.zeros((0, self.graph.vocab_size), np.float32))
        output.attention_sums = [] if wants.attention_sums else None
        attend = self._paged_attend(step, output.attention_sums)
        for index in range(wants.first_block, last):
            if step.cancel is not None and step.cancel.is_set():
                output.is_cancelled = True
                return output
            hidden = self.model.run_block(blocks[index], hidden, rotations, attend)
            if index in wants.hidden:
                output.hidden[index] = hidden[_rows(wants.hidden[index])].numpy()
        if last < len(blocks):
            return output
        if len(blocks) in wants.hidden:
            rows = _rows(wants.hidden[len(blocks)])
            output.hidden[len(blocks)] = self.model.final_norm(hidden[rows]).numpy()
        logits = self.model.logits(hidden[_rows(wants.logits_rows)])
        output.logits = logits.numpy()
        if wants.num_top_logits:
            top, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
            output.top_ids = ids[:, : wants.num_top_logits].to(torch.int32).numpy()
            output.top_logits = top[:, : wants.num_top_logits].numpy()
        return output

    def _first_hidden(self, step: Step, positions: Tensor) -> Tensor:
        """Embeddings of the rows' tokens; rows that bring their own keep them unscaled."""
        token_ids = torch.from_numpy(step.tokens.astype(np.int64))
        if step.embeddings is None:
            return self.model.embed(token_ids, positions)
        rows, given = step.embeddings
        token_ids[_rows(rows)] = 0  # such a row's token means nothing
        hidden = self.model.embed(token_ids, positions)
        hidden[_rows(rows)] = torch.from_numpy(np.asarray(given, np.float32))
        return hidden

    def _paged_attend(self, step: Step, sums: list[list[np.ndarray]] | None) -> Attend:
        slots = [torch.from_numpy(rows.slots.astype(np.int64)) for rows in step.groups]

        def attend(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache, rows = self.caches[block.group], step.groups[block.group]
            cache.write(block.cache_layer, slots[block.group], k, v)
            sinks = None if block.sinks is None else self.model.weight(block.sinks)
            of_spans: list[np.ndarray] | None = None if sums is None else []
            out = paged_attend(block, q, cache, rows, step.positions, sinks, of_spans)
            if sums is not None and of_spans is not None:
                sums.append(of_spans)
            return out

        return attend

    def _dtype(self, group: LayerGroup) -> torch.dtype:
        return getattr(torch, self.kv_store.layout(group).dtype)


class _PackedModel(TorchModel):
    """The block list over matrices in a weight format; norms, biases and sinks stay float32."""

    def __init__(
        self,
        graph: ModelGraph,
        weights: Mapping[str, np.ndarray],
        formats: Mapping[WeightRef, WeightFormat],
    ) -> None:
        self.formats = formats
        vectors = {n: to_torch(w).float() for n, w in weights.items() if w.ndim == 1}
        matrices = {n: to_torch(w) for n, w in weights.items() if w.ndim == 2}
        super().__init__(graph, matrices | vectors)
        self.arrays = weights
        self.packed: dict[WeightRef, tuple[Packed, Tensor]] = {}

    def linear(self, x: Tensor, ref: WeightRef) -> Tensor:
        packed, weight = self._pack(ref)
        return functional.linear(self.formats[ref].round_inputs(x, packed), weight)

    def rows(self, ref: WeightRef, index: Tensor) -> Tensor:
        return functional.embedding(index, self._pack(ref)[1])

    def _pack(self, ref: WeightRef) -> tuple[Packed, Tensor]:
        """A matrix as it is stored, and what it means."""
        if ref not in self.packed:
            packed = self.formats[ref].pack(matrix_of(self.arrays, ref))
            self.packed[ref] = packed, to_torch(self.formats[ref].dequant(packed))
        return self.packed[ref]


def to_torch(array: np.ndarray) -> Tensor:
    """A tensor over an array, without a copy where it may be written; knows bfloat16."""
    array = np.asarray(array)  # decodes quantized blocks
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _rows(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(rows, np.int64))


def dense_causal_attend(batch_size: int) -> Attend:
    """Causal attention for `batch_size` sequences of equal length, without a cache."""

    def attend(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if block.soft_cap is not None or block.sinks is not None:
            raise UnsupportedModel(
                "dense attention has no soft cap and no sinks: run the model through the executor"
            )
        q, k, v = (x.unflatten(0, (batch_size, -1)).transpose(1, 2) for x in (q, k, v))
        groups = block.num_heads // block.num_kv_heads
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v.to(q.dtype), is_causal=True, scale=block.scale
        )
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    """Rotate pairs of each head: x [N, heads, D], cos and sin [N, rotary_dim / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if is_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _activate(activation: Activation, x: Tensor) -> Tensor:
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)
