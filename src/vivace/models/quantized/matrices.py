"""Matrices of quantized checkpoints, decoded or unpacked a range of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vivace.errors import UnsupportedModel

__all__ = ["CodedMatrix", "Codes", "QuantizedMatrix", "decode_codes", "unpack_codes"]

# Codes [n, K] uint8, scales [n, G] and zeros [n, G] uint8 or None, of a range of rows.
Codes = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class QuantizedMatrix:
    """A matrix [N, K] as a checkpoint stores it, not yet decoded.

    `m[a:b]` is a view of rows; `np.asarray(m)` decodes to float32.

    Args:
        stored_as: the format's name in messages.
        shape: [N, K].
        num_bytes: of all tensors that make it up.
        decode: from a first and a last row to the rows between, float32.
    """

    ndim = 2
    dtype = np.dtype(np.float32)  # what it decodes to

    def __init__(
        self,
        stored_as: str,
        shape: tuple[int, int],
        num_bytes: int,
        decode: Callable[[int, int], np.ndarray],
    ) -> None:
        self.stored_as, self.num_bytes = stored_as, num_bytes
        self._decode, self._rows, self._num_columns = decode, range(shape[0]), shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._rows), self._num_columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> QuantizedMatrix:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"a quantized matrix is cut by ranges of rows only, not by {rows!r}")
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._rows = self._rows[rows]
        part.num_bytes = self.num_bytes * len(part) // max(1, len(self))
        return part

    @property
    def T(self) -> QuantizedMatrix:  # as numpy calls it
        raise UnsupportedModel(
            f"a matrix stored as {self.stored_as} cannot be used transposed: use the unquantized "
            "checkpoint"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a quantized matrix cannot become an array without being decoded")
        decoded = self._decode(self._rows.start, self._rows.stop)
        return decoded.astype(self.dtype if dtype is None else dtype, copy=False)


class CodedMatrix(QuantizedMatrix):
    """weight = (code - zero) * scale, with codes of `bits` bits and a scale for each group.

    Without zeros, zero is 2^(bits-1). The products are exact in float32 where scales have 16 bits.

    Args:
        shape: [N, K].
        bits: of a code, 1 to 8.
        group_size: weights along a row that share scale and zero; the last group may be shorter.
        scale_dtype: float16, bfloat16 or float32.
        has_zeros: whether `read` gives zeros.
        num_bytes: of all tensors that make it up.
        read: from a first and a last row to the codes of the rows between.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        scale_dtype: np.dtype,
        has_zeros: bool,
        num_bytes: int,
        read: Callable[[int, int], Codes],
    ) -> None:
        self.bits, self.group_size = bits, group_size
        self.scale_dtype, self.has_zeros, self._read = scale_dtype, has_zeros, read
        name = f"int{bits} in groups of {group_size}"
        super().__init__(name, shape, num_bytes, self._decode_rows)

    def read_codes(self) -> Codes:
        return self._read(self._rows.start, self._rows.stop)

    def _decode_rows(self, first: int, last: int) -> np.ndarray:
        codes, scales, zeros = self._read(first, last)
        group_of = np.arange(codes.shape[1]) // self.group_size
        return decode_codes(codes, scales, zeros, group_of, self.bits)


def decode_codes(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group_of: np.ndarray, bits: int
) -> np.ndarray:
    """Weights [n, K] float32; column k belongs to the group `group_of[k]`."""
    weights = codes.astype(np.float32)
    if zeros is None:
        weights -= np.float32(1 << bits - 1)
    else:
        weights -= zeros.astype(np.float32)[:, group_of]
    with np.errstate(invalid="ignore"):  # a damaged scale is found by who looks for NaN
        weights *= scales.astype(np.float32)[:, group_of]
    return weights


def unpack_codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of a stream that starts at the lowest bit.

    Args:
        words: [R, W] of 32 bits; codes may straddle two of them.
        bits: of a code, 1 to 8.
    Returns:
        [R, count] uint8.
    """
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw[:, :count]
    if bits == 4:
        out = np.empty((len(raw), 2 * raw.shape[1]), np.uint8)
        out[:, ::2], out[:, 1::2] = raw & 15, raw >> 4
        return out[:, :count]
    num_eights = -(-count // 8)  # eight codes take `bits` bytes
    raw = np.pad(raw, ((0, 0), (0, max(0, num_eights * bits - raw.shape[1]))))
    raw = raw[:, : num_eights * bits].reshape(len(raw), num_eights, bits)
    eights = np.zeros(raw.shape[:2], np.uint64)
    for index in range(bits):
        eights |= raw[:, :, index].astype(np.uint64) << np.uint64(8 * index)
    codes = np.empty((*eights.shape, 8), np.uint8)
    for index in range(8):
        codes[:, :, index] = (eights >> np.uint64(bits * index)) & np.uint64((1 << bits) - 1)
    return codes.reshape(len(raw), -1)[:, :count]
