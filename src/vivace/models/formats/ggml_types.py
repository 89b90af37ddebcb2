"""How GGUF files store tensors: types by their number, plain ones and quantized blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from vivace.errors import BadFile, UnsupportedModel

__all__ = ["TYPES", "GgmlType", "find_type"]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of tensor. `block_size` weights of a row are stored in `block_bytes` bytes.

    `dtype` is what an element is; None for quantized blocks, which decode to float32.
    """

    name: str
    block_size: int
    block_bytes: int
    dtype: np.dtype[Any] | None = None


def _plain(name: str, dtype: Any) -> GgmlType:
    return GgmlType(name, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


# Sizes of blocks are those of the structs in native/src/block_formats.h.
TYPES: dict[int, GgmlType] = {
    0: _plain("F32", np.float32),
    1: _plain("F16", np.float16),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    20: GgmlType("IQ4_NL", 32, 18),
    24: _plain("I8", np.int8),
    25: _plain("I16", np.int16),
    26: _plain("I32", np.int32),
    27: _plain("I64", np.int64),
    28: _plain("F64", np.float64),
    30: _plain("BF16", ml_dtypes.bfloat16),
    39: GgmlType("MXFP4", 32, 17),
}

# In use or withdrawn, but not decoded here.
_UNSUPPORTED: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}


def find_type(number: int, where: str) -> GgmlType:
    """The type of that number; `where` names the tensor in messages.

    Raises `UnsupportedModel` for a type that is known but not decoded, else `BadFile`.
    """
    if number in TYPES:
        return TYPES[number]
    if number in _UNSUPPORTED:
        known = ", ".join(item.name for item in TYPES.values())
        raise UnsupportedModel(
            f"{where} is stored as {_UNSUPPORTED[number]}, which is not supported: "
            f"choose a file with one of {known}"
        )
    raise BadFile(
        f"{where} is of the unknown type {number}: expected at most {max(_UNSUPPORTED)}; "
        "the file is damaged or newer than this version"
    )
