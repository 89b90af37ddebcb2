"""Integer codes and blocks of GGUF: right sums, the same bits everywhere, nothing read beyond."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_linear import at_page_end, bits_of, bytes_of, with_nan_around

from vivace import _native
from vivace.errors import NativeError
from vivace.techniques.weight_formats._kernels import BLOCKS, Codes, decode, round_inputs
from vivace.techniques.weight_formats._panels import pack_panels
from vivace.techniques.weight_formats.base import Packed

CODES = [
    Codes(bits, group, scale, zeros)
    for bits, group, zeros in itertools.product((2, 3, 4, 8), (None, 32, 64, 128), (False, True))
    for scale in ("float16",)
] + [
    Codes(4, 32, "bfloat16", False),
    Codes(8, None, "float32", False),
    Codes(4, 64, "float32", True),
    Codes(4, 32, "e8m0", False),
    Codes(3, 128, "e8m0", True),
]
KERNELS = [codes.kernel for codes in CODES] + list(BLOCKS)
MAX_ROWS = 34
BLOCK_BYTES = {"q4_0": (32, 18), "q8_0": (32, 34), "q4_k": (256, 144), "q6_k": (256, 210)}
# Where float16 scales lie in a block.
SCALES_AT = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_isa = pytest.mark.parametrize("isa", _native.isa_names())


def matrix_of(kernel: str, num_rows: int, num_columns: int, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    if kernel in BLOCKS:
        weights, size = BLOCK_BYTES[kernel]
        raw = rng.integers(0, 256, (num_rows, num_columns // weights, size), np.uint8)
        for at in SCALES_AT[kernel]:
            scales = rng.uniform(-0.02, 0.02, raw.shape[:2]).astype(np.float16)
            raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
        return Packed(kernel, (num_rows, num_columns), raw.reshape(num_rows, -1))
    codes = Codes.parse(kernel)
    shape = num_rows, num_columns // (codes.group_size or num_columns)
    values = rng.integers(0, 1 << codes.bits, (num_rows, num_columns), np.uint8)
    values[0], values[-1] = 0, (1 << codes.bits) - 1  # the largest sums of both signs
    zeros = rng.integers(0, 1 << codes.bits, shape, np.uint8) if codes.has_zeros else None
    if codes.scale_type == "e8m0":
        scales = rng.integers(110, 125, shape, np.uint8)
    else:
        scales = rng.uniform(-0.02, 0.02, shape).astype(codes.scale_dtype)
    raw = pack_panels(values, scales, zeros, codes.bits)
    return Packed(kernel, (num_rows, num_columns), raw)


def shapes_of(kernel: str) -> list[tuple[int, int]]:
    """Odd numbers of outputs and inputs, as far as the format has them.

    The second has panels for several at once and a rest, and more inputs than several rows meet at
    a time.
    """
    if kernel in BLOCKS:
        unit = BLOCK_BYTES[kernel][0]
        return [(16, unit), (144, 3 * unit)]
    group = Codes.parse(kernel).group_size
    widths = (1, 1101, 33) if group is None else (group, 1024 + group)
    return list(zip((1, 133, 16), widths, strict=False))


def inputs(num_columns: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((MAX_ROWS, num_columns), np.float32)
    x[1] = 1  # with the extreme codes: the largest sums there are
    x[2] = -1
    x[3] *= 10.0 ** rng.integers(-6, 7, num_columns)
    x[4] = 0
    x[5] *= 1e-33  # below what counts as zero
    x[6, 0] = 1e30
    return x


def linear_of(packed: Packed, bias=None, isa: str = "", threads: int = 1):
    return _native.Linear([(packed, bias)], isa, threads)


@each_isa
@each_kernel
def test_values_are_those_of_the_reference(kernel: str, isa: str) -> None:
    for num_rows, num_columns in shapes_of(kernel):
        packed = matrix_of(kernel, num_rows, num_columns)
        x, bias = inputs(num_columns), np.linspace(-1, 1, num_rows, dtype=np.float32)
        weight = decode(kernel, packed.shape, packed.data).astype(np.float64)
        rounded = round_inputs(kernel, x).astype(np.float64)
        truth = rounded @ weight.T + bias
        scale = np.abs(rounded) @ np.abs(weight).T + np.abs(bias)
        error = np.abs(linear_of(packed, bias, isa)(x) - truth)
        assert (error <= scale * 2.0**-24 * (num_columns / 16 + 8)).all()


@each_kernel
def test_rounding_inputs_costs_what_eight_bits_cost(kernel: str) -> None:
    num_rows, num_columns = shapes_of(kernel)[1]
    packed = matrix_of(kernel, num_rows, num_columns)
    x = inputs(num_columns)[7:]
    weight = decode(kernel, packed.shape, packed.data).astype(np.float64)
    truth = x.astype(np.float64) @ weight.T
    step = np.abs(x).max() / 127  # an input is off by half of it at most
    error = np.abs(linear_of(packed)(x) - truth)
    assert (error <= 0.51 * step * np.abs(weight).sum(1)).all()
    assert np.sqrt((error**2).mean() / (truth**2).mean()) < 0.02


@each_isa
@each_kernel
def test_bits_do_not_depend_on_the_batch(kernel: str, isa: str) -> None:
    num_rows, num_columns = shapes_of(kernel)[1]
    packed = matrix_of(kernel, num_rows, num_columns)
    x, linear = inputs(num_columns), linear_of(packed, isa=isa)
    alone = bits_of(np.concatenate([linear(x[i : i + 1]) for i in range(MAX_ROWS)]))
    for rows in range(1, MAX_ROWS + 1):
        np.testing.assert_array_equal(bits_of(linear(x[:rows])), alone[:rows])


@each_kernel
def test_bits_do_not_depend_on_threads_blocks_of_rows_or_outputs_around(kernel: str) -> None:
    num_columns = shapes_of(kernel)[1][1]
    packed = matrix_of(kernel, 304, num_columns)
    x = np.tile(inputs(num_columns), (16, 1))[:300]
    whole = bits_of(linear_of(packed, threads=3)(x))
    np.testing.assert_array_equal(whole, bits_of(linear_of(packed)(x)))
    for first, last in ((0, 64), (192, 304), (128, 192)):
        part = linear_of(packed[first:last])
        for rows in (1, 5, 300):
            np.testing.assert_array_equal(bits_of(part(x[:rows])), whole[:rows, first:last])


@each_kernel
def test_bits_do_not_depend_on_the_instruction_set(kernel: str) -> None:
    for num_rows, num_columns in shapes_of(kernel):
        packed, x = matrix_of(kernel, num_rows, num_columns), inputs(num_columns)
        x[8, 0], x[9, -1] = np.inf, np.nan
        results = {isa: linear_of(packed, isa=isa)(x) for isa in _native.isa_names()}
        first = results.pop("generic")
        assert np.isfinite(first[:8]).all()
        assert not np.isfinite(first[8:10]).any(), "what is not finite must show"
        for isa, other in results.items():
            np.testing.assert_array_equal(bits_of(other[:8]), bits_of(first[:8]), err_msg=isa)
            np.testing.assert_array_equal(bits_of(other[10:]), bits_of(first[10:]), err_msg=isa)
            assert not np.isfinite(other[8:10]).any()


@each_isa
@each_kernel
def test_rows_are_those_of_the_reference(kernel: str, isa: str) -> None:
    for num_rows, num_columns in shapes_of(kernel):
        packed = matrix_of(kernel, num_rows, num_columns)
        linear = linear_of(packed, isa=isa)
        rows = np.concatenate([linear.row(i) for i in range(num_rows)])
        np.testing.assert_array_equal(rows, decode(kernel, packed.shape, packed.data))


@each_isa
@pytest.mark.parametrize("place", [at_page_end, with_nan_around])
@each_kernel
def test_nothing_around_a_matrix_is_read(kernel: str, place, isa: str) -> None:
    for num_rows, num_columns in shapes_of(kernel):
        packed, x = matrix_of(kernel, num_rows, num_columns), inputs(num_columns)
        placed = Packed(kernel, packed.shape, place(packed.data))
        for rows in (1, 9):
            np.testing.assert_array_equal(
                bits_of(linear_of(placed, isa=isa)(x[:rows])),
                bits_of(linear_of(packed, isa=isa)(x[:rows])),
            )


def test_groups_of_different_formats_read_the_same_rows() -> None:
    kernels = ["q4_k", "q6_k", "int4/32/float16", "bfloat16", "int8/row/float32", "float32"]
    x = inputs(512)
    parts = []
    for index, kernel in enumerate(kernels):
        if kernel in ("bfloat16", "float32"):
            values = np.random.default_rng(index).standard_normal((16, 512)).astype(np.float32)
            data = bytes_of(values).view(np.uint16)[1::2] if kernel == "bfloat16" else values
            parts.append(Packed(kernel, (16, 512), np.ascontiguousarray(data)))
        else:
            parts.append(matrix_of(kernel, 16, 512, index))
    for rows in (1, 3, MAX_ROWS):
        group = _native.Linear([(part, None) for part in parts], "", 2)(x[:rows])
        alone = np.concatenate([linear_of(part)(x[:rows]) for part in parts], axis=1)
        np.testing.assert_array_equal(bits_of(group), bits_of(alone))


@pytest.mark.parametrize(
    ("kernel", "shape", "message"),
    [
        ("int4/32/float16", (16, 100), "do not divide into groups of 32"),
        ("q4_k", (16, 128), "do not divide into blocks of 256"),
        ("q4_0", (17, 32), "expected a multiple of 16"),
        ("int4/32", (16, 32), "no kernel for the format"),
        ("int4/33/float16", (16, 33), "no kernel for the format"),
        ("int4/32/float64", (16, 32), "no kernel for the format"),
        ("int4/32/float16/zeros/", (16, 32), "no kernel for the format"),
        ("int4/32/float16", (16, 64), "expected"),
        ("int4/32/float16", (0, 32), "expected"),
    ],
)
def test_what_does_not_fit_is_refused(kernel: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(NativeError, match=message):
        linear_of(Packed(kernel, shape, np.zeros(288, np.uint8)))
