"""Each row's weights as codes into a table of its own, and its outliers as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from vivace.errors import InvalidOption
from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._tables import Codebook as Kernel
from vivace.techniques.weight_formats.base import Grid, Matrix, Packed, WeightFormat

INFO = TechniqueInfo(
    summary="a table of 8 or 16 values per row by k-means, outliers stored beside it",
    papers=("P135",),
)
_PIECE_WEIGHTS = 2**20  # quantized at a time
_MAX_COLUMNS = 2**16  # an outlier's column is stored in 16 bits


@dataclass(frozen=True)
class Config:
    bits: Literal[3, 4] = 4
    outlier_share: float = 0.0045
    max_iterations: int = 50


class Codebook(WeightFormat):
    """Clusters a row's weights and stores the nearest centroid's number, as bfloat16 values.

    The largest weights of a row are left out of the clusters and stored with their columns.
    Paper: SqueezeLLM, Kim et al. 2023, 2306.07629 (P135), dense and sparse, section 4.
    Differs: as many outliers in every row, so that rows are of equal size; samples of k-means are
        not weighted by gradients; centroids and outliers are bfloat16.
    Cost: bits + 16 * 2^bits / K for the table + 32 per outlier; packing sorts each row.
    Args:
        bits: of a code: 3 or 4.
        outlier_share: share of a row's weights, 0 to 0.1, rounded down to a whole number of them.
        max_iterations: steps of k-means, at least 1; it stops where nothing moves.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.outlier_share <= 0.1:
            raise InvalidOption(
                f"option 'outlier_share' is {config.outlier_share}: expected a number from 0 to 0.1"
            )
        if config.max_iterations < 1:
            raise InvalidOption(
                f"option 'max_iterations' is {config.max_iterations}: expected at least 1"
            )

    @property
    def grid(self) -> Grid:
        bits, share = self.config.bits, self.config.outlier_share
        return Grid("codebook", bits, row_bits=16 << bits, outlier_share=share, outlier_bits=32)

    def num_bytes(self, weight: Matrix | Packed) -> int:
        num_rows, num_columns = weight.shape
        return num_rows * self._kernel(num_columns).row_bytes(num_columns)

    def _kernel(self, num_columns: int) -> Kernel:
        kernel = Kernel(self.config.bits, self.grid.num_outliers(num_columns))
        if num_columns > _MAX_COLUMNS and kernel.num_outliers:
            raise InvalidOption(
                f"rows of {num_columns} weights are too long for outliers: expected at most "
                f"{_MAX_COLUMNS}, use outlier_share 0"
            )
        return kernel

    def pack(self, weight: Matrix | Packed) -> Packed:
        num_rows, num_columns = weight.shape
        kernel = self._kernel(num_columns)
        if isinstance(weight, Packed):
            if weight.kernel == kernel.kernel:
                return weight
            weight = self.dequant(weight)
        data = np.empty((num_rows, kernel.row_bytes(num_columns)), np.uint8)
        step = max(1, _PIECE_WEIGHTS // num_columns)
        for first in range(0, num_rows, step):
            rows = np.asarray(weight[first : first + step], np.float32)
            with np.errstate(invalid="ignore", over="ignore"):
                parts = cluster_rows(rows, kernel, self.config.max_iterations)
            data[first : first + step] = kernel.pack(*parts)
        return Packed(kernel.kernel, (num_rows, num_columns), data)


def cluster_rows(
    weight: np.ndarray, kernel: Kernel, max_iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tables [N, 2^bits], codes [N, K], columns [N, n] and values [N, n] of outliers of [N, K].

    A NaN or infinite weight is an outlier or makes a table of its kind.
    """
    columns = _outlier_columns(weight, kernel.num_outliers)
    is_inside = np.ones(weight.shape, bool)
    np.put_along_axis(is_inside, columns, False, axis=1)
    ranked = np.sort(weight[is_inside].reshape(len(weight), -1), axis=1)
    table = _centroids(ranked, 1 << kernel.bits, max_iterations)
    codes = np.zeros(weight.shape, np.uint8)
    for middle in _middles(table).T:
        codes += ~(weight <= middle[:, None])  # NaN is above all
    np.put_along_axis(codes, columns, 0, axis=1)
    return table, codes, columns, np.take_along_axis(weight, columns, axis=1)


def _outlier_columns(weight: np.ndarray, count: int) -> np.ndarray:
    """Where the largest magnitudes of each row are, NaN above all: [N, count], rising."""
    num_columns = weight.shape[1]
    magnitudes = (weight.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.uint64)
    keys = magnitudes << np.uint64(32) | np.arange(num_columns, dtype=np.uint64)  # no two alike
    inside = num_columns - count
    largest = np.argpartition(keys, min(inside, num_columns - 1), axis=1)[:, inside:]
    return np.sort(largest, axis=1)


def _centroids(ranked: np.ndarray, count: int, max_iterations: int) -> np.ndarray:
    """Lloyd's k-means of each sorted row [N, n]: [N, count] as bfloat16.

    It starts where levels of least error lie for many weights: as dense as the cube root of the
    weights' density (Panter and Dite 1951), whose inverse is the gap between neighbours.
    """
    num_rows, size = ranked.shape
    gaps = np.diff(ranked, axis=1, prepend=ranked[:, :1]).astype(np.float64)
    share = np.cumsum(np.cbrt(np.square(gaps)), axis=1)
    places = (np.arange(count) + 0.5) / count
    starts = _count(np.less, share, places * share[:, -1:])
    centers = np.take_along_axis(ranked, np.minimum(starts, size - 1), axis=1).astype(np.float64)
    sums = np.concatenate([np.zeros((num_rows, 1)), np.cumsum(ranked, axis=1, dtype=float)], axis=1)
    for _ in range(max_iterations):
        ends = _count(np.less_equal, ranked, _middles(centers))
        bounds = np.concatenate(
            [np.zeros((num_rows, 1), int), ends, np.full((num_rows, 1), size)], axis=1
        )
        counts = np.diff(bounds, axis=1)
        totals = np.diff(np.take_along_axis(sums, bounds, axis=1), axis=1)
        moved = np.where(counts > 0, totals / np.maximum(counts, 1), centers)
        if np.array_equal(moved, centers, equal_nan=True):
            break
        centers = moved
    return np.sort(centers, axis=1).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def _middles(centers: np.ndarray) -> np.ndarray:
    """Where the cells of sorted centers [N, count] end: [N, count - 1]."""
    return (centers[:, 1:] + centers[:, :-1]) / 2


def _count(is_below: np.ufunc, ranked: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many values of a sorted row [N, n] are below each of its bounds [N, m], by bisection."""
    low = np.zeros(bounds.shape, np.intp)
    high = np.full(bounds.shape, ranked.shape[1])
    for _ in range(ranked.shape[1].bit_length()):
        middle = (low + high) // 2  # n where nothing is left to compare
        value = np.take_along_axis(ranked, np.minimum(middle, ranked.shape[1] - 1), axis=1)
        is_right = is_below(value, bounds) & (middle < high)
        low, high = np.where(is_right, middle + 1, low), np.where(is_right, high, middle)
    return low
