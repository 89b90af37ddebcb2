"""What native kernels compute, by their names: the reference for tests and for torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from vivace import _native
from vivace.techniques.weight_formats._panels import UNIT_OUTPUTS, unpack_panels
from vivace.techniques.weight_formats._tables import Codebook, TableKernel, flush

__all__ = ["BLOCKS", "DECODED_BLOCKS", "Codes", "decode", "round_inputs", "unit_rows"]

_ELEMENTS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Inputs that share a scale, for blocks of GGUF that kernels read in place.
BLOCKS = {"q4_0": 32, "q8_0": 32, "q4_k": 32, "q6_k": 16}
# Blocks of GGUF that kernels decode to bfloat16.
DECODED_BLOCKS = frozenset({"q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q5_k"})
_BLOCK_ROWS = 16  # of blocks that lie together
_ROW_INPUT_GROUP = 128
_TINY = 2.0**-100  # inputs below count as zero


@dataclass(frozen=True, slots=True)
class Codes:
    """The name of a kernel for integer codes, taken apart."""

    bits: int
    group_size: int | None  # None: a row
    scale_type: str
    has_zeros: bool

    @staticmethod
    def parse(kernel: str) -> Codes:
        bits, group, scale, *zeros = kernel.split("/")
        group_size = None if group == "row" else int(group)
        return Codes(int(bits.removeprefix("int")), group_size, scale, zeros == ["zeros"])

    @property
    def kernel(self) -> str:
        group = "row" if self.group_size is None else str(self.group_size)
        zeros = ("zeros",) if self.has_zeros else ()
        return "/".join((f"int{self.bits}", group, self.scale_type, *zeros))

    @property
    def scale_dtype(self) -> np.dtype:
        """What a scale is stored as; `e8m0` is an exponent, biased by 127."""
        return np.dtype(np.uint8) if self.scale_type == "e8m0" else _ELEMENTS[self.scale_type]


def unit_rows(kernel: str) -> int:
    """Rows of a matrix that lie together."""
    if kernel.startswith("int"):
        return UNIT_OUTPUTS
    return _BLOCK_ROWS if kernel in BLOCKS else 1


def round_inputs(kernel: str, x: Any) -> Any:
    """What a kernel reads of x [N, in] float32, as float32; numpy or torch."""
    if kernel.startswith("int"):
        return _round_to_int8(x, Codes.parse(kernel).group_size or _ROW_INPUT_GROUP)
    if kernel in BLOCKS:
        return _round_to_int8(x, BLOCKS[kernel])
    if kernel == "float32" or kernel.endswith("_float32"):
        return x
    if kernel.startswith(("table/", "codebook/")) or kernel in DECODED_BLOCKS:
        kernel = "bfloat16"
    if isinstance(x, np.ndarray):
        return x.astype(_ELEMENTS[kernel]).astype(np.float32)
    xp = array_namespace(x)
    return xp.astype(xp.astype(x, getattr(xp, kernel)), xp.float32)


def _round_to_int8(x: Any, group: int) -> Any:
    """Whole numbers -127..127 times amax / 127 of each `group` inputs, ties to even."""
    xp = array_namespace(x)
    num_rows, num_columns = x.shape
    padding = xp.zeros((num_rows, -num_columns % group), dtype=x.dtype)
    groups = xp.reshape(xp.concat([x, padding], axis=1), (num_rows, -1, group))
    most = xp.max(xp.abs(groups), axis=-1, keepdims=True)
    is_tiny = most < _TINY
    inverse = xp.where(is_tiny, 0.0, 127.0 / xp.where(is_tiny, 1.0, most))
    scale = xp.where(is_tiny, 0.0, most / 127.0)
    rounded = xp.round(groups * xp.astype(inverse, x.dtype)) * xp.astype(scale, x.dtype)
    return xp.reshape(rounded, (num_rows, -1))[:, :num_columns]


def decode(kernel: str, shape: tuple[int, int], data: np.ndarray) -> np.ndarray:
    """The weights [out, in] float32 of a stored matrix."""
    if kernel.startswith("int"):
        return _decode_codes(Codes.parse(kernel), shape, data)
    if kernel.startswith("table/"):
        return TableKernel.parse(kernel).decode(data, shape)
    if kernel.startswith("codebook/"):
        return Codebook.parse(kernel).decode(data, shape)
    if kernel in BLOCKS or kernel in DECODED_BLOCKS:
        out = np.empty(shape, np.float32)
        _native.decode_blocks(kernel.upper(), data.reshape(shape[0], -1), out)
        return out if kernel in BLOCKS else flush(_round_to_bfloat16(out))
    elements = _ELEMENTS[kernel.removesuffix("_float32")]
    return data.reshape(-1).view(elements).reshape(shape).astype(np.float32)


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _decode_codes(codes: Codes, shape: tuple[int, int], data: np.ndarray) -> np.ndarray:
    num_groups = shape[1] // (codes.group_size or shape[1])
    values, scales, zeros = unpack_panels(
        data, shape, num_groups, codes.scale_dtype, codes.has_zeros, codes.bits
    )
    if codes.scale_type == "e8m0":
        scales = (scales.astype(np.uint32) << 23).view(np.float32)
    zero = 1 << codes.bits - 1 if zeros is None else zeros.astype(np.float32)[..., None]
    groups = values.reshape(shape[0], num_groups, -1).astype(np.float32) - zero
    return (groups * scales.astype(np.float32)[..., None]).reshape(shape)
