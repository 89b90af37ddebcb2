"""The native quantizer: the reference's bytes on every instruction set; sums of files."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from vivace import _native
from vivace.errors import NativeError
from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.formats.ggml_types import find_type
from vivace.registry import seams
from vivace.techniques.weight_formats._groupwise import quantize
from vivace.techniques.weight_formats._kernels import Codes
from vivace.techniques.weight_formats._panels import pack_panels, unpack_panels

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KERNELS = [
    Codes(bits, group, scale, has_zeros)
    for bits, group, scale, has_zeros in itertools.product(
        (2, 3, 4, 8), (32, 64, 128, None), ("float32", "float16", "bfloat16", "e8m0"), (False, True)
    )
]


def weights_of(kind: str, num_rows: int, num_columns: int) -> np.ndarray:
    rng = np.random.default_rng(num_rows * 1000 + num_columns)
    noise = rng.standard_normal((num_rows, num_columns), dtype=np.float32)
    match kind:
        case "random":
            return noise
        case "zeros":
            return np.where(rng.random(noise.shape) < 0.5, np.float32(0), np.float32(-0.0))
        case "huge":
            return noise * np.float32(8e36)
        case "tiny":  # scales that are denormal as float16
            return noise * np.float32(1e-6)
        case "denormal":  # scales that are denormal as float32, and weights beside normal ones
            scale = np.where(rng.random((num_rows, 1)) < 0.5, 2e-38, 1.6e-37).astype(np.float32)
            return noise * scale
        case "negative":
            return -np.abs(noise) - (rng.random(noise.shape) < 0.05).astype(np.float32)
        case "ties":  # halves of a step, and equal extremes of both signs
            whole = rng.integers(-7, 8, noise.shape).astype(np.float32) * np.float32(0.5)
            whole[:, ::32], whole[:, 1::32] = 4, -4
            return whole
    raise AssertionError(kind)


def native(codes: Codes, weight: np.ndarray, isa: str = "", threads: int = 1) -> np.ndarray:
    out = np.full(_native.matrix_bytes(codes.kernel, *weight.shape), 0xA5, np.uint8)
    bits = weight.view(np.uint16) if weight.dtype == BFLOAT16 else weight
    assert _native.pack_codes(codes.kernel, bits, out, threads, isa)
    return out


def reference(codes: Codes, weight: np.ndarray) -> np.ndarray:
    return pack_panels(*quantize(weight.astype(np.float32), codes), codes.bits).reshape(-1)


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("codes", KERNELS, ids=lambda codes: codes.kernel)
def test_bytes_are_those_of_the_reference(codes: Codes, isa: str) -> None:
    kinds = ["random", "zeros", "tiny", "denormal", "negative", "ties"]
    kinds += ["huge"] if codes.scale_type != "float16" else []
    shapes = [(1, 128), (33, 384)] if codes.group_size else [(1, 1), (17, 7), (33, 133)]
    for kind, shape in itertools.product(kinds, shapes):
        weight = weights_of(kind, *shape)
        np.testing.assert_array_equal(
            native(codes, weight, isa), reference(codes, weight), err_msg=f"{kind} {shape}"
        )


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_narrow_weights_are_widened_exactly(dtype: np.dtype, isa: str) -> None:
    for codes in (Codes(4, 32, "float16", False), Codes(8, None, "float32", True)):
        for kind in ("random", "tiny", "ties"):
            weight = weights_of(kind, 35, 96).astype(dtype)
            np.testing.assert_array_equal(native(codes, weight, isa), reference(codes, weight))


def test_blocks_and_turned_matrices_are_packed_as_what_they_decode_to() -> None:
    int4 = seams()["weight_formats"].create("int4", group_size=64)
    raw = np.random.default_rng(0).integers(0, 256, (40, 4, 34), np.uint8)
    raw[..., 1] = 0x2C  # of a float16 scale: finite
    blocks = BlockTensor(find_type(8, "a test"), raw.reshape(40, -1))
    weight = np.asarray(blocks)
    expected = int4.pack(weight).raw
    np.testing.assert_array_equal(int4.pack(blocks).raw, expected)
    np.testing.assert_array_equal(int4.pack(np.ascontiguousarray(weight.T).T).raw, expected)
    np.testing.assert_array_equal(int4.pack(weight.astype(np.float64)).raw, expected)


def test_bytes_do_not_depend_on_threads() -> None:
    codes, weight = Codes(3, 32, "float16", True), weights_of("random", 517, 96)
    np.testing.assert_array_equal(native(codes, weight, threads=2), native(codes, weight))


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16", "e8m0"])
def test_nan_and_infinity_stay_visible(isa: str, bad: float, scale: str) -> None:
    for has_zeros, group in ((False, 32), (True, None)):
        codes = Codes(4, group, scale, has_zeros)
        weight = weights_of("random", 20, 64)
        weight[17, 40] = bad
        raw = native(codes, weight, isa)
        num_groups = 64 // (group or 64)
        _, scales, _ = unpack_panels(
            raw, weight.shape, num_groups, codes.scale_dtype, has_zeros, codes.bits
        )
        is_bad = scales == 255 if scale == "e8m0" else ~np.isfinite(scales.astype(np.float32))
        expected = np.zeros((20, num_groups), bool)
        expected[17, -1] = True
        np.testing.assert_array_equal(is_bad, expected)


@pytest.mark.parametrize("isa", _native.isa_names())
def test_a_finite_weight_whose_scale_is_not_is_told(isa: str) -> None:
    weight = np.full((3, 32), 1e6, np.float32)
    out = np.empty(_native.matrix_bytes("int4/32/float16", 3, 32), np.uint8)
    assert not _native.pack_codes("int4/32/float16", weight, out, 1, isa)


def test_what_does_not_fit_is_refused() -> None:
    weight, out = np.zeros((64, 48), np.float32), np.zeros(1024, np.uint8)
    with pytest.raises(NativeError, match="do not divide"):
        _native.pack_codes("int4/32/float16", weight, out)
    with pytest.raises(NativeError, match="out has 1024 bytes"):
        _native.pack_codes("int4/row/float16", weight, out)
    with pytest.raises(NativeError, match="no kernel"):
        _native.pack_codes("int5/32/float16", weight, out)
    with pytest.raises(NativeError, match="expected integer codes"):
        _native.pack_codes("float32", weight, np.zeros(weight.nbytes, np.uint8))
    with pytest.raises(NativeError, match="expected float32, float16 or uint16"):
        _native.pack_codes("int4/row/float16", weight.astype(np.float64), np.zeros(2176, np.uint8))


# ---------------------------------------------------------------- sums


def test_a_sum_depends_on_every_byte_and_on_the_length_alone() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 3 * 2**20 + 77, np.uint8)
    total = _native.checksum(data, 1)
    assert _native.checksum(data, 2) == total
    padded = np.concatenate([np.zeros(3, np.uint8), data])[3:]  # at another alignment
    assert _native.checksum(padded) == total
    seen = {total, _native.checksum(data[:-1]), _native.checksum(np.append(data, np.uint8(0)))}
    places = [0, 1, 8, 63, 64, 2**20 - 1, 2**20, len(data) - 78, len(data) - 1]
    for place, bit in itertools.product(places, (1, 128)):
        data[place] ^= bit
        seen.add(_native.checksum(data))
        data[place] ^= bit
    assert len(seen) == 3 + 2 * len(places)
    swapped = np.concatenate([data[2**20 : 2**21], data[: 2**20], data[2**21 :]])
    assert _native.checksum(swapped) not in seen
    assert _native.checksum(data[:0]) != _native.checksum(np.zeros(1, np.uint8))
