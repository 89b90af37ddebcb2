"""Matrices of quantized checkpoints, decoded or unpacked a range of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vivace.errors import UnsupportedModel

__all__ = ["CodedMatrix", "QuantizedMatrix", "unpack_codes"]

_PIECE_WEIGHTS = 2**20  # decoded at a time


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

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        step = max(1, _PIECE_WEIGHTS // max(1, self._num_columns))
        pieces = (self[first : first + step] for first in range(0, len(self), step))
        return all(np.isfinite(piece.decode()).all() for piece in pieces)

    def decode(self) -> np.ndarray:
        """All rows [N, K] float32."""
        return self._decode(self._rows.start, self._rows.stop)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a quantized matrix cannot become an array without being decoded")
        return self.decode().astype(self.dtype if dtype is None else dtype, copy=False)


class CodedMatrix(QuantizedMatrix):
    """weight = (code - zero) * scale, with codes of `bits` bits and a scale for each group.

    The products are exact in float32 where scales have 16 bits.

    Args:
        shape: [N, K].
        bits: of a code, 1 to 8.
        group_size: weights along a row that share scale and zero; the last group may be shorter.
        scales: [N, G] float16, bfloat16 or float32.
        zeros: [N, G] uint8; None: all are the middle code, 2^(bits-1).
        num_bytes: of all tensors that make it up.
        read: from a first and a last row to the codes [n, K] uint8 of the rows between.
        group_of: the group of each column [K], where groups do not lie in order.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        num_bytes: int,
        read: Callable[[int, int], np.ndarray],
        group_of: np.ndarray | None = None,
    ) -> None:
        order = "" if group_of is None else " in scattered order (act-order)"
        super().__init__(f"int{bits} in groups of {group_size}{order}", shape, num_bytes, read)
        self.bits, self.group_size = bits, group_size
        self.is_in_order = group_of is None
        self._group_of = np.arange(shape[1]) // group_size if group_of is None else group_of
        has_zeros = zeros is not None and bool((zeros != 1 << bits - 1).any())
        self._scales, self._zeros = scales, zeros if has_zeros else None

    @property
    def codes(self) -> np.ndarray:
        """[N, K] uint8, unpacked here."""
        return self._decode(self._rows.start, self._rows.stop)

    @property
    def scales(self) -> np.ndarray:
        """[N, G] as they are stored."""
        return self._scales[self._rows.start : self._rows.stop]

    @property
    def zeros(self) -> np.ndarray | None:
        """[N, G] uint8, or None."""
        return None if self._zeros is None else self._zeros[self._rows.start : self._rows.stop]

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.scales.astype(np.float32)).all())

    def decode(self) -> np.ndarray:
        weights, zeros = self.codes.astype(np.float32), self.zeros
        if zeros is None:
            weights -= np.float32(1 << self.bits - 1)
        else:
            weights -= zeros.astype(np.float32)[:, self._group_of]
        with np.errstate(invalid="ignore"):  # a damaged scale is found by who looks for NaN
            weights *= self.scales.astype(np.float32)[:, self._group_of]
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
