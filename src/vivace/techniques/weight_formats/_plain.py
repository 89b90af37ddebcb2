"""The family of plain float formats: an element is stored as itself."""

from __future__ import annotations

from abc import abstractmethod

import ml_dtypes
import numpy as np

from vivace.errors import InvalidOption
from vivace.techniques.weight_formats.base import Grid, Matrix, Packed, WeightFormat

__all__ = ["PlainFormat", "convert"]

_PIECE_WEIGHTS = 2**20  # converted at a time, so that no second copy of a matrix is made


class PlainFormat(WeightFormat):
    """Elements of one float type; inputs are rounded to it first unless told otherwise."""

    storage: str

    @property
    def grid(self) -> Grid:
        return Grid(self.storage, 8 * self._dtype.itemsize)

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(getattr(ml_dtypes, self.storage, self.storage))

    @property
    @abstractmethod
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded to the storage type before they are multiplied."""

    def pack(self, weight: Matrix | Packed) -> Packed:
        kernel = self.storage if self.rounds_inputs else f"{self.storage}_float32"
        if isinstance(weight, Packed):
            if weight.kernel == kernel:
                return weight
            weight = self.dequant(weight)
        return Packed(kernel, (weight.shape[0], weight.shape[1]), convert(weight, self._dtype))


def convert(weight: Matrix, dtype: np.dtype) -> np.ndarray:
    """A matrix as elements of a float type; itself if it is that already.

    Raises `InvalidOption` if a finite weight would become infinite.
    """
    if isinstance(weight, np.ndarray) and weight.dtype == dtype:
        return np.ascontiguousarray(weight)
    packed = np.empty(weight.shape, dtype)
    num_rows = max(1, _PIECE_WEIGHTS // max(1, weight.shape[1]))
    for first in range(0, len(packed), num_rows):
        rows, piece = weight[first : first + num_rows], packed[first : first + num_rows]
        with np.errstate(over="ignore"):
            piece[...] = np.asarray(rows, dtype)
        if not _is_finite(piece) and _is_finite(np.asarray(rows, np.float32)):
            raise InvalidOption(
                f"a weight is not finite as {dtype}: use the format 'float32' or 'bfloat16'"
            )
    return packed


def _is_finite(array: np.ndarray) -> bool:
    """Whether no exponent is all ones; compares the bits without their sign."""
    unsigned = np.dtype(f"u{array.itemsize}")
    sign = unsigned.type(1 << 8 * array.itemsize - 1)
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    return bool((array.view(unsigned) & ~sign).max(initial=0) < infinity)
