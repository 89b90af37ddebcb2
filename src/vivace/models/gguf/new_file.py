"""A new GGUF file from metadata and tensors; it appears whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivace.errors import UnsupportedModel
from vivace.models.formats.unfinished import whole_file

__all__ = ["NewTensor", "Storage", "TypedValue", "restored", "typed", "write_file"]

# A value, its type's number and, of an array, that of its elements.
TypedValue = tuple[Any, int, int | None]

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


class Storage(StrEnum):
    """How matrices are stored; vectors and routers are float32 always."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"

    @property
    def file_type(self) -> int:
        """What `general.file_type` says."""
        return _FILE_TYPES[self]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write.

    Args:
        shape: slowest axis first.
        type: the name of its type, such as `Q8_0`.
        make: gives its bytes, as an array of any type.
    """

    name: str
    shape: Sequence[int]
    type: str
    make: Callable[[], np.ndarray]


def restored(
    name: str, shape: Sequence[int], storage: Storage, make: Callable[[], np.ndarray]
) -> NewTensor:
    """A tensor stored as asked, where `make` gives its values as float32."""
    kind = _kind(name, shape, storage)
    return NewTensor(name, shape, kind.upper(), lambda: _stored(make(), kind))


def _kind(name: str, shape: Sequence[int], storage: Storage) -> Storage:
    """The type of one tensor; rows that do not divide into blocks keep 16 bits."""
    if len(shape) < 2 or "ffn_gate_inp" in name:
        return Storage.F32
    return Storage.F16 if storage is Storage.Q8_0 and shape[-1] % 32 else storage


def _stored(array: np.ndarray, kind: Storage) -> np.ndarray:
    match kind:
        case Storage.F32:
            return array
        case Storage.F16:
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if not np.isfinite(half).all():
                raise UnsupportedModel("a weight is not finite as f16: store the model as bf16")
            return half
        case Storage.BF16:
            return array.astype(ml_dtypes.bfloat16).view(np.uint16)
        case Storage.Q8_0:
            from gguf import GGMLQuantizationType, quants

            return quants.quantize(array, GGMLQuantizationType.Q8_0)


def typed(value: Any) -> TypedValue:
    """A value with the type that llama.cpp expects: whole numbers have a sign in lists only."""
    from gguf import GGUFValueType

    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        of = GGUFValueType.get_type(value[0]) if value else None
        return value, GGUFValueType.ARRAY, of
    if isinstance(value, int) and not isinstance(value, bool):
        return value, GGUFValueType.UINT32, None
    return value, GGUFValueType.get_type(value), None


def write_file(
    path: Path, metadata: Mapping[str, TypedValue], tensors: Sequence[NewTensor]
) -> None:
    """Tensor by tensor: no more than one is in memory.

    Args:
        path: of the new file; one that is there is replaced.
        metadata: by key; `general.architecture` and `general.alignment` mean what they say.
        tensors: in the order of the file.
    Raises:
        OSError: the file cannot be written.
    """
    from gguf import GGUFEndian, GGUFWriter  # imported late: few runs write

    architecture = metadata["general.architecture"][0]
    with whole_file(path) as unfinished:
        writer = GGUFWriter(unfinished, architecture, endianess=GGUFEndian.LITTLE)
        try:
            _add_metadata(writer, metadata)
            _add_tensors(writer, tensors)
        finally:
            writer.close()


def _add_metadata(writer: Any, metadata: Mapping[str, TypedValue]) -> None:
    from gguf import GGUFValueType

    for key, (value, type, of) in metadata.items():
        if type == GGUFValueType.ARRAY and not len(value):
            raise UnsupportedModel(
                f"metadata key '{key}' is an empty list, which the gguf package cannot write"
            )
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif key != "general.architecture":  # the writer has it
            kind = GGUFValueType(type)
            writer.add_key_value(key, value, kind, None if of is None else GGUFValueType(of))


def _add_tensors(writer: Any, tensors: Sequence[NewTensor]) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for tensor in tensors:
        type = GGMLQuantizationType[tensor.type]
        block_size, block_bytes = GGML_QUANT_SIZES[type]
        num_bytes = math.prod(tensor.shape) // block_size * block_bytes
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, num_bytes, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.make())
