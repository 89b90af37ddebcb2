"""The matrices of a checkpoint: the format of each, what it takes, and packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vivace import _native
from vivace.blocks import ModelGraph, Role, WeightRef, matrix_roles
from vivace.errors import BadFile, InvalidOption
from vivace.techniques.weight_formats.base import Matrix, Packed, WeightFormat

__all__ = ["matrix_formats", "matrix_of", "not_finite", "pack_matrix", "packed_bytes"]


def matrix_of(weights: Mapping[str, Any], ref: WeightRef) -> Any:
    """The matrix [out, in] that `ref` names among a checkpoint's tensors."""
    stored = weights[ref.name]
    if ref.is_transposed and not isinstance(stored, Packed):  # which lies upright
        stored = stored.T
    return stored[ref.first_row : ref.first_row + ref.shape[0]]


def matrix_formats(
    graph: ModelGraph, body: WeightFormat, role_formats: Mapping[Role, WeightFormat] | None
) -> dict[WeightRef, WeightFormat]:
    """The format of every matrix: its role's own, else the body's."""
    own = role_formats or {}
    return {ref: own.get(role, body) for ref, role in matrix_roles(graph).items()}


def packed_bytes(weights: Mapping[str, Any], formats: Mapping[WeightRef, WeightFormat]) -> int:
    """Bytes of a checkpoint's matrices as their formats will store them. Raises `InvalidOption`."""
    num_bytes = 0
    for ref, weight_format in formats.items():
        with _named(ref.name):
            num_bytes += weight_format.num_bytes(matrix_of(weights, ref))
    return num_bytes


def pack_matrix(
    name: str,
    weight: Matrix | Packed,
    weight_format: WeightFormat,
    is_finite: Callable[[Packed], bool] = _native.is_finite,
) -> Packed:
    """Store the matrix of a tensor. Raises `InvalidOption`, `BadFile` if it is not finite."""
    with _named(name):
        packed = weight_format.pack(weight)
    if not is_finite(packed):
        raise not_finite(name)
    return packed


def not_finite(name: str) -> BadFile:
    return BadFile(f"tensor '{name}' holds NaN or infinity: the file is damaged, fetch it again")


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (BadFile, InvalidOption) as error:
        raise type(error)(f"tensor '{name}': {error}") from error
