"""compressed-tensors checkpoints, as llm-compressor writes them: packed, int8, float8 and 4-bit
floats."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from vivace.errors import BadFile, UnsupportedModel
from vivace.models.config import Config
from vivace.models.formats.safetensors import TensorInfo
from vivace.models.quantized.compressed_tensors_config import Group, read_groups
from vivace.models.quantized.matrices import CodedMatrix, QuantizedMatrix, unpack_codes
from vivace.models.quantized.parts import FLOATS, Parts

__all__ = ["CompressedTensors"]

Shape = tuple[int, ...]
_FLOAT4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_ZEROS = "weight_zero_point"
_NVFP4, _MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_ELEMENTS = {"int-quantized": "int8", "float-quantized": "float8_e4m3fn"}


class CompressedTensors:
    """Reads each matrix as the one group of the config that its tensors fit.

    Of a matrix [N, K], with `weight_scale` [N, G], [N, 1] or [1]:
    - pack-quantized: `weight_packed` [N, K bits / 32] int32, each row a stream of codes + 2^(bits -
      1); `weight_zero_point` [N bits / 32, G] likewise, each column one; `weight_shape`;
    - int-quantized: `weight` int8 and `weight_zero_point` int8; float-quantized: `weight` float8;
    - nvfp4-pack-quantized: `weight_packed` [N, K / 2] uint8, the low half first, float8 scales that
      are divided by `weight_global_scale`; mxfp4-pack-quantized: scales 2^(byte - 127).

    Raises:
        BadFile: a field of the config has a wrong value.
        UnsupportedModel: a format that is not read.
    """

    names = frozenset(
        f"weight_{part}"
        for part in ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
    )
    unused = frozenset(
        f"{what}_{part}"
        for what in ("input", "output", "q", "k", "v")
        for part in ("scale", "zero_point", "global_scale")
    )

    def __init__(self, config: Config) -> None:
        self.groups = read_groups(config)

    def is_quantized(self, parts: dict[str, TensorInfo]) -> bool:
        is_coded = "weight" in parts and parts["weight"].dtype.name in _ELEMENTS.values()
        return is_coded or not self.names.isdisjoint(parts)

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        """Raises `BadFile`, `UnsupportedModel`."""
        group = self._group(parts)
        if group.group_size is not None and parts.shape[1] % group.group_size:
            raise BadFile(
                f"matrix '{parts.module}' {list(parts.shape)}: groups of {group.group_size} do not "
                "divide its rows; config and weights are not of one model"
            )
        if parts.has("weight_g_idx"):
            raise parts.bad("weight_g_idx", "is there", "none, as the config names no actorder")
        match group.format:
            case "pack-quantized" | "int-quantized":
                return _codes(parts, group)
            case _:
                return _floats(parts, group)

    def _group(self, parts: Parts) -> Group:
        """The group that the tensors fit; where there is only one, it says what is wrong."""
        if len(self.groups) == 1:
            return self.groups[0]
        fitting = [group for group in self.groups if _fits(parts, group)]
        if len(fitting) != 1:
            raise UnsupportedModel(
                f"the tensors {', '.join(sorted(parts.names))} of '{parts.module}' fit "
                f"{len(fitting)} of {len(self.groups)} config_groups: expected one; use the "
                "unquantized checkpoint"
            )
        return fitting[0]


def _elements(parts: Parts, group: Group) -> tuple[str, tuple[str, ...], Shape]:
    """Name, types and shape of the tensor that holds the codes."""
    num_rows, num_columns = parts.shape
    if group.format == "pack-quantized":
        return "weight_packed", ("int32",), (num_rows, -(-num_columns * group.bits // 32))
    if group.format in _ELEMENTS:
        return "weight", (_ELEMENTS[group.format],), parts.shape
    return "weight_packed", ("uint8",), (num_rows, -(-num_columns // 2))


def _shapes(parts: Parts, group: Group) -> tuple[Shape, ...]:
    """Shapes that scales may have, and zeros that are not packed."""
    if group.is_per_tensor:
        return (1,), (), (1, 1)
    num_rows, num_columns = parts.shape
    num_groups = num_columns // (group.group_size or num_columns)
    return (num_rows, num_groups), *(((num_rows,),) if num_groups == 1 else ())


def _fits(parts: Parts, group: Group) -> bool:
    name, dtypes, shape = _elements(parts, group)
    return (
        parts.fits(name, dtypes, shape)
        and parts.fits("weight_scale", _scale_dtypes(group), *_shapes(parts, group))
        and parts.has(_ZEROS) != group.is_symmetric
        and parts.has("weight_global_scale") == (group.format == _NVFP4)
    )


def _scale_dtypes(group: Group) -> tuple[str, ...]:
    return {_NVFP4: ("float8_e4m3fn",), _MXFP4: ("uint8",)}.get(group.format, FLOATS)


def _read_scales(parts: Parts, group: Group) -> np.ndarray:
    """Scales as stored: [N, G]."""
    return _per_row(parts.read("weight_scale", _scale_dtypes(group), *_shapes(parts, group)), parts)


def _per_row(values: np.ndarray, parts: Parts) -> np.ndarray:
    """[N, G] of what may be of a row, or of the matrix."""
    num_rows = parts.shape[0]
    if values.size == 1:
        return np.broadcast_to(values.reshape(1, 1), (num_rows, 1))
    return values.reshape(num_rows, -1)


def _codes(parts: Parts, group: Group) -> CodedMatrix:
    name, dtypes, shape = _elements(parts, group)
    elements, scales = parts.read(name, dtypes, shape), _read_scales(parts, group)
    num_columns = parts.shape[1]
    is_packed = group.format == "pack-quantized"
    bits = group.bits if is_packed else 8
    if is_packed:
        stored = parts.read("weight_shape", ("int64", "int32"), (2,))
        if tuple(stored) != parts.shape:
            raise parts.bad("weight_shape", f"says {stored.tolist()}", f"{list(parts.shape)}")
    zeros = _read_zeros(parts, group, bits)

    def read(first: int, last: int) -> np.ndarray:
        rows = elements[first:last]
        return unpack_codes(rows, bits, num_columns) if is_packed else _from_int8(rows, bits)

    size = group.group_size or num_columns
    return CodedMatrix(parts.shape, bits, size, scales, zeros, parts.num_bytes, read)


def _read_zeros(parts: Parts, group: Group, bits: int) -> np.ndarray | None:
    """Zeros [N, G] as codes, or None where there are none."""
    if group.is_symmetric and not parts.has(_ZEROS):
        return None
    shapes = _shapes(parts, group)
    # Files of before 2025, and all that do not pack weights, hold them as they are.
    is_plain = parts.has(_ZEROS) and parts.info(_ZEROS).dtype == np.int8
    if is_plain or group.format != "pack-quantized" or group.is_per_tensor:
        zeros = _per_row(_from_int8(parts.read(_ZEROS, ("int8",), *shapes), bits), parts)
        if zeros.max(initial=0) >= 1 << bits:
            raise parts.bad(_ZEROS, "is out of range", f"numbers of {bits} bits")
    else:
        num_rows, num_groups = shapes[0]
        words = parts.read(_ZEROS, ("int32",), (-(-num_rows * bits // 32), num_groups))
        zeros = unpack_codes(words.T, bits, num_rows).T
    if group.is_symmetric and (zeros != 1 << bits - 1).any():
        raise parts.bad(_ZEROS, "is not zero", "zeros, as the config says symmetric")
    return zeros


def _from_int8(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Signed numbers -> codes, whose middle means zero."""
    return numbers.view(np.uint8) + np.uint8(1 << bits - 1)


def _floats(parts: Parts, group: Group) -> QuantizedMatrix:
    """Elements of 4 or 8 bits times scales."""
    name, dtypes, shape = _elements(parts, group)
    elements, scales = parts.read(name, dtypes, shape), _read_scales(parts, group)
    num_columns = parts.shape[1]
    if parts.has(_ZEROS):  # old files write them all the same
        types = ("int8", "uint8", "float8_e4m3fn", *FLOATS)
        if parts.read(_ZEROS, types, *_shapes(parts, group)).astype(np.float32).any():
            raise parts.bad(_ZEROS, "is not zero", "zeros, as floats have no others")
    if group.format == _MXFP4:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    scales = scales.astype(np.float32)
    if group.format == _NVFP4:
        divisor = parts.read("weight_global_scale", ("float32",), (1,), ())
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = scales / divisor.reshape(())

    def decode(first: int, last: int) -> np.ndarray:
        rows = elements[first:last]
        is_whole = group.format == "float-quantized"
        values = rows if is_whole else _FLOAT4[unpack_codes(rows, 4, num_columns)]
        grouped = values.astype(np.float32).reshape(last - first, scales.shape[1], -1)
        with np.errstate(over="ignore", invalid="ignore"):  # found by who looks for NaN
            return (grouped * scales[first:last, :, None]).reshape(last - first, num_columns)

    stored_as = group.format.removesuffix("-pack-quantized").replace("float-quantized", "float8")
    return QuantizedMatrix(stored_as, parts.shape, parts.num_bytes, decode)
