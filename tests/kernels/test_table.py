"""Compressed bfloat16: what formats decode to, and the bits of products with what they decode."""

from __future__ import annotations

from typing import get_args

import ml_dtypes
import numpy as np
import pytest

from vivace import _native
from vivace.errors import NativeError
from vivace.registry import Seam
from vivace.techniques.weight_formats._tables import TableKernel, pack_codes, unpack_codes
from vivace.techniques.weight_formats.base import Packed, WeightFormat
from vivace.techniques.weight_formats.table import Preset

FORMATS = Seam("vivace.techniques.weight_formats")
PRESETS = get_args(Preset)
NAMES = [*PRESETS, "codebook3", "codebook4", "no_outliers", "own8", "own64"]
MAX_ROWS = 40
# in, out: odd numbers of outputs, more and less than a chunk of 1024 weights, and one step.
SHAPES = [(128, 1), (256, 37), (1152, 9), (2176, 19)]
ODD_SHAPES = [(1, 1), (33, 7), (517, 61), (1040, 26)]  # where a row shares one scale


def make(name: str, **options) -> WeightFormat:
    if name == "no_outliers":
        return FORMATS.create("codebook", outlier_share=0.0, **options)
    if name.startswith("codebook"):
        return FORMATS.create("codebook", bits=int(name[-1]), **options)
    if name.startswith("own"):
        values = tuple(np.sinh(np.linspace(-2, 2.2, int(name[3:]))).tolist())
        return FORMATS.create("table", values=values, **options)
    return FORMATS.create("table", preset=name, **options)


def sample(name: str, num_in: int, num_out: int, seed: int = 1, **options):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((num_out, num_in), dtype=np.float32)
    weight[0] *= 1e-30
    weight[-1, : num_in // 2] = 0
    x = rng.standard_normal((MAX_ROWS, num_in), dtype=np.float32)
    weight_format = make(name, **options)
    packed = weight_format.pack(weight * np.float32(0.05))
    # At an address that is aligned to nothing, with bytes around that decode to other numbers.
    around = np.full(packed.num_bytes + 258, 0xFF, np.uint8)
    around[129 : 129 + packed.num_bytes] = packed.raw
    placed = Packed(packed.kernel, packed.shape, around[129 : 129 + packed.num_bytes])
    return weight_format, placed, x


def assert_is_the_decoded_matrix(weight_format: WeightFormat, packed: Packed, x, isa: str) -> None:
    decoded = weight_format.dequant(packed)
    bias = np.random.default_rng(2).standard_normal(packed.shape[0], dtype=np.float32)
    matrix = Packed("bfloat16", packed.shape, decoded.astype(ml_dtypes.bfloat16))
    plain = _native.Linear([(matrix, bias)], isa, 1)
    linear = _native.Linear([(packed, bias)], isa, 1)
    rows = np.concatenate([linear.row(index) for index in range(packed.shape[0])])
    np.testing.assert_array_equal(rows, decoded)
    for count in range(1, MAX_ROWS + 1):
        got, wanted = linear(x[:count]), plain(x[:count])
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_products_have_the_bits_of_the_decoded_matrix(name, isa, num_in, num_out) -> None:
    assert_is_the_decoded_matrix(*sample(name, num_in, num_out), isa)


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", ["fp6", "fp8", "fp8_e5m2", "llm_fp4", "codebook3", "codebook4"])
@pytest.mark.parametrize(("num_in", "num_out"), ODD_SHAPES)
def test_rows_of_any_length_that_share_one_scale(name, isa, num_in, num_out) -> None:
    assert_is_the_decoded_matrix(*sample(name, num_in, num_out), isa)


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("scale_type", ["float32", "float16", "bfloat16", "e8m0", "e4m3"])
@pytest.mark.parametrize("group_size", ["row", 16, 32, 64, 128])
@pytest.mark.parametrize("name", ["own8", "fp4", "fp6", "fp8", "afpq3"])
def test_every_scale_type_and_group(name, group_size, scale_type, isa) -> None:
    if group_size == 16 and name not in ("own8", "fp4"):
        group_size = 32
    options = {"group_size": group_size, "scale_type": scale_type}
    weight_format, packed, x = sample(name, 1280, 11, **options)
    assert_is_the_decoded_matrix(weight_format, packed, x[:5], isa)
    assert weight_format.grid.bits_per_weight(1280) == 8 * packed.num_bytes / (11 * 1280)


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("values", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"])
def test_every_code_and_every_small_scale(values, isa) -> None:
    """Decoded natively as by the reference, among them scales whose weights are denormal."""
    kernel = TableKernel(values, 32, "e8m0")
    codes = (np.arange(256) % (1 << kernel.bits)).astype(np.uint8)
    codes = codes[np.isfinite(kernel.table[codes])]
    codes = np.resize(codes, (230, 256))
    scales = np.repeat(np.arange(230, dtype=np.uint8)[:, None], 8, axis=1)
    packed = Packed(kernel.kernel, codes.shape, kernel.pack(codes, scales, np.float32(1)))
    linear = _native.Linear([(packed, None)], isa, 1)
    decoded = make("fp4").dequant(packed)
    rows = np.concatenate([linear.row(index) for index in range(len(codes))])
    np.testing.assert_array_equal(rows, decoded)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_threads_or_on_outputs_around(name) -> None:
    weight_format, packed, x = sample(name, 512, 213)
    del weight_format
    many = np.tile(x, (8, 1))[:300]
    whole = _native.Linear([(packed, None)], "", 2)(many)
    np.testing.assert_array_equal(whole[:MAX_ROWS], _native.Linear([(packed, None)], "", 1)(x))
    for first, last in ((0, 1), (5, 213), (100, 107)):
        part = _native.Linear([(packed[first:last], None)], "", 1)
        for count in (1, 5, 300):
            np.testing.assert_array_equal(part(many[:count]), whole[:count, first:last])


@pytest.mark.parametrize("name", NAMES)
def test_declared_bits_are_those_of_the_bytes(name) -> None:
    weight_format = make(name)
    for num_in, num_out in ((2048, 3), (4096, 5)):
        weight = np.random.default_rng(3).standard_normal((num_out, num_in), dtype=np.float32)
        packed = weight_format.pack(weight)
        assert packed.num_bytes == weight_format.num_bytes(weight)
        bits = weight_format.grid.bits_per_weight(num_in)
        assert 8 * packed.num_bytes == round(bits * num_in * num_out, 6)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_codes_come_back(bits) -> None:
    codes = np.random.default_rng(4).integers(0, 1 << bits, (5, 77), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 3 * 4 * bits)
    np.testing.assert_array_equal(unpack_codes(packed, bits)[:, :77], codes)


def test_refused_names_and_bytes() -> None:
    raw = np.zeros(1 << 12, np.uint8)
    bad = [
        ("table/e2m1/32", "no kernel"),
        ("table/e2m2/32/float16", "no kernel"),
        ("table/1,2,3/32/float16", "no kernel"),
        ("table/1,2,3,4,5,6,7,inf/32/float16", "no kernel"),
        ("table/1,2,3,4,5,6,7,8x/32/float16", "no kernel"),
        ("table/e2m1/48/float16", "no kernel"),
        ("table/e2m1/32/int8", "no kernel"),
        ("table/e3m2/16/float16", "no kernel"),
        ("table/e4m3/32/float16/signed", "no kernel"),
        ("table/e2m1/32/float16/unsigned", "no kernel"),
        ("codebook/5/0", "no kernel"),
        ("codebook/4/-1", "no kernel"),
        ("codebook/4/65", "65 outliers in rows of 64 weights"),
        ("table/e2m1/128/float16", "do not divide into groups of 128"),
        ("table/e2m1/64/float16", "expected"),
    ]
    for kernel, message in bad:
        with pytest.raises((NativeError, ValueError), match=message):
            _native.Linear([(Packed(kernel, (2, 64), raw), None)])
    with pytest.raises(NativeError, match="pairs of groups of 16"):
        _native.Linear([(Packed("table/e2m1/16/e4m3", (2, 48), raw), None)])
