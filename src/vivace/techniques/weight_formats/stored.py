"""Every matrix as its file stores it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from vivace.registry import TechniqueInfo
from vivace.techniques.weight_formats._coded import coded_bytes, kernel_for_codes, pack_coded
from vivace.techniques.weight_formats._kernels import BLOCKS, DECODED_BLOCKS, unit_rows
from vivace.techniques.weight_formats._plain import convert
from vivace.techniques.weight_formats.base import Grid, Matrix, Packed, WeightFormat

_log = logging.getLogger(__name__)

INFO = TechniqueInfo(summary="as the file stores it, matrix by matrix; what cannot be: float16")


@dataclass(frozen=True)
class Config:
    decoded_blocks: Literal["float16", "mapped"] = "float16"


class Stored(WeightFormat):
    """Reads quantized matrices where a file has them; floats keep their type, inputs float32.

    Blocks of GGUF are read where they lie: Q4_0, Q8_0, Q4_K and Q6_K (in rows that are a multiple
    of 16) as whole numbers, MXFP4 and IQ4_NL as tables.
    Codes that others quantized are packed as they are where a kernel reads them, else decoded
    to float16.
    Cost: the bytes of the file per token.
    Args:
        decoded_blocks: all other blocks are float16 copies, or stay mapped and are decoded to
            bfloat16 at every use: a quarter of the memory, a third of the speed with one row.
    """

    config: Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._told: set[str] = set()

    @property
    def grid(self) -> Grid:
        return Grid("stored", 16)  # at most, where nothing is said of the matrix

    def num_bytes(self, weight: Matrix | Packed) -> int:
        if isinstance(weight, np.ndarray):
            return weight.nbytes
        if isinstance(weight, Packed) or self._block_kernel(weight) is not None:
            return cast(Any, weight).num_bytes
        codes = kernel_for_codes(weight)
        if codes is not None:
            return coded_bytes(codes, weight.shape)
        return super().num_bytes(weight)

    def pack(self, weight: Matrix | Packed) -> Packed:
        if isinstance(weight, Packed):
            return weight
        shape = weight.shape[0], weight.shape[1]
        kernel = self._block_kernel(weight)
        if kernel is not None:
            return Packed(kernel, shape, cast(Any, weight).raw)
        codes = kernel_for_codes(weight)
        if codes is not None:
            return pack_coded(weight, codes)
        self._tell(getattr(weight, "stored_as", None))
        dtype = weight.dtype if isinstance(weight, np.ndarray) else np.dtype(np.float16)
        name = dtype.name if dtype == np.float32 else f"{dtype.name}_float32"
        return Packed(name, shape, convert(weight, dtype))

    def _block_kernel(self, weight: Matrix) -> str | None:
        """The kernel that reads a matrix of blocks where it lies."""
        kind = getattr(weight, "type", None)  # of a BlockTensor
        kernel = "" if kind is None else kind.name.lower()
        kernel = _TABLES.get(kernel, kernel)
        is_read = kernel in BLOCKS or kernel in _TABLES.values()
        if self.config.decoded_blocks == "mapped":
            is_read |= kernel in DECODED_BLOCKS
        return kernel if is_read and weight.shape[0] % unit_rows(kernel) == 0 else None

    def _tell(self, stored_as: str | None) -> None:
        """Say once that matrices of a checkpoint take more memory than their file."""
        if stored_as is not None and stored_as not in self._told:
            self._told.add(stored_as)
            _log.warning("no kernel reads %s: such matrices are decoded to float16", stored_as)


# Blocks that are those of a table: see TableLayout in native/src/format.h.
_TABLES = {
    "mxfp4": "table/e2m1/32/e8m0",
    "iq4_nl": "table/-127,-104,-83,-65,-49,-35,-22,-10,1,13,25,38,53,69,89,113/32/float16",
}
