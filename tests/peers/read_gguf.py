"""The metadata of a GGUF file, read on trust: llama.cpp's own files are not damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_metadata"]

_NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0].item()
        kind, count = self.number("I"), self.number("Q")
        return [self.text() for _ in range(count)] if kind == _STRING else self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        found = np.frombuffer(self.data, _NUMBERS[kind], count, self.at)
        self.at += found.nbytes
        return found


def read_metadata(path: Path) -> dict[str, Any]:
    reader = _Reader(path.read_bytes())
    _magic, _version, _tensors, count = (reader.number(form) for form in "IIQQ")
    return {reader.text(): reader.value(reader.number("I")) for _ in range(count)}
