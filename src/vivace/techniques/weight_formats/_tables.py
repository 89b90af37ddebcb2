"""Tables of values: codes looked up and scaled, rows that lie one after another in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from vivace.errors import BadFile

__all__ = ["FLOAT_TYPES", "STEP", "Codebook", "TableKernel", "flush", "pack_codes", "unpack_codes"]

STEP = 32  # weights whose codes lie together
# What small floats decode to; a type of 8 bits has codes of NaN.
FLOAT_TYPES = {
    "e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
    "e2m3": np.dtype(ml_dtypes.float6_e2m3fn),
    "e3m2": np.dtype(ml_dtypes.float6_e3m2fn),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_SCALE_TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "e8m0": np.dtype(np.uint8),  # 2^(byte - 127), the byte 0 is zero
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),  # times a float32 of the row
}
_BITS = {8: 3, 16: 4, 64: 6, 256: 8}
_TINY = np.float32(2.0**-126)  # magnitudes below are zero in native code


def flush(x: Any) -> np.ndarray:
    """Float32 without denormals, as native code has them."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


@dataclass(frozen=True, slots=True)
class TableKernel:
    """The name of a kernel for scaled tables, taken apart: see native/src/format.h.

    weight = bfloat16(value of its code * scale of its group).
    """

    values: str  # a key of FLOAT_TYPES, or 8, 16 or 64 numbers with commas between
    group_size: int | None  # None: a row
    scale_type: str
    is_signed: bool = False  # a second scale for values below zero

    @staticmethod
    def parse(kernel: str) -> TableKernel:
        _, values, group, scale_type, *signed = kernel.split("/")
        size = None if group == "row" else int(group)
        return TableKernel(values, size, scale_type, signed == ["signed"])

    @property
    def kernel(self) -> str:
        group = "row" if self.group_size is None else str(self.group_size)
        signed = ("signed",) if self.is_signed else ()
        return "/".join(("table", self.values, group, self.scale_type, *signed))

    @property
    def table(self) -> np.ndarray:
        """The value of each code: [2^bits] float32."""
        dtype = FLOAT_TYPES.get(self.values)
        if dtype is None:
            try:
                return np.array([float(value) for value in self.values.split(",")], np.float32)
            except ValueError as error:
                raise BadFile(f"'{self.values[:40]}' is no table of values: {error}") from error
        bits = {"e2m1": 4, "e2m3": 6, "e3m2": 6}.get(self.values, 8)
        return np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(np.float32)

    @property
    def largest(self) -> np.float32:
        """The largest finite value."""
        return self.table[np.isfinite(self.table)].max()

    @property
    def lowest(self) -> np.float32:
        """The lowest finite value, below zero."""
        return self.table[np.isfinite(self.table)].min()

    @property
    def bits(self) -> int:
        return _BITS[len(self.table)]

    @property
    def scale_dtype(self) -> np.dtype:
        return _SCALE_TYPES[self.scale_type]

    @property
    def has_factor(self) -> bool:
        return self.scale_type == "e4m3"

    def row_bytes(self, num_columns: int) -> int:
        scales, steps = self._block(num_columns)
        blocks = -(-num_columns // (steps * STEP))
        block = scales * self.scale_dtype.itemsize + steps * STEP * self.bits // 8
        return 4 * self.has_factor + blocks * block

    def _block(self, num_columns: int) -> tuple[int, int]:
        """Scales and steps of the part of a row that lies together."""
        group_size = self.group_size or -(-num_columns // STEP) * STEP
        scales = (2 if self.is_signed else 1) * max(1, STEP // group_size)
        return scales, max(group_size, STEP) // STEP

    def pack(self, codes: np.ndarray, scales: np.ndarray, factor: np.float32) -> np.ndarray:
        """Rows [N, bytes] of codes [N, K] uint8, scales as stored [N, G * scales of a group]."""
        num_rows, num_columns = codes.shape
        per_block, steps = self._block(num_columns)
        packed = pack_codes(codes, self.bits).reshape(num_rows, -1, steps * STEP * self.bits // 8)
        stored = np.ascontiguousarray(scales).view(np.uint8)
        stored = stored.reshape(num_rows, -1, per_block * self.scale_dtype.itemsize)
        rows = np.concatenate([stored, packed], axis=2).reshape(num_rows, -1)
        if not self.has_factor:
            return rows
        head = np.full((num_rows, 1), factor, np.float32).view(np.uint8)
        return np.concatenate([head, rows], axis=1)

    def scales_of(self, stored: np.ndarray, factor: Any) -> np.ndarray:
        """What stored scales mean, float32; `factor` is read if it has one."""
        if self.scale_type == "e8m0":
            return (stored.astype(np.uint32) << 23).view(np.float32)
        scales = stored.astype(np.float32)
        return flush(scales * flush(factor)) if self.has_factor else flush(scales)

    def decode(self, data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The weights [out, in] float32."""
        num_rows, num_columns = shape
        per_block, steps = self._block(num_columns)
        rows = data.reshape(num_rows, -1)
        head, rows = rows[:, : 4 * self.has_factor], rows[:, 4 * self.has_factor :]
        factor = np.ascontiguousarray(head).view(np.float32)[..., None] if self.has_factor else None
        scale_bytes = per_block * self.scale_dtype.itemsize
        blocks = rows.reshape(num_rows, -1, scale_bytes + steps * STEP * self.bits // 8)
        stored = np.ascontiguousarray(blocks[..., :scale_bytes]).view(self.scale_dtype)
        scales = self.scales_of(stored, factor)
        codes = unpack_codes(np.ascontiguousarray(blocks[..., scale_bytes:]), self.bits)
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.table[codes]  # [N, blocks, weights of a block]
            if self.is_signed:
                scales = np.where(values < 0, scales[..., 1:], scales[..., :1])
            else:
                scales = np.repeat(scales, values.shape[-1] // per_block, axis=-1)
            weights = flush(values * scales).reshape(num_rows, -1)[:, :num_columns]
            return weights.astype(ml_dtypes.bfloat16).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Codebook:
    """The name of a kernel for a table per row, and outliers stored beside the codes."""

    bits: int
    num_outliers: int

    @staticmethod
    def parse(kernel: str) -> Codebook:
        _, bits, num_outliers = kernel.split("/")
        return Codebook(int(bits), int(num_outliers))

    @property
    def kernel(self) -> str:
        return f"codebook/{self.bits}/{self.num_outliers}"

    def row_bytes(self, num_columns: int) -> int:
        steps = -(-num_columns // STEP)
        return (2 << self.bits) + steps * STEP * self.bits // 8 + 4 * self.num_outliers

    def pack(
        self, table: np.ndarray, codes: np.ndarray, columns: np.ndarray, outliers: np.ndarray
    ) -> np.ndarray:
        """Rows [N, bytes] of a table [N, 2^bits], codes [N, K] and outliers at columns [N, n]."""
        parts = (
            np.ascontiguousarray(table.astype(ml_dtypes.bfloat16)).view(np.uint8),
            pack_codes(codes, self.bits),
            np.ascontiguousarray(columns.astype(np.uint16)).view(np.uint8),
            np.ascontiguousarray(outliers.astype(ml_dtypes.bfloat16)).view(np.uint8),
        )
        return np.concatenate([part.reshape(len(codes), -1) for part in parts], axis=1)

    def decode(self, data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The weights [out, in] float32."""
        rows = data.reshape(shape[0], -1)
        sizes = 2 << self.bits, -(-shape[1] // STEP) * STEP * self.bits // 8, 2 * self.num_outliers
        table, codes, columns, values = (
            np.ascontiguousarray(part) for part in np.split(rows, np.cumsum(sizes), axis=1)
        )
        table = flush(table.view(ml_dtypes.bfloat16).astype(np.float32))
        unpacked = unpack_codes(codes, self.bits)[:, : shape[1]]
        weights = np.take_along_axis(table, unpacked.astype(np.intp), axis=1)
        if self.num_outliers:
            outliers = flush(values.view(ml_dtypes.bfloat16).astype(np.float32))
            places = columns.view(np.uint16).astype(np.intp)
            if places.max() >= shape[1]:
                raise BadFile(f"an outlier is of column {places.max()} of {shape[1]}")
            np.put_along_axis(weights, places, outliers, axis=1)
        return weights


# Where codes lie in a step of 32 weights: see TableLayout in native/src/format.h.


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [N, K] uint8 as bytes [N, ceil(K / 32) * 4 * bits]; codes that fill up are zero."""
    num_rows, num_columns = codes.shape
    padded = np.zeros((num_rows, -(-num_columns // STEP) * STEP), np.uint8)
    padded[:, :num_columns] = codes
    steps = padded.reshape(num_rows, -1, STEP)
    if bits == 8:
        return padded
    if bits == 4:
        parts = [_nibbles(steps)]
    elif bits == 3:
        third = np.packbits(steps >> 2, axis=-1, bitorder="little")
        parts = [_crumbs(steps & 3), third]
    else:
        parts = [_nibbles(steps & 15), _crumbs(steps >> 4)]
    return np.concatenate(parts, axis=-1).reshape(num_rows, -1)


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: [..., bytes] -> [..., K] uint8."""
    if bits == 8:
        return packed
    steps = packed.reshape(*packed.shape[:-1], -1, 4 * bits)
    if bits == 3:
        third = np.unpackbits(steps[..., 8:], axis=-1, bitorder="little")
        codes = _from_crumbs(steps[..., :8]) | third << 2
    else:
        codes = np.concatenate([steps[..., :16] & 15, steps[..., :16] >> 4], axis=-1)
        if bits == 6:
            codes |= _from_crumbs(steps[..., 16:]) << 4
    return codes.reshape(*packed.shape[:-1], -1)


def _nibbles(steps: np.ndarray) -> np.ndarray:
    return steps[..., :16] | steps[..., 16:] << 4


def _crumbs(steps: np.ndarray) -> np.ndarray:
    a, b, c, d = (steps[..., first : first + 8] for first in (0, 8, 16, 24))
    return a | b << 2 | c << 4 | d << 6


def _from_crumbs(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
