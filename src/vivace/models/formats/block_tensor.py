"""A matrix of quantized blocks that is decoded a range of rows at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from vivace import _native
from vivace.errors import UnsupportedModel
from vivace.models.formats.ggml_types import GgmlType

__all__ = ["BlockTensor"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DECODED = (np.dtype(np.float32), np.dtype(np.float16), _BFLOAT16)


class BlockTensor:
    """A matrix [rows, cols] in quantized blocks along its rows: a view, not yet decoded.

    `t[a:b]` is a view of rows; `np.asarray(t)` decodes to float32, natively and in parallel.

    Args:
        type: how blocks are stored.
        raw: [rows, bytes of a row] uint8, C-contiguous.
    """

    ndim = 2
    dtype = np.dtype(np.float32)  # what it decodes to

    def __init__(self, type: GgmlType, raw: np.ndarray) -> None:
        self.type, self.raw = type, raw

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_bytes = self.raw.shape
        return num_rows, num_bytes // self.type.block_bytes * self.type.block_size

    @property
    def num_bytes(self) -> int:
        """As stored."""
        return self.raw.nbytes

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice) -> BlockTensor:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"a block tensor is cut by ranges of rows only, not by {rows!r}")
        return BlockTensor(self.type, self.raw[rows])

    @property
    def T(self) -> BlockTensor:  # as numpy calls it
        raise UnsupportedModel(
            f"a tensor of type {self.type.name} cannot be used transposed: its blocks lie along "
            "its rows; use a file that stores it as F16 or F32"
        )

    def decode(self, dtype: Any = np.float32, threads: int | None = None) -> np.ndarray:
        """All rows as float32, or rounded once from it to float16 or bfloat16: [rows, cols]."""
        dtype = np.dtype(dtype)
        if dtype not in _DECODED:
            return self.decode(threads=threads).astype(dtype)
        out = np.empty(self.shape, dtype)
        bits = out.view(np.uint16) if dtype == _BFLOAT16 else out
        _native.decode_blocks(self.type.name, self.raw, bits, threads)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a block tensor cannot become an array without being decoded")
        return self.decode(self.dtype if dtype is None else dtype)
