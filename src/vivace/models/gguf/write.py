"""A loaded model as a GGUF file, which other programs of that format read.

What is written is read back as a graph first: a model that its architecture's keys cannot describe
is refused, not written as something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vivace.blocks import AttentionBlock, ModelGraph, WeightRef, weight_refs
from vivace.errors import UnsupportedModel, nearest
from vivace.models.config import Config
from vivace.models.formats.gguf import GgufFile
from vivace.models.gguf.architectures import ARCHITECTURES
from vivace.models.gguf.metadata_keys import check_says_the_same, model_keys, norms, rope_factors
from vivace.models.gguf.names import stored_as_gguf
from vivace.models.gguf.new_file import (
    NewTensor,
    Storage,
    TypedValue,
    restored,
    typed,
    write_file,
)

__all__ = ["Storage", "copy_gguf", "write_gguf"]

_OF_FAMILY = {
    architecture.model_type.replace("-", "_"): name for name, architecture in ARCHITECTURES.items()
} | {"mistral": "llama", "mixtral": "llama"}
_OF_SPLITS = ("split.no", "split.count", "split.tensors.count")


def write_gguf(
    path: Path,
    graph: ModelGraph,
    weights: Mapping[str, np.ndarray],
    config: Config,
    others: Mapping[str, Any],
    storage: Storage,
) -> None:
    """Write a model; the file appears whole or not at all.

    Args:
        path: of the new file; one that is there is replaced.
        graph: the family's graph, with the names of a checkpoint on the hub.
        weights: its tensors by those names.
        config: its config.
        others: what does not follow from these, such as the keys `tokenizer.*`.
        storage: the type of matrices.
    Raises:
        UnsupportedModel: GGUF has no architecture for the family, or none of its keys says what
            this model does.
        OSError: the file cannot be written.
    """
    name = _OF_FAMILY.get(graph.family)
    if name is None:
        raise UnsupportedModel(
            f"GGUF has no architecture for the family '{graph.family}': "
            f"{nearest(graph.family, _OF_FAMILY)}"
        )
    stored = stored_as_gguf(graph, ARCHITECTURES[name])
    tensors = _Tensors(graph, stored, weights, ARCHITECTURES[name].rotates_pairs)
    keys = model_keys(graph, config)
    factors = rope_factors(graph, keys)
    metadata = {"general.architecture": name, "general.file_type": storage.file_type}
    metadata |= {f"{name}.{key}": value for key, value in keys.items()} | dict(others)
    check_says_the_same(stored, metadata, tensors.shapes, factors)
    new = [
        restored(name, shape, storage, partial(tensors.array, name))
        for name, shape in tensors.shapes.items()
    ]
    new += [NewTensor(name, values.shape, "F32", values.view) for name, values in factors.items()]
    write_file(path, {key: typed(value) for key, value in metadata.items()}, new)


def copy_gguf(path: Path, source: GgufFile, storage: Storage | None) -> None:
    """Write what is in a file, or in all parts of a split, into one file.

    Metadata and the names and shapes of tensors stay as they are; so do the bytes of tensors,
    unless `storage` says how to store them again.

    Raises `UnsupportedModel`, `OSError`.
    """
    metadata = _typed_metadata(source)
    if storage is not None:
        metadata["general.file_type"] = typed(storage.file_type)
    write_file(path, metadata, [_copied(source, name, storage) for name in source.tensors])


def _copied(source: GgufFile, name: str, storage: Storage | None) -> NewTensor:
    info = source.tensors[name]
    is_whole_numbers = info.type.dtype is not None and info.type.dtype.kind == "i"
    if storage is None or is_whole_numbers:
        return NewTensor(name, info.shape, info.type.name, partial(source.raw, name))

    def decoded() -> np.ndarray:
        values = np.asarray(source.array(name)).astype(np.float32)
        return values.reshape(info.shape)

    return restored(name, info.shape, storage, decoded)


def _typed_metadata(source: GgufFile) -> dict[str, TypedValue]:
    """All metadata but those that are about parts of a split."""
    from gguf import GGUFReader

    return {
        key: (field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
        for key, field in GGUFReader(source.path).fields.items()
        if not key.startswith("GGUF.") and key not in _OF_SPLITS
    }


class _Tensors:
    """The tensors of the new file, each made of the model's on demand.

    `shapes` by name; rows of experts are stacked on a leading axis.
    """

    def __init__(
        self,
        graph: ModelGraph,
        stored: ModelGraph,
        weights: Mapping[str, np.ndarray],
        rotates_pairs: bool,
    ) -> None:
        self._weights = weights
        self._head_dims = dict(_rotated(graph)) if rotates_pairs else {}
        self._plus_one = {norm.weight for norm in norms(graph) if norm.unit_offset}
        pieces: dict[str, dict[int, WeightRef]] = {}
        for source, target in zip(weight_refs(graph), weight_refs(stored), strict=True):
            pieces.setdefault(target.name, {})[target.first_row] = source
        self._pieces = {
            name: [ref for _, ref in sorted(refs.items())] for name, refs in pieces.items()
        }
        self.shapes = {name: self._shape(name, refs) for name, refs in self._pieces.items()}

    @staticmethod
    def _shape(name: str, refs: list[WeightRef]) -> tuple[int, ...]:
        if "_exps." in name:
            return (len(refs), *refs[0].shape)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            return refs[0].shape[1:]
        return (sum(ref.shape[0] for ref in refs), *refs[0].shape[1:])

    def array(self, name: str) -> np.ndarray:
        """float32 of the shape in `shapes`."""
        pieces = [self._piece(ref) for ref in self._pieces[name]]
        return np.ascontiguousarray(np.concatenate(pieces).reshape(self.shapes[name]))

    def _piece(self, ref: WeightRef) -> np.ndarray:
        stored = self._weights[ref.name]
        stored = stored.T if ref.is_transposed else stored
        rows = np.asarray(stored[ref.first_row : ref.first_row + ref.shape[0]], np.float32)
        if ref in self._plus_one:
            return rows + np.float32(1)
        head_dim = self._head_dims.get(ref)
        if head_dim is None:
            return rows
        halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)


def _rotated(graph: ModelGraph) -> Iterator[tuple[WeightRef, int]]:
    """Queries and keys, weights and biases, with their head size."""
    for block in graph.blocks:
        if isinstance(block, AttentionBlock):
            for ref in (*block.qkv.parts[:2], *block.qkv.biases[:2]):
                if ref is not None:
                    yield ref, block.head_dim
