"""The head of a GGUF file: a cursor that never leaves it, and the values of its metadata."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from vivace.errors import BadFile
from vivace.models.config import show

__all__ = ["Cursor", "read_metadata"]

# What is kept in memory of a file. The largest vocabularies, with a copy of their tokenizer.json
# among the metadata, take about 50 MB.
MAX_HEADER_BYTES = 2**27
MAX_KEYS = 2**16  # files have some dozens
MAX_KEY_BYTES = 2**16 - 1  # by the format's definition
MAX_ARRAY_LENGTH = 2**22  # the largest vocabularies have 600k merges

_STRING, _ARRAY, _BOOL, _UINT32 = 8, 9, 7, 4
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_LENGTH = struct.Struct("<Q")


class Cursor:
    """Reads the head of a mapped file from its start; whatever does not fit raises `BadFile`."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.at = 0
        self._end = min(len(data), MAX_HEADER_BYTES)

    def take(self, num_bytes: int, what: str) -> int:
        """Where the next `num_bytes` start; moves behind them."""
        start = self.at
        if num_bytes > self._end - start:
            raise self._beyond(start + num_bytes, what)
        self.at += num_bytes
        return start

    def _beyond(self, end: int, what: str) -> BadFile:
        if end <= len(self.data):
            return BadFile(
                f"{self.path}: {what} ends beyond byte {MAX_HEADER_BYTES}: "
                "expected metadata of a real model"
            )
        return BadFile(
            f"{self.path}: {what} would end at byte {end} of {len(self.data)}: "
            "the file is cut short or damaged; download it again"
        )

    def number(self, code: str, what: str) -> int:
        """A number by its `struct` code."""
        start = self.take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > max_bytes:
            raise BadFile(
                f"{self.path}: {what} has {length} bytes: expected at most {max_bytes}; "
                "the file is damaged, download it again"
            )
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_utf8(what) from error

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; a loop of its own, since vocabularies have half a million."""
        strings, data, at, end = [], self.data, self.at, self._end
        unpack = _LENGTH.unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > end:
                    raise self._beyond(at, what)
                strings.append(str(data[start:at], "utf-8"))
        except struct.error as error:
            raise self._beyond(at + 8, what) from error
        except UnicodeDecodeError as error:
            raise self._not_utf8(f"{what}[{len(strings)}]") from error
        self.at = at
        return strings

    def _not_utf8(self, what: str) -> BadFile:
        return BadFile(f"{self.path}: {what} is not UTF-8: the file is damaged, download it again")


def read_metadata(cursor: Cursor, num_keys: int) -> dict[str, Any]:
    """Keys and values: int, float, bool, str, list of str, or a numpy array of numbers.

    Raises `BadFile`.
    """
    if num_keys > MAX_KEYS:
        raise BadFile(
            f"{cursor.path}: says that it has {num_keys} metadata keys: expected at most {MAX_KEYS}"
        )
    metadata: dict[str, Any] = {}
    for index in range(num_keys):
        key = cursor.string(f"the name of metadata key {index}", MAX_KEY_BYTES)
        where = f"metadata key {show(key)}"
        if not key or key in metadata:
            problem = "appears twice" if key else "is empty"
            raise BadFile(f"{cursor.path}: {where} {problem}: the file is damaged")
        type = cursor.number("I", f"the type of {where}")
        if key == "general.alignment" and type != _UINT32:
            raise BadFile(
                f"{cursor.path}: {where} is of value type {type}: expected {_UINT32} (uint32)"
            )
        metadata[key] = _value(cursor, type, where)
    return metadata


def _value(cursor: Cursor, type: int, where: str) -> Any:
    if type in _NUMBERS:
        return _numbers(cursor, _NUMBERS[type], 1, where)[0].item()
    if type == _STRING:
        return cursor.string(where)
    if type != _ARRAY:
        raise BadFile(f"{cursor.path}: {where} is of the unknown value type {type}: expected 0..12")
    of = cursor.number("I", f"the element type of {where}")
    count = cursor.number("Q", f"the length of {where}")
    if count > MAX_ARRAY_LENGTH:
        raise BadFile(
            f"{cursor.path}: {where} says that it has {count} elements: "
            f"expected at most {MAX_ARRAY_LENGTH}"
        )
    if of == _STRING:
        return cursor.strings(count, where)
    if of not in _NUMBERS:
        kind = "arrays" if of == _ARRAY else f"the unknown value type {of}"
        raise BadFile(
            f"{cursor.path}: {where} is an array of {kind}: expected numbers, booleans or strings"
        )
    return _numbers(cursor, _NUMBERS[of], count, where)


def _numbers(cursor: Cursor, dtype: np.dtype[Any], count: int, where: str) -> np.ndarray:
    start = cursor.take(count * dtype.itemsize, where)
    raw = np.frombuffer(cursor.data[start : cursor.at], np.uint8)
    if dtype.kind == "b" and (raw > 1).any():
        raise BadFile(f"{cursor.path}: {where} holds a boolean of {raw.max()}: expected 0 or 1")
    return raw.view(dtype)
