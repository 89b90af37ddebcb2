"""Matrices as quantizers store them, packed bit by bit, beside the weights that they mean."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivace.models.formats.safetensors import SafetensorsFile

Tensors = dict[str, np.ndarray]
CODES = {
    "uint8": "U8", "int8": "I8", "int32": "I32", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


@dataclass
class Quantized:
    """Tensors of a linear by the last part of their names, and its weights [N, K] float32."""

    tensors: Tensors
    weight: np.ndarray


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row as one number whose lowest bits are the first code, cut into words: [R, W] int32."""
    num_words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * index for index, code in enumerate(row))
        rows.append([number >> 32 * word & 0xFFFFFFFF for word in range(num_words)])
    return np.array(rows, np.uint32).reshape(len(codes), num_words).view(np.int32)


def meaning(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: Any) -> np.ndarray:
    """(code - zero) * scale, one weight at a time; zeros and scales are [N, G]."""
    out = np.zeros(codes.shape, np.float32)
    for n, k in np.ndindex(*codes.shape):
        g = group_of[k]
        out[n, k] = np.float32(int(codes[n, k]) - int(zeros[n, g])) * np.float32(scales[n, g])
    return out


def some_scales(rng: Any, shape: tuple[int, int], num_columns: int, bits: int, dtype: Any) -> Any:
    size = 2.0 / num_columns**0.5 / 2 ** (bits - 1)
    return (size * rng.uniform(0.5, 1.5, shape)).astype(dtype)


def gptq(
    shape: tuple[int, int],
    *,
    seed: int = 0,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    is_symmetric: bool = False,
    is_scattered: bool = False,
    scale_type: Any = np.float16,
) -> Quantized:
    rng, (num_rows, num_columns) = np.random.default_rng(seed), shape
    group = num_columns if group == -1 else group
    group_of = np.arange(num_columns) // group
    if is_scattered:
        rng.shuffle(group_of)
    num_groups = -(-num_columns // group)
    codes = rng.integers(0, 2**bits, shape)
    zeros = rng.integers(0, 2**bits, (num_rows, num_groups))
    if is_symmetric:
        zeros[:] = 2 ** (bits - 1)
    else:
        zeros.flat[:2] = 0, 2**bits - 1  # the first wraps in version 1
    scales = some_scales(rng, zeros.shape, num_columns, bits, scale_type)
    fields = (zeros - (version == 1)) % 2**bits
    tensors = {
        "qweight": np.ascontiguousarray(stream(codes, bits).T),
        "qzeros": stream(fields.T, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": group_of.astype(np.int32),
    }
    return Quantized(tensors, meaning(codes, zeros, scales, group_of))


def awq(shape: tuple[int, int], *, seed: int = 0, group: int = 32) -> Quantized:
    rng, (num_rows, num_columns) = np.random.default_rng(seed), shape
    group = num_columns if group == -1 else group
    codes = rng.integers(0, 16, shape)
    zeros = rng.integers(0, 16, (num_rows, num_columns // group))
    scales = some_scales(rng, zeros.shape, num_columns, 4, np.float16)

    def words(values: np.ndarray) -> np.ndarray:
        """[N, M] -> [M, N / 8]; the lowest nibble first: outputs 0, 2, 4, 6, 1, 3, 5, 7."""
        out = np.zeros((values.shape[1], num_rows // 8), np.uint32)
        for m, word in np.ndindex(*out.shape):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[m, word] |= np.uint32(int(values[8 * word + output, m]) << 4 * place)
        return out.view(np.int32)

    tensors = {
        "qweight": words(codes),
        "qzeros": words(zeros),
        "scales": np.ascontiguousarray(scales.T),
    }
    return Quantized(tensors, meaning(codes, zeros, scales, np.arange(num_columns) // group))


def packed(
    shape: tuple[int, int],
    *,
    seed: int = 0,
    bits: int = 4,
    group: int = 32,
    is_symmetric: bool = True,
    are_zeros_packed: bool = True,
    scale_type: Any = ml_dtypes.bfloat16,
) -> Quantized:
    """pack-quantized; a group of -1 is a row."""
    rng, (num_rows, num_columns) = np.random.default_rng(seed), shape
    group = num_columns if group == -1 else group
    middle = 2 ** (bits - 1)
    numbers = rng.integers(-middle, middle, shape)
    zeros = rng.integers(-middle, middle, (num_rows, num_columns // group))
    zeros = np.zeros_like(zeros) if is_symmetric else zeros
    scales = some_scales(rng, zeros.shape, num_columns, bits, scale_type)
    tensors = {
        "weight_packed": stream(numbers + middle, bits),
        "weight_scale": scales,
        "weight_shape": np.array(shape, np.int64),
    }
    if not is_symmetric:
        words = np.ascontiguousarray(stream((zeros + middle).T, bits).T)
        tensors["weight_zero_point"] = words if are_zeros_packed else zeros.astype(np.int8)
    return Quantized(tensors, meaning(numbers, zeros, scales, np.arange(num_columns) // group))


def int8(
    shape: tuple[int, int], *, seed: int = 0, is_symmetric: bool = True, is_per_tensor: bool = False
) -> Quantized:
    rng, (num_rows, num_columns) = np.random.default_rng(seed), shape
    numbers = rng.integers(-128, 128, shape)
    zeros = rng.integers(-128, 128, (num_rows, 1)) * (not is_symmetric)
    scales = some_scales(rng, (num_rows, 1), num_columns, 8, ml_dtypes.bfloat16)
    scales = np.full_like(scales, scales[0, 0]) if is_per_tensor else scales
    tensors = {
        "weight": numbers.astype(np.int8),
        "weight_scale": scales[0] if is_per_tensor else scales,
    }
    if not is_symmetric:
        tensors["weight_zero_point"] = zeros.astype(np.int8)
    return Quantized(tensors, meaning(numbers, zeros, scales, np.zeros(num_columns, int)))


def float8(shape: tuple[int, int], *, seed: int = 0, is_per_tensor: bool = False) -> Quantized:
    rng = np.random.default_rng(seed)
    elements = rng.uniform(-448, 448, shape).astype(ml_dtypes.float8_e4m3fn)
    scales = some_scales(rng, (shape[0], 1), shape[1], 9, np.float32)
    scales = scales[:1, 0] if is_per_tensor else scales
    tensors = {"weight": elements, "weight_scale": scales}
    return Quantized(tensors, elements.astype(np.float32) * scales)


FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def float4(shape: tuple[int, int], *, seed: int = 0, is_mx: bool = False) -> Quantized:
    """nvfp4-pack-quantized, or mxfp4-pack-quantized."""
    rng, (num_rows, num_columns) = np.random.default_rng(seed), shape
    group = 32 if is_mx else 16
    codes = rng.integers(0, 16, shape)
    tensors: Tensors = {"weight_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8)}
    num_groups = num_columns // group
    if is_mx:
        exponents = rng.integers(120, 125, (num_rows, num_groups))
        tensors["weight_scale"] = exponents.astype(np.uint8)
        scales = (2.0 ** (exponents - 127)).astype(np.float32)
    else:
        stored = rng.uniform(1, 400, (num_rows, num_groups)).astype(ml_dtypes.float8_e4m3fn)
        tensors["weight_scale"] = stored
        tensors["weight_global_scale"] = np.array([3000.0], np.float32)
        scales = stored.astype(np.float32) / np.float32(3000.0)
    values = np.array([*FLOAT4, *(-value for value in FLOAT4)], np.float32)[codes]
    return Quantized(tensors, values * np.repeat(scales, group, axis=1))


# ---------------------------------------------------------------- checkpoints


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(file: Path) -> Tensors:
    """Copies of all tensors, 8-bit floats too."""
    opened = SafetensorsFile(file)
    return {name: np.array(opened.array(name)) for name in opened.tensors}


def quantize_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    quantize: Callable[..., Quantized],
    is_chosen: Callable[[str], bool] = lambda name: "proj" in name,
) -> dict[str, np.ndarray]:
    """Replace matrices of a checkpoint by quantized random ones; returns what they mean."""
    file = path / "model.safetensors"
    tensors: Tensors = {}
    weights: dict[str, np.ndarray] = {}
    for index, (name, array) in enumerate(read_tensors(file).items()):
        if array.ndim != 2 or not is_chosen(name):
            tensors[name] = array
            continue
        made = quantize(array.shape, seed=index)
        weights[name] = made.weight
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in made.tensors.items()}
    write_tensors(file, tensors)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": dict(config)}))
    return weights


def kind(name: str, group: int = 32) -> tuple[dict[str, Any], Callable[..., Quantized]]:
    """The config of checkpoints of a kind, and what makes their matrices."""
    match name:
        case "gptq":
            config = {"quant_method": name, "bits": 4, "group_size": group, "sym": False}
            return config | {"desc_act": False}, partial(gptq, group=group)
        case "awq":
            config = {"quant_method": name, "bits": 4, "group_size": group, "version": "gemm"}
            return config | {"zero_point": True}, partial(awq, group=group)
        case "packed":
            weights = int_weights(4, group, False)
            made = partial(packed, group=group, is_symmetric=False)
            return group_config("pack-quantized", weights), made
        case "int8":
            return group_config("int-quantized", int_weights(8, -1)), int8
        case "float8":
            return group_config("float-quantized", float_weights(8)), float8
    raise AssertionError(name)


def group_config(format: str, weights: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A config of compressed-tensors with one group."""
    scheme = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        **fields,
    }


def int_weights(bits: int, group: int = 32, is_symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": is_symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def float_weights(bits: int, group: int | None = None, strategy: str = "channel") -> dict[str, Any]:
    return int_weights(bits) | {"type": "float", "strategy": strategy, "group_size": group}
