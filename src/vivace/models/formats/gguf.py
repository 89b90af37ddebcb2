"""GGUF files as views of mapped memory, trusted only after every byte is accounted for.

A file is: magic and version, counts, metadata (typed keys and values), descriptions of tensors,
data. Tensors lie in the order of their descriptions, each padded to the alignment. A large model
may be split into files `name-00001-of-00003.gguf`, ...; the first has the metadata.
"""

from __future__ import annotations

import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.config import show
from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.formats.ggml_types import GgmlType, find_type
from vivace.models.formats.gguf_header import Cursor, read_metadata
from vivace.models.formats.mapped_file import map_file

__all__ = ["GgufFile", "GgufTensorInfo"]

MAX_TENSORS = 2**17  # twice as many as 61 layers of 256 experts in tensors of their own
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # llama.cpp's limit
MAX_PARTS = 512  # each stays open, and a process may usually open 1024 files
DEFAULT_ALIGNMENT = 32
_PREFIX_BYTES = 24  # magic, version and two counts
_VERSIONS = (2, 3)
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_OTHER_MAGICS = {
    b"lmgg": "a ggml file of before GGUF",
    b"fmgg": "a GGMF file of before GGUF",
    b"tjgg": "a GGJT file of before GGUF",
    b"algg": "a GGLA adapter of before GGUF",
    b"PK\x03\x04": "a zip file, perhaps a pickle",
    b"vers": "perhaps a Git LFS pointer: fetch what it points to",
}


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """A tensor's type, shape (slowest axis first, as in numpy) and place.

    `offset` counts from the start of the file that is number `part` of the split.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    part: int = 0


class GgufFile:
    """One file, or a whole split of which any part is given.

    `metadata` is the first part's: int, float, bool, str, list of str, or a read-only numpy array
    for an array of numbers. Nothing is allocated from numbers in the file that its size does not
    bear out. The maps live as long as any of the arrays.

    Raises `BadFile` and `UnsupportedModel`.
    """

    def __init__(self, path: Path) -> None:
        first = _Part(path, 0)
        count = _split_number(first, "split.count", 1)
        parts = [first] if count <= 1 else _open_split(first, count)
        if count <= 1 and (match := _PART_NAME.fullmatch(path.name)) and int(match["count"]) > 1:
            raise BadFile(
                f"{path}: is named as one of {int(match['count'])} parts but is not a part of a "
                "split: rename it, or merge parts that were cut by another tool"
            )
        self.path = parts[0].path
        self.paths = [part.path for part in parts]
        self.identities = [part.file.identity for part in parts]
        self.metadata = parts[0].metadata
        self.tensors: dict[str, GgufTensorInfo] = {}
        self._parts = [part.file for part in parts]
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    other = self.paths[self.tensors[name].part].name
                    raise BadFile(f"{part.path}: tensor {show(name)} is also in {other}")
                self.tensors[name] = info

    def array(self, name: str) -> np.ndarray | BlockTensor:
        """A tensor as it is stored, read-only; more than two axes become [all but the last, last].

        Quantized matrices are a `BlockTensor`; a quantized vector is decoded to float32.
        """
        info = self.tensors[name]
        shape = info.shape
        if len(shape) > 2:
            shape = (math.prod(shape[:-1]), shape[-1])
        raw = self.raw(name)
        if info.type.dtype is not None:
            flat = raw.view(info.type.dtype)
            if not flat.flags.aligned:
                flat = flat.copy()  # kernels read whole elements
                flat.flags.writeable = False
            return flat.reshape(shape)
        row_bytes = info.shape[-1] // info.type.block_size * info.type.block_bytes
        blocks = BlockTensor(info.type, raw.reshape(math.prod(info.shape[:-1]), row_bytes))
        return blocks if len(shape) == 2 else blocks.decode().reshape(shape)

    def release(self) -> None:
        for file in self._parts:
            file.release()

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they are in the file, read-only."""
        info = self.tensors[name]
        if not info.num_bytes:
            return np.zeros(0, np.uint8)
        return np.frombuffer(self._parts[info.part].data, np.uint8, info.num_bytes, info.offset)


class _Part:
    """One file, checked on its own."""

    def __init__(self, path: Path, index: int) -> None:
        self.path = path
        self.file = map_file(path, _PREFIX_BYTES, "GGUF")
        self.data = self.file.data
        _check_magic(path, self.data)
        cursor = Cursor(path, self.data)
        cursor.take(8, "the magic")
        num_tensors = cursor.number("Q", "the number of tensors")
        num_keys = cursor.number("Q", "the number of metadata keys")
        if num_tensors > MAX_TENSORS:
            raise BadFile(
                f"{path}: says that it has {num_tensors} tensors: expected at most {MAX_TENSORS}"
            )
        self.metadata = read_metadata(cursor, num_keys)
        self.tensors = _read_tensors(cursor, num_tensors, self._alignment(), index)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if alignment == 0 or alignment & (alignment - 1):
            raise BadFile(
                f"{self.path}: 'general.alignment' is {alignment}: expected a power of two"
            )
        return alignment


def _check_magic(path: Path, data: mmap.mmap) -> None:
    magic, version = data[:4], int.from_bytes(data[4:8], "little")
    if magic != b"GGUF":
        kind = _OTHER_MAGICS.get(magic)
        raise BadFile(
            f"{path}: starts with {magic!r}, not with GGUF{'; it is ' + kind if kind else ''}: "
            "download a GGUF file, or convert the model again"
        )
    if version in _VERSIONS:
        return
    if int.from_bytes(data[4:8], "big") in (1, *_VERSIONS):
        raise UnsupportedModel(
            f"{path}: is a GGUF file for big-endian machines: use the little-endian one"
        )
    if version == 0:
        raise BadFile(f"{path}: GGUF version 0 does not exist: the file is damaged")
    raise UnsupportedModel(
        f"{path}: GGUF version {version} is not supported: expected {_VERSIONS[0]} or "
        f"{_VERSIONS[1]}; convert the model again"
    )


# ---------------------------------------------------------------- tensors


def _read_tensors(
    cursor: Cursor, num_tensors: int, alignment: int, part: int
) -> dict[str, GgufTensorInfo]:
    tensors: dict[str, GgufTensorInfo] = {}
    for index in range(num_tensors):
        info = _read_tensor(cursor, index, part)
        if info.name in tensors:
            raise BadFile(f"{cursor.path}: tensor {show(info.name)} appears twice")
        tensors[info.name] = info
    start = _padded(cursor.at, alignment)
    end = _check_offsets(cursor.path, list(tensors.values()), alignment, start, len(cursor.data))
    if len(cursor.data) > _padded(end, alignment):
        raise BadFile(
            f"{cursor.path}: has {len(cursor.data)} bytes but its tensors end at {end}: "
            "data was appended; download it again"
        )
    return {
        name: GgufTensorInfo(
            name, info.type, info.shape, start + info.offset, info.num_bytes, info.part
        )
        for name, info in tensors.items()
    }


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _read_tensor(cursor: Cursor, index: int, part: int) -> GgufTensorInfo:
    """A description; its offset counts from the start of the data, and is not checked yet."""
    name = cursor.string(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {show(name)}"
    where = f"{cursor.path}: {what}"
    if not name:
        raise BadFile(f"{cursor.path}: tensor {index} has an empty name: the file is damaged")
    num_dimensions = cursor.number("I", what)
    if num_dimensions > MAX_DIMENSIONS:
        raise BadFile(f"{where} has {num_dimensions} dimensions: expected at most {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("q", what) for _ in range(num_dimensions))[::-1]
    if any(size < 0 for size in shape) or math.prod(shape) >= 2**63:
        raise BadFile(f"{where} has shape {list(shape)}: expected sizes of 0 or more that fit")
    type = find_type(cursor.number("I", what), where)
    row = shape[-1] if shape else 1
    if row % type.block_size:
        raise BadFile(
            f"{where} has rows of {row} weights: expected a multiple of the {type.block_size} "
            f"of a block of {type.name}"
        )
    num_bytes = math.prod(shape) // type.block_size * type.block_bytes
    return GgufTensorInfo(name, type, shape, cursor.number("Q", what), num_bytes, part)


def _check_offsets(
    path: Path, tensors: list[GgufTensorInfo], alignment: int, start: int, size: int
) -> int:
    """Tensors must follow each other, padded to the alignment; returns where the last one ends.

    The padding of the last may be missing, as llama.cpp allows.
    """
    end, before = start, "the header"
    for info in tensors:
        where = f"{path}: tensor {show(info.name)} at byte {info.offset} of the data"
        expected = _padded(end - start, alignment)
        if info.offset % alignment:
            raise BadFile(f"{where}: expected a multiple of the alignment {alignment}")
        if info.offset != expected:
            kind = "overlaps" if info.offset < expected else "leaves a gap after"
            raise BadFile(
                f"{where} {kind} {before}: expected {expected}; the file is damaged, "
                "download it again"
            )
        end, before = start + info.offset + info.num_bytes, f"tensor {show(info.name)}"
        if end > size:
            raise BadFile(
                f"{where} would end at byte {end} of {size}: the file is cut short; download it "
                "again"
            )
    return end if tensors else min(start, size)


# ---------------------------------------------------------------- splits


def _split_number(part: _Part, key: str, default: int | None = None) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        problem = "is missing" if value is None else f"is {show(value)}"
        raise BadFile(f"{part.path}: '{key}' {problem}: expected a whole number of 0 or more")
    return value


def _open_split(given: _Part, count: int) -> list[_Part]:
    """All parts of the split that `given` belongs to, in order."""
    match = _PART_NAME.fullmatch(given.path.name)
    if match is None or int(match["count"]) != count:
        raise BadFile(
            f"{given.path}: is part of a split into {count}: expected a name that ends in "
            f"-00001-of-{count:05d}.gguf, give it back its name"
        )
    if count > MAX_PARTS:
        raise BadFile(f"{given.path}: is split into {count} files: expected at most {MAX_PARTS}")
    names = [f"{match['stem']}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    paths = [given.path.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BadFile(
            f"{given.path.parent}: part {missing[0]} is missing ({len(missing)} of {count}): "
            "download the model again"
        )
    parts = [_Part(path, index) for index, path in enumerate(paths)]
    for index, part in enumerate(parts):
        for key, wanted in (("split.no", index), ("split.count", count)):
            if (value := _split_number(part, key)) != wanted:
                raise BadFile(
                    f"{part.path}: '{key}' is {value}: expected {wanted}; "
                    "the parts are not of one split"
                )
    num_tensors = sum(len(part.tensors) for part in parts)
    wanted = _split_number(parts[0], "split.tensors.count")
    if num_tensors != wanted:
        raise BadFile(
            f"{parts[0].path}: the parts have {num_tensors} tensors but 'split.tensors.count' is "
            f"{wanted}: the parts are not of one split"
        )
    return parts
