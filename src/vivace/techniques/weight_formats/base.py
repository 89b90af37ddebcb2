"""Weight formats: how a matrix is stored, and what multiplying with it means.

The arrays follow the Python array API: numpy on a CPU, torch elsewhere. A format states the
arithmetic (`linear`); an executor that has a kernel of the format's `kernel` name runs that kernel
and must give the same result up to the order of float32 sums.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vivace.registry import Technique

__all__ = ["Grid", "Matrix", "WeightFormat", "widen"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The values a format can hold. `group_size` weights along K share what is shared."""

    storage: str  # numpy or ml_dtypes name of an element
    bits_per_weight: float
    group_size: int | None = None  # None: nothing is shared


class Matrix(Protocol):
    """A matrix [out, in] of a checkpoint: an array, or blocks that `np.asarray` decodes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class WeightFormat(Technique):
    """Base of the seam. A packed buffer is opaque to everyone but its format."""

    @property
    @abstractmethod
    def grid(self) -> Grid: ...

    @property
    @abstractmethod
    def kernel(self) -> str:
        """The name under which native code knows this format and its arithmetic."""

    @abstractmethod
    def pack(self, weight: Matrix) -> np.ndarray:
        """Store a matrix [out, in]; returns `weight` itself, still mapped, if it is stored so.

        NaN and infinity in `weight` are kept: who packs looks for them.

        Raises:
            BadFile: a finite weight cannot be stored as a finite one.
        """

    @abstractmethod
    def linear(self, x: Any, buffer: Any) -> Any:
        """x [N, in] float32 times the stored matrix, transposed: [N, out] float32."""

    @abstractmethod
    def rows(self, buffer: Any, index: Any) -> Any:
        """Rows of the stored matrix (embedding lookup): [len(index), in] float32."""

    @abstractmethod
    def dequant(self, buffer: Any) -> Any:
        """The whole matrix [out, in] float32."""


def widen(array: Any) -> Any:
    """To float32, for numpy (with ml_dtypes) and torch alike."""
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()
