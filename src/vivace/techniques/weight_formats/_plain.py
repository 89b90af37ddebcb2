"""The family of plain float formats: an element is stored as itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from vivace.errors import BadFile
from vivace.techniques.weight_formats.base import Grid, WeightFormat, widen

__all__ = ["PlainFormat"]


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

    def pack(self, weight: np.ndarray) -> np.ndarray:
        if weight.dtype == self._dtype:
            return weight
        with np.errstate(over="ignore"):
            packed = weight.astype(self._dtype)
        if not np.isfinite(packed.astype(np.float32)).all():
            raise BadFile(
                f"a weight is not finite as {self.storage}: use the format 'float32' or 'bfloat16'"
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
