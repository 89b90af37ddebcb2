"""Safetensors files as views of mapped memory, trusted only after every byte is accounted for.

A file is: header length (8 bytes, little endian), header (JSON), data. The header maps each name to
a dtype, a shape and a range of the data; the ranges must cover the data exactly once.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivace.errors import BadFile
from vivace.models.config import show
from vivace.models.formats.mapped_file import map_file
from vivace.models.formats.strict_json import parse_object

__all__ = ["DTYPES", "PREFIX_BYTES", "SafetensorsFile", "TensorInfo"]

MAX_HEADER_BYTES = 32 * 2**20
MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 1024
PREFIX_BYTES = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's dtype, shape and place, counted from the start of the file.

    `dtype` is what a quantized tensor becomes when it is read.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    is_quantized: bool = False


class SafetensorsFile:
    """One file: `tensors` by name, and arrays that are read-only views of the mapped file.

    `metadata` is what the header says beside them, unchecked. Nothing is allocated from numbers in
    the header. The map lives as long as any of its arrays.

    Raises `BadFile`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = map_file(path, PREFIX_BYTES + 1, "safetensors")
        self.identities = (self._file.identity,)
        self.tensors, self.metadata = _parse_header(path, self._file.data)

    def array(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        count = math.prod(info.shape)
        if count == 0:
            return np.zeros(info.shape, info.dtype)
        flat = np.frombuffer(self._file.data, info.dtype, count, info.offset)
        if not flat.flags.aligned:
            flat = flat.copy()  # kernels read whole elements; such files are old and small
        return flat.reshape(info.shape)

    def release(self) -> None:
        self._file.release()

    def prefer_huge_pages(self) -> None:
        self._file.prefer_huge_pages()

    def raw(self) -> np.ndarray:
        """All bytes of the file."""
        return np.frombuffer(self._file.data, np.uint8)


def _parse_header(path: Path, data: mmap.mmap) -> tuple[dict[str, TensorInfo], Any]:
    (length,) = struct.unpack_from("<Q", data)
    if length == 0 or length > len(data) - PREFIX_BYTES:
        raise BadFile(
            f"{path}: header length {length} does not fit a file of {len(data)} bytes: "
            "the file is cut short or not safetensors; download it again"
        )
    if length > MAX_HEADER_BYTES:
        raise BadFile(
            f"{path}: the header has {length} bytes: expected at most {MAX_HEADER_BYTES}; "
            "split the checkpoint into shards"
        )
    start = PREFIX_BYTES + length
    header = parse_object(data[PREFIX_BYTES:start], f"{path}: header")
    metadata = header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_cover(path, tensors, start, len(data))
    return tensors, metadata


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: tensor {show(name)}"
    if len(name) > MAX_NAME_LENGTH:
        raise BadFile(f"{where}: the name has {len(name)} characters: expected a real checkpoint")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadFile(f"{where}: expected dtype, shape and data_offsets, got {show(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        known = ", ".join(DTYPES)
        raise BadFile(f"{where}: dtype {show(code)} is unknown: expected one of {known}")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise BadFile(
            f"{where}: shape {show(shape)}: expected at most {MAX_DIMENSIONS} sizes of 0 or more"
        )
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadFile(f"{where}: data_offsets {show(offsets)}: expected a begin and an end")
    dtype, (begin, end) = DTYPES[code], offsets
    expected = math.prod(shape) * dtype.itemsize
    if expected != end - begin:
        raise BadFile(
            f"{where}: shape {show(shape)} of {code} needs {expected} bytes but its offsets span "
            f"{end - begin}: the file is damaged; download it again"
        )
    return TensorInfo(dtype, tuple(shape), start + begin, end - begin)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _check_cover(path: Path, tensors: dict[str, TensorInfo], start: int, end: int) -> None:
    """The tensors must lie one after another from the header to the end of the file."""
    at, before = start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != at:
            kind = "overlaps" if info.offset < at else "leaves a gap after"
            raise BadFile(
                f"{path}: tensor {show(name)} at byte {info.offset} {kind} {before}, which ends at "
                f"{at}: the file is damaged; download it again"
            )
        at, before = at + info.num_bytes, f"tensor {show(name)}"
    if at != end:
        raise BadFile(
            f"{path}: has {end} bytes but its tensors end at {at}: "
            "the file is cut short or has data appended; download it again"
        )
