"""Weight formats: how a matrix is stored, and what multiplying with it means.

A stored matrix names the kernel that reads it, so that matrices of one model may differ. What a
kernel computes is said twice: natively, and by `round_inputs` and `dequant`, which must agree up to
the order of float32 sums.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from vivace.errors import BadFile
from vivace.registry import Technique
from vivace.techniques.weight_formats import _kernels

__all__ = ["Grid", "Matrix", "Packed", "WeightFormat"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The values a format can hold, and what they cost.

    `group_size` weights along K share a scale of `scale_bits` and a zero point of `zero_bits`;
    None: those of a row. A row takes `row_bits` more, and `outlier_bits` for each weight of the
    share that is stored beside it.
    """

    storage: str  # numpy or ml_dtypes name of an element, or of codes
    bits: float  # of an element
    group_size: int | None = None
    scale_bits: int = 0
    zero_bits: int = 0
    row_bits: int = 0
    outlier_share: float = 0.0
    outlier_bits: int = 0

    def num_outliers(self, in_features: int) -> int:
        """Of a row."""
        return int(self.outlier_share * in_features)

    def bits_per_weight(self, in_features: int) -> float:
        """Exactly what a matrix with rows of `in_features` weights takes, scales included."""
        shared = self.scale_bits + self.zero_bits
        per_row = self.row_bits + self.outlier_bits * self.num_outliers(in_features)
        return self.bits + shared / (self.group_size or in_features) + per_row / in_features


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A stored matrix [out, in].

    `kernel` says how `data` lies and what multiplying with it means, by the names of
    native/src/format.h; `data` are elements [out, in] or bytes, mapped or in memory.
    """

    kernel: str
    shape: tuple[int, int]
    data: np.ndarray

    @property
    def raw(self) -> np.ndarray:
        """The bytes, flat: what native code is given."""
        return self.data.reshape(-1).view(np.uint8)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def __getitem__(self, rows: slice) -> Packed:
        """A view of a range of rows. Raises `BadFile` where rows that lie together are cut."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"a packed matrix is cut by ranges of rows only, not by {rows!r}")
        first, last, _ = rows.indices(self.shape[0])
        if (first, last) == (0, self.shape[0]):
            return self
        unit = _kernels.unit_rows(self.kernel)
        if first % unit or (last % unit and last != self.shape[0]):
            raise BadFile(
                f"rows {first} to {last} of a matrix stored as {self.kernel} cannot be used alone: "
                f"{unit} rows lie together"
            )
        num_units = -(-self.shape[0] // unit)
        raw = self.raw.reshape(num_units, -1)[first // unit : -(-last // unit)]
        return Packed(self.kernel, (last - first, self.shape[1]), raw)


class Matrix(Protocol):
    """A matrix [out, in] of a checkpoint: an array, or blocks that `np.asarray` decodes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class WeightFormat(Technique):
    """Base of the seam."""

    @property
    @abstractmethod
    def grid(self) -> Grid: ...

    @abstractmethod
    def pack(self, weight: Matrix | Packed) -> Packed:
        """Store a matrix [out, in]; what is stored so already stays where it is mapped.

        NaN and infinity in `weight` stay visible as elements or scales: who packs looks for them.

        Raises:
            InvalidOption: a finite weight cannot be stored as a finite one, or rows do not divide.
        """

    def num_bytes(self, weight: Matrix | Packed) -> int:
        """Bytes that `pack` will take, without packing. Raises `InvalidOption` as it does."""
        num_rows, num_columns = weight.shape
        return int(num_rows * num_columns * self.grid.bits_per_weight(num_columns) + 7) // 8

    def round_inputs(self, x: Any, packed: Packed) -> Any:
        """What a linear reads of its input x [N, in] float32, as float32."""
        return _kernels.round_inputs(packed.kernel, x)

    def dequant(self, packed: Packed) -> np.ndarray:
        """The whole matrix [out, in] float32."""
        return _kernels.decode(packed.kernel, packed.shape, packed.data)

    def linear(self, x: Any, packed: Packed) -> Any:
        """x [N, in] float32 times the stored matrix, transposed: [N, out] float32."""
        weight = array_namespace(x).asarray(self.dequant(packed))
        return self.round_inputs(x, packed) @ weight.T
