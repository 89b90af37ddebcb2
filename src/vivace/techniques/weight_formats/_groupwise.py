"""The family of group-wise integers: codes of a few bits, a scale for each group along a row."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from vivace import _native
from vivace.errors import InvalidOption
from vivace.techniques.weight_formats._kernels import Codes
from vivace.techniques.weight_formats._panels import UNIT_OUTPUTS
from vivace.techniques.weight_formats.base import Grid, Matrix, Packed, WeightFormat

__all__ = ["GroupSize", "GroupwiseFormat", "ScaleType", "quantize"]

GroupSize = Literal["row", 32, 64, 128]
ScaleType = Literal["float32", "float16", "bfloat16", "e8m0"]
_PIECE_WEIGHTS = 2**22  # quantized at a time
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SMALLEST_SCALE = np.finfo(np.float32).smallest_normal
_TAKEN_AS_IT_IS = (np.dtype(np.float32), np.dtype(np.float16), _BFLOAT16)


class GroupwiseConfig(Protocol):
    @property
    def group_size(self) -> GroupSize: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def scale_type(self) -> ScaleType: ...


class GroupwiseFormat(WeightFormat):
    """weight = scale * (code - zero), rounded to nearest; inputs are rounded to 8 bits per group.

    The sum of a group is a whole number; one float32 multiply-add per group joins the output's.
    Symmetric: zero is 2^(bits-1), and the weight of largest magnitude gets the code 0 or, where its
    sign is negative under the scale, the scale's sign turns. Otherwise the range from the smallest
    to the largest weight, zero included, is divided evenly.
    """

    bits: int
    config: GroupwiseConfig

    @property
    def codes(self) -> Codes:
        size = self.config.group_size
        group_size = None if size == "row" else size
        return Codes(self.bits, group_size, self.config.scale_type, not self.config.symmetric)

    @property
    def grid(self) -> Grid:
        codes = self.codes
        scale_bits, zero_bits = 8 * codes.scale_dtype.itemsize, 8 * codes.has_zeros
        return Grid(f"int{self.bits}", self.bits, codes.group_size, scale_bits, zero_bits)

    def pack(self, weight: Matrix | Packed) -> Packed:
        codes, (num_rows, num_columns) = self.codes, weight.shape
        kernel = codes.kernel
        if isinstance(weight, Packed):
            if weight.kernel == kernel:
                return weight
            weight = self.dequant(weight)
        packed = Packed(kernel, (num_rows, num_columns), np.empty(self.num_bytes(weight), np.uint8))
        step = max(1, _PIECE_WEIGHTS // num_columns // UNIT_OUTPUTS) * UNIT_OUTPUTS
        for first in range(0, num_rows, step):
            rows = _as_bits(weight[first : first + step])
            if not _native.pack_codes(kernel, rows, packed[first : first + step].raw):
                raise InvalidOption(_not_finite(codes))
        return packed

    def num_bytes(self, weight: Matrix | Packed) -> int:
        codes, (num_rows, num_columns) = self.codes, weight.shape
        if codes.group_size is not None and num_columns % codes.group_size:
            raise InvalidOption(
                f"groups of {codes.group_size} do not divide rows of {num_columns} weights: use a "
                "smaller group_size, or group_size 'row' with int8"
            )
        return _native.matrix_bytes(codes.kernel, num_rows, num_columns)


def _as_bits(rows: Any) -> np.ndarray:
    """Rows of a matrix as the native quantizer reads them, a copy only where that is needed."""
    if not isinstance(rows, np.ndarray) or rows.dtype not in _TAKEN_AS_IT_IS:
        rows = np.asarray(rows, np.float32)
    rows = np.ascontiguousarray(rows)
    return rows.view(np.uint16) if rows.dtype == _BFLOAT16 else rows


def _not_finite(codes: Codes) -> str:
    return f"a scale is not finite as {codes.scale_type}: use scale_type 'bfloat16'"


def quantize(weight: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Round [N, K] float32 to codes [N, K] uint8, scales [N, G] as stored, zeros [N, G] or None.

    The reference of native/src/pack_kernels.cpp. Raises `InvalidOption` if a finite weight needs a
    scale that its type does not hold.
    """
    num_rows, num_columns = weight.shape
    groups = weight.reshape(num_rows, -1, codes.group_size or num_columns)
    high, middle = (1 << codes.bits) - 1, 1 << codes.bits - 1
    lowest, highest = groups.min(-1), groups.max(-1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if codes.has_zeros:
            lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
            wanted = (highest - lowest) / np.float32(high)
        else:
            extreme = np.where(highest > -lowest, highest, lowest)
            wanted = extreme / np.float32(-middle)
        stored, scales = _round_scales(wanted + np.float32(0), codes)  # no zero has a sign
        if not np.isfinite(scales).all() and np.isfinite(weight).all():
            raise InvalidOption(_not_finite(codes))
        # Kernels take a denormal scale for zero.
        inverse = np.where(np.abs(scales) < _SMALLEST_SCALE, np.float32(0), 1 / scales)
        zeros = None
        offset = np.float32(middle)
        if codes.has_zeros:
            offset = np.clip(np.rint(-lowest * inverse), 0, high)
            zeros = np.nan_to_num(offset).astype(np.uint8)
            offset = offset[..., None]
        rounded = np.rint(groups * inverse[..., None]) + offset
        rounded = np.nan_to_num(np.clip(rounded, 0, high)).astype(np.uint8)
    return rounded.reshape(num_rows, num_columns), stored, zeros


def _round_scales(wanted: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Scales as stored, and as the float32 that they mean."""
    if codes.scale_type != "e8m0":
        stored = wanted.astype(codes.scale_dtype)
        return stored, stored.astype(np.float32)
    # The smallest power of two whose largest code reaches the extreme within half a step.
    middle = 1 << codes.bits - 1
    size = np.abs(wanted) * np.float32(1 if codes.has_zeros else middle / (middle - 0.5))
    exponent = np.frexp(size)[1] - (np.frexp(size)[0] == 0.5)
    stored = np.where(size == 0, 0, np.clip(exponent + 127, 1, 255)).astype(np.uint8)
    stored = np.where(np.isfinite(wanted), stored, np.uint8(255))
    means = (stored.astype(np.uint32) << 23).view(np.float32)
    return stored, means
