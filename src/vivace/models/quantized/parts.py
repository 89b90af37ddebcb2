"""The tensors that together are one matrix, read strictly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vivace.errors import BadFile
from vivace.models.config import show
from vivace.models.formats.mapped_file import Identity
from vivace.models.formats.safetensors import TensorInfo

__all__ = ["FLOATS", "Parts", "Source"]

FLOATS = ("float16", "bfloat16", "float32")


class Source(Protocol):
    """Tensors by name, as loading opens them."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...

    def __iter__(self) -> Iterator[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def path(self, name: str) -> Path: ...

    @property
    def identities(self) -> Sequence[Identity]: ...

    def release(self) -> None: ...


class Parts:
    """The tensors of one linear by the last part of their names, such as `qweight`.

    Args:
        source: all tensors.
        module: what their names have in common.
        names: the last parts that are there.
        shape: of the matrix [N, K] that the model asks for.
    """

    def __init__(
        self, source: Source, module: str, names: frozenset[str], shape: tuple[int, int]
    ) -> None:
        self._source, self.module, self.names, self.shape = source, module, names, shape
        self.unread = set(names)

    def has(self, name: str) -> bool:
        return name in self.names

    def info(self, name: str) -> TensorInfo:
        return self._source.info(f"{self.module}.{name}")

    @property
    def num_bytes(self) -> int:
        return sum(self.info(name).num_bytes for name in self.names - {"bias"})

    def fits(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> bool:
        """Whether a tensor is there, of one of the types and of one of the shapes."""
        return self.has(name) and self._mistake(name, dtypes, shapes) is None

    def read(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> np.ndarray:
        """A tensor of one of the types and of one of the shapes. Raises `BadFile`."""
        if not self.has(name):
            there = ", ".join(sorted(self.names))
            raise BadFile(
                f"tensor {show(f'{self.module}.{name}')} is missing beside {there}: expected shape "
                f"{list(shapes[0])}; the file is incomplete, download it again"
            )
        mistake = self._mistake(name, dtypes, shapes)
        if mistake is not None:
            raise self.bad(name, *mistake)
        self.unread.discard(name)
        return self._source[f"{self.module}.{name}"]

    def bad(self, name: str, found: str, expected: str) -> BadFile:
        """The error for a tensor: what is wrong with it and what was expected."""
        full = f"{self.module}.{name}"
        return BadFile(
            f"{self._source.path(full)}: tensor {show(full)} {found}: expected {expected}"
        )

    def _mistake(
        self, name: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
    ) -> tuple[str, str] | None:
        info = self.info(name)
        if info.dtype.name not in dtypes:
            return f"is stored as {info.dtype.name}", " or ".join(dtypes)
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            return f"has shape {list(info.shape)}", f"{wanted} for a matrix {list(self.shape)}"
        assert math.prod(info.shape) * info.dtype.itemsize == info.num_bytes
        return None
