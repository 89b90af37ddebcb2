"""Codes that others quantized, laid out for kernels as they are."""

from __future__ import annotations

import math
from typing import Protocol, TypeGuard

import numpy as np

from vivace import _native
from vivace.techniques.weight_formats._kernels import Codes
from vivace.techniques.weight_formats._panels import UNIT_OUTPUTS, pack_panels
from vivace.techniques.weight_formats.base import Matrix, Packed

__all__ = ["Coded", "coded_bytes", "kernel_for_codes", "pack_coded"]

_BITS = (2, 3, 4, 8)
_GROUP_SIZES = (128, 64, 32)
_PIECE_WEIGHTS = 2**20  # packed at a time


class Coded(Matrix, Protocol):
    """A matrix [N, K] of a checkpoint: weight = (code - zero) * scale of its group."""

    bits: int
    group_size: int  # weights along a row; a row where it is as long
    is_in_order: bool  # whether a group's weights lie together

    @property
    def codes(self) -> np.ndarray: ...  # [N, K] uint8
    @property
    def scales(self) -> np.ndarray: ...  # [N, G]
    @property
    def zeros(self) -> np.ndarray | None: ...  # [N, G] uint8; None: all are the middle code


def _is_coded(weight: Matrix | Packed) -> TypeGuard[Coded]:
    return hasattr(weight, "is_in_order")


def kernel_for_codes(weight: Matrix | Packed) -> Codes | None:
    """The kernel that reads a matrix of codes without loss; None: there is none, or no codes.

    Groups that are larger than a kernel's are several of it with the same scale.
    """
    if not _is_coded(weight) or weight.bits not in _BITS or not weight.is_in_order:
        return None
    num_columns, group_size = weight.shape[1], None
    if weight.group_size < num_columns:
        common = math.gcd(weight.group_size, num_columns)
        fitting = [size for size in _GROUP_SIZES if common % size == 0]
        if not fitting:
            return None
        group_size = fitting[0]
    return Codes(weight.bits, group_size, weight.scales.dtype.name, weight.zeros is not None)


def coded_bytes(codes: Codes, shape: tuple[int, ...]) -> int:
    """Bytes that `pack_coded` takes."""
    return _native.matrix_bytes(codes.kernel, *shape)


def pack_coded(weight: Matrix, codes: Codes) -> Packed:
    """The same codes, scales and zeros in panels, a piece of rows at a time."""
    assert _is_coded(weight)
    num_rows, num_columns = weight.shape
    group_size = codes.group_size or num_columns
    # The checkpoint's group of each of the kernel's.
    group_of = np.arange(0, num_columns, group_size) // weight.group_size
    packed = np.empty(coded_bytes(codes, weight.shape), np.uint8)
    units = packed.reshape(-(-num_rows // UNIT_OUTPUTS), -1)
    step = max(1, _PIECE_WEIGHTS // num_columns // UNIT_OUTPUTS) * UNIT_OUTPUTS
    for first in range(0, num_rows, step):
        rows = weight[first : first + step]
        zeros = None if rows.zeros is None else rows.zeros[:, group_of]
        piece = pack_panels(rows.codes, rows.scales[:, group_of], zeros, codes.bits)
        units[first // UNIT_OUTPUTS :][: len(piece)] = piece
    return Packed(codes.kernel, (num_rows, num_columns), packed)
