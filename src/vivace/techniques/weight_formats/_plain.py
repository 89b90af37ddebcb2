"""The family of plain float formats: an element is stored as itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from vivace.errors import BadFile
from vivace.techniques.weight_formats.base import Grid, Matrix, WeightFormat, widen

__all__ = ["PlainFormat"]

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

    @property
    def kernel(self) -> str:
        return self.storage if self.rounds_inputs else f"{self.storage}_float32"

    def pack(self, weight: Matrix) -> np.ndarray:
        if isinstance(weight, np.ndarray) and weight.dtype == self._dtype:
            return weight
        packed = np.empty(weight.shape, self._dtype)
        num_rows = max(1, _PIECE_WEIGHTS // max(1, weight.shape[1]))
        for first in range(0, len(packed), num_rows):
            rows, piece = weight[first : first + num_rows], packed[first : first + num_rows]
            with np.errstate(over="ignore"):
                piece[...] = np.asarray(rows, self._dtype)
            if not _is_finite(piece) and _is_finite(np.asarray(rows, np.float32)):
                raise BadFile(
                    f"a weight is not finite as {self.storage}: "
                    "use the format 'float32' or 'bfloat16'"
                )
        return packed

    def linear(self, x: Any, buffer: Any) -> Any:
        if self.rounds_inputs:
            x = widen(self._round(x))
        return x @ widen(buffer).T

    def _round(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return x.astype(self._dtype)
        xp = array_namespace(x)
        return xp.astype(x, getattr(xp, self.storage))

    def rows(self, buffer: Any, index: Any) -> Any:
        return widen(buffer[index])

    def dequant(self, buffer: Any) -> Any:
        return widen(buffer)


def _is_finite(array: np.ndarray) -> bool:
    """Whether no exponent is all ones; compares the bits without their sign."""
    unsigned = np.dtype(f"u{array.itemsize}")
    sign = unsigned.type(1 << 8 * array.itemsize - 1)
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    return bool((array.view(unsigned) & ~sign).max(initial=0) < infinity)
