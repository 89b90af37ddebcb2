"""Packed matrices as one file: safetensors whose metadata say what the bytes of a matrix mean.

A matrix is a flat U8 tensor; `__metadata__` has for each kernel its matrices with their rows and
columns. Data start at a multiple of 64 bytes, and so does every tensor before the first whose size
is none. The last tensor is a sum of all bytes before it. A file appears whole or not at all.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from vivace import _native
from vivace.errors import BadFile, NativeError
from vivace.models.config import show
from vivace.models.formats.safetensors import DTYPES, PREFIX_BYTES, SafetensorsFile, TensorInfo
from vivace.models.formats.strict_json import parse_object
from vivace.models.formats.unfinished import whole_file
from vivace.techniques.weight_formats.base import Packed

__all__ = ["HugePageWriter", "PackedFile", "write_packed"]

# Of the file, of what kernels read and of how formats round: others are not read.
_VERSION = 3
_ALIGNMENT = 64
_HUGE_PAGE = 2 * 2**20
_SUM = "checksum"  # uint64, little endian, of all bytes before its own
_SUM_BYTES = 8
_MAX_KERNELS, _MAX_KERNEL_NAME = 32, 1024  # 64 numbers are the longest name
_DTYPES = {dtype.name: dtype for dtype in (DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"])}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_AGAIN = "quantize the model again"


class PackedFile:
    """One file: `tensors` by name, matrices among them with their own shape.

    `dtype` is the float type that most matrices had; `source` is what they were made from, as
    whoever wrote the file described it. Only `check` reads the data.

    Raises `BadFile`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, SafetensorsFile(path)
        self._file.prefer_huge_pages()
        self.identities = self._file.identities
        metadata = self._file.metadata
        if not isinstance(metadata, dict) or metadata.get("format") != "vivace":
            raise BadFile(f"{path}: its metadata do not say what its matrices mean: {_AGAIN}")
        if metadata.get("version") != str(_VERSION):
            raise BadFile(
                f"{path}: was packed for version {show(metadata.get('version'))}, this program "
                f"reads {_VERSION}: {_AGAIN}"
            )
        dtype = metadata.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise BadFile(f"{path}: dtype is {show(dtype)}: expected one of {', '.join(_DTYPES)}")
        self.dtype = dtype
        self.source = metadata.get("source", "")
        self._kernels: dict[str, str] = {}
        self.tensors = dict(self._file.tensors)
        self._check_sum_is_last(self.tensors.pop(_SUM, None))
        for kernel, matrices in self._matrices(metadata.get("matrices")).items():
            for name, shape in matrices.items():
                self._add_matrix(name, kernel, shape)

    def _check_sum_is_last(self, info: TensorInfo | None) -> None:
        size = len(self._file.raw())
        if info is None or (info.offset, info.num_bytes) != (size - _SUM_BYTES, _SUM_BYTES):
            raise BadFile(f"{self.path}: does not end in a checksum: {_AGAIN}")

    def _matrices(self, text: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(text, str):
            raise BadFile(f"{self.path}: matrices is {show(text)}: expected JSON; {_AGAIN}")
        found = parse_object(text.encode(), f"{self.path}: matrices")
        for kernel, matrices in found.items():
            if not isinstance(matrices, dict) or len(kernel) > _MAX_KERNEL_NAME:
                raise BadFile(
                    f"{self.path}: matrices of {show(kernel)} are {show(matrices)}: expected names "
                    f"and shapes; {_AGAIN}"
                )
        return found

    def _add_matrix(self, name: str, kernel: str, shape: Any) -> None:
        where = f"{self.path}: matrix {show(name)}"
        match shape:
            case [int() as rows, int() as columns] if max(rows, columns) < 2**31:
                pass
            case _:
                raise BadFile(f"{where} is {show(shape)}: expected rows, columns; {_AGAIN}")
        if name in self._kernels:
            raise BadFile(f"{where} is of {self._kernels[name]} and of {show(kernel)}: {_AGAIN}")
        try:
            expected = _native.matrix_bytes(kernel, rows, columns)
        except (NativeError, TypeError) as error:
            raise BadFile(f"{where} cannot be read ({error}): {_AGAIN}") from error
        info = self._file.tensors.get(name)
        if info is None or info.dtype != np.uint8 or info.shape != (expected,):
            found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
            raise BadFile(
                f"{where} {found}: {kernel} of [{rows}, {columns}] takes uint8 [{expected}]; "
                f"{_AGAIN}"
            )
        self._kernels[name] = kernel
        self.tensors[name] = TensorInfo(
            _DTYPES[self.dtype], (rows, columns), info.offset, expected, is_quantized=True
        )

    def array(self, name: str) -> Any:
        """A matrix as `Packed` bytes of the mapped file, any other tensor as an array."""
        kernel, array = self._kernels.get(name), self._file.array(name)
        if kernel is None:
            return array
        rows, columns = self.tensors[name].shape
        return Packed(kernel, (rows, columns), array)

    def release(self) -> None:
        self._file.release()

    def matrices(self) -> dict[str, Packed]:
        return {name: self.array(name) for name in self._kernels}

    def check(self) -> None:
        """Read all data. Raises `BadFile` if they are not those that were written."""
        raw = self._file.raw()
        (stored,) = struct.unpack("<Q", raw[-_SUM_BYTES:].tobytes())
        if _native.checksum(raw[:-_SUM_BYTES]) != stored:
            raise BadFile(f"{self.path}: is damaged (its checksum does not fit): {_AGAIN}")


# ---------------------------------------------------------------- writing


def write_packed(
    path: Path,
    matrices: Mapping[str, Callable[[], Packed]],
    others: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str = "float32",
    source: str = "",
) -> None:
    """Write a file; one that is there is replaced when the new one is complete.

    If the machine itself fails soon after, data may be missing, which `PackedFile.check` sees.

    Args:
        matrices: made one after the other, so that no more than one need be in memory.
        others: written as they are.
    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    with whole_file(path) as unfinished, unfinished.open("w+b") as file:
        _write(file, matrices, others or {}, dtype, source)


def _write(
    file: IO[bytes],
    matrices: Mapping[str, Callable[[], Packed]],
    others: Mapping[str, np.ndarray],
    dtype: str,
    source: str,
) -> None:
    header = _Header(dtype, source)
    names = (*matrices, *others, _SUM)
    start = header.reserve(names)
    data = HugePageWriter(file)
    data.write(memoryview(bytes(start)))
    late: list[tuple[str, Packed]] = []  # whose size would put what follows off its place
    for name, make in matrices.items():
        packed = make()
        if packed.num_bytes % _ALIGNMENT:
            late.append((name, packed))
        else:
            data.write(header.add_matrix(name, packed))
    rest = sorted(others.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, packed in late:
        data.write(header.add_matrix(name, packed))
    for name, array in rest:
        data.write(header.add(name, _CODES[array.dtype], array))
    data.write(header.add(_SUM, "U64", np.zeros(1, np.uint64)))
    data.flush()
    file.seek(0)
    file.write(header.to_bytes(start))
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        total = _native.checksum(np.frombuffer(mapped, np.uint8)[:-_SUM_BYTES])
    file.seek(-_SUM_BYTES, os.SEEK_END)
    file.write(struct.pack("<Q", total))


class SupportsWrite(Protocol):
    def write(self, data: bytearray, /) -> Any: ...


class HugePageWriter:
    """Writes whole huge pages, from a file's start: systems that can then cache and map them so.

    Read at the memory's rate, small pages cost up to a third of it.
    """

    def __init__(self, file: SupportsWrite) -> None:
        self._file = file
        self._held = bytearray()

    def write(self, data: memoryview) -> None:
        while data:
            room = _HUGE_PAGE - len(self._held)
            self._held += data[:room]
            data = data[room:]
            if len(self._held) == _HUGE_PAGE:
                self.flush()

    def flush(self) -> None:
        self._file.write(self._held)
        self._held.clear()


class _Header:
    def __init__(self, dtype: str, source: str) -> None:
        self._dtype, self._source = dtype, source
        self._tensors: dict[str, Any] = {}
        self._matrices: dict[str, dict[str, tuple[int, int]]] = {}  # by kernel
        self._end = 0

    def add_matrix(self, name: str, packed: Packed) -> memoryview:
        self._matrices.setdefault(packed.kernel, {})[name] = packed.shape
        return self.add(name, "U8", packed.raw)

    def add(self, name: str, code: str, array: np.ndarray) -> memoryview:
        """Note a tensor; returns the bytes to write."""
        begin, self._end = self._end, self._end + array.nbytes
        self._tensors[name] = {
            "dtype": code,
            "shape": list(array.shape),
            "data_offsets": [begin, self._end],
        }
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    def reserve(self, names: tuple[str, ...]) -> int:
        """Where data start: room for a header about these tensors, whatever it will say."""
        widest = _Header(self._dtype, self._source)
        longest = 2**63 - 1
        kernels = [f"{place:{_MAX_KERNEL_NAME}}" for place in range(_MAX_KERNELS)]
        widest._matrices = {kernel: {} for kernel in kernels}
        for name in names:
            widest._matrices[kernels[0]][name] = longest, longest
            widest._tensors[name] = {
                "dtype": "F8_E4M3",
                "shape": [longest, longest],
                "data_offsets": [longest, longest],
            }
        length = PREFIX_BYTES + len(widest._text())
        return length + -length % _ALIGNMENT

    def to_bytes(self, start: int) -> bytes:
        """Everything before `start`."""
        text = self._text().ljust(start - PREFIX_BYTES)
        if len(text) != start - PREFIX_BYTES:
            raise ValueError("the header is longer than the room that was left for it")
        return struct.pack("<Q", len(text)) + text

    def _text(self) -> bytes:
        metadata = {
            "format": "vivace",
            "version": str(_VERSION),
            "dtype": self._dtype,
            "source": self._source,
            "matrices": json.dumps(self._matrices, separators=(",", ":")),
        }
        header = {"__metadata__": metadata} | self._tensors
        return json.dumps(header, separators=(",", ":")).encode()
