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
    num_rows, num_columns = weight.shape
    by_size = np.argsort(np.abs(weight), axis=1, kind="stable")  # NaN last
    num_inside = num_columns - kernel.num_outliers
    columns = np.sort(by_size[:, num_inside:], axis=1)
    inside = np.sort(by_size[:, :num_inside], axis=1)
    values = np.take_along_axis(weight, inside, axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    table = _centroids(ranked, 1 << kernel.bits, max_iterations)
    ends = _ends(ranked, table)
    ranks = np.arange(num_inside)
    codes_of_ranks = np.zeros((num_rows, num_inside), np.uint8)
    for end in ends.T:
        codes_of_ranks += ranks >= end[:, None]
    codes = np.zeros((num_rows, num_columns), np.uint8)
    places = np.take_along_axis(inside, order, axis=1)
    np.put_along_axis(codes, places, codes_of_ranks, axis=1)
    return table, codes, columns, np.take_along_axis(weight, columns, axis=1)


def _centroids(ranked: np.ndarray, count: int, max_iterations: int) -> np.ndarray:
    """Lloyd's k-means of each sorted row [N, n]: [N, count] as bfloat16.

    It starts where levels of least error lie for many weights: as dense as the cube root of the
    weights' density (Panter and Dite 1951), whose inverse is the gap between neighbours.
    """
    num_rows, size = ranked.shape
    gaps = np.diff(ranked, axis=1, prepend=ranked[:, :1]).astype(np.float64)
    share = np.cumsum(np.cbrt(np.square(gaps)), axis=1)
    places = (np.arange(count) + 0.5) / count
    starts = [np.searchsorted(row, places * row[-1]) for row in share]
    centers = np.take_along_axis(ranked, np.minimum(starts, size - 1), axis=1).astype(np.float64)
    sums = np.concatenate([np.zeros((num_rows, 1)), np.cumsum(ranked, axis=1, dtype=float)], axis=1)
    for _ in range(max_iterations):
        ends = _ends(ranked, centers)
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


def _ends(ranked: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Where in a sorted row the cells of sorted centers end: [N, count - 1] ranks."""
    middles = (centers[:, 1:] + centers[:, :-1]) / 2
    return np.stack(
        [
            np.searchsorted(row, middle, side="right")
            for row, middle in zip(ranked, middles, strict=True)
        ]
    )
