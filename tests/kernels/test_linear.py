"""Linear layers: right values, the same bits on every path, and no byte read beyond a matrix."""

from __future__ import annotations

import mmap

import ml_dtypes
import numpy as np
import pytest

from vivace import _native
from vivace.errors import NativeError
from vivace.techniques.weight_formats.base import Packed

STORAGE = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "bfloat16_float32": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float16_float32": np.dtype(np.float16),
}
SHAPES = [(1, 1), (2, 9), (31, 5), (33, 7), (64, 16), (517, 61), (1040, 26)]  # in, out
LONG = (9000, 9)  # more steps than a packed tile holds, in every format
MAX_ROWS = 40


def bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def at_page_end(array: np.ndarray) -> np.ndarray:
    """A copy that ends where unreadable memory begins: a read past it is a crash."""
    import ctypes

    size = array.nbytes
    page = mmap.PAGESIZE
    length = -(-size // page) * page
    area = mmap.mmap(-1, length + page)
    libc = ctypes.CDLL(None, use_errno=True)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(base + length), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(area, np.uint8, size, length - size)
    copy[:] = bytes_of(array)
    return copy


def with_nan_around(array: np.ndarray) -> np.ndarray:
    """The bytes of `array` at an address that is aligned to nothing, NaN before and after."""
    padded = np.full(array.nbytes + 258, 0xFF, np.uint8)
    middle = padded[129 : 129 + array.nbytes]
    middle[:] = bytes_of(array)
    return middle


def sample(seed: int, num_in: int, num_out: int, storage: np.dtype):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((MAX_ROWS, num_in), dtype=np.float32)
    weight = rng.standard_normal((num_out, num_in), dtype=np.float32).astype(storage)
    bias = rng.standard_normal(num_out, dtype=np.float32)
    return x, weight, bias


def make(name: str, weight: np.ndarray, bias: np.ndarray | None, isa: str = "", threads: int = 1):
    return _native.Linear([(Packed(name, weight.shape, weight), bias)], isa, threads)


def expected(name: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    rounded = x if name.endswith("_float32") else x.astype(STORAGE[name])
    return rounded.astype(np.float64) @ weight.astype(np.float64).T + bias


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize(("num_in", "num_out"), [*SHAPES, LONG])
def test_values_are_those_of_the_format(name: str, isa: str, num_in: int, num_out: int) -> None:
    x, weight, bias = sample(1, num_in, num_out, STORAGE[name])
    truth = expected(name, x, weight, bias)
    # Each of in_features rounded sums is off by at most half a unit of float32.
    scale = np.abs(x).astype(np.float64) @ np.abs(weight.astype(np.float64)).T + np.abs(bias)
    linear = make(name, weight, bias, isa)
    for rows in (1, 3, MAX_ROWS):
        error = np.abs(linear(x[:rows]) - truth[:rows])
        assert (error <= scale[:rows] * 2.0**-24 * (num_in / 16 + 6)).all()


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_bits_do_not_depend_on_the_batch(name: str, isa: str, num_in: int, num_out: int) -> None:
    x, weight, bias = sample(2, num_in, num_out, STORAGE[name])
    linear = make(name, weight, bias, isa)
    alone = bits_of(np.concatenate([linear(x[i : i + 1]) for i in range(MAX_ROWS)]))
    for rows in range(1, MAX_ROWS + 1):
        np.testing.assert_array_equal(bits_of(linear(x[:rows])), alone[:rows])


@pytest.mark.parametrize("name", STORAGE)
def test_bits_do_not_depend_on_blocks_of_rows_or_on_outputs_around(name: str) -> None:
    num_in, num_out = 96, 213
    x, weight, _ = sample(3, num_in, num_out, STORAGE[name])
    many = np.tile(x, (8, 1))[:300]  # several blocks of rows
    whole = bits_of(make(name, weight, None, threads=2)(many))
    np.testing.assert_array_equal(whole[:MAX_ROWS], bits_of(make(name, weight, None)(x)))
    for first, last in ((0, 1), (1, 8), (5, 213), (100, 107)):
        part = make(name, weight[first:last], None)
        for rows in (1, 5, 300):
            np.testing.assert_array_equal(
                bits_of(part(many[:rows])), whole[:rows, first:last], strict=True
            )


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize(("num_in", "num_out"), [*SHAPES, LONG])
def test_bits_do_not_depend_on_the_instruction_set(name: str, num_in: int, num_out: int) -> None:
    x, weight, bias = sample(4, num_in, num_out, STORAGE[name])
    x[1] *= 1e-38  # denormals are zero everywhere
    x[2] *= 1e30
    x[3, 0] = np.inf
    with np.errstate(all="ignore"):
        weight[0] = (weight[0].astype(np.float32) * 1e-38).astype(weight.dtype)
    results = {isa: make(name, weight, bias, isa)(x) for isa in _native.isa_names()}
    first = results.pop("generic")
    for isa, other in results.items():
        np.testing.assert_array_equal(np.isnan(other), np.isnan(first), err_msg=isa)
        finite = ~np.isnan(first)
        np.testing.assert_array_equal(bits_of(other)[finite], bits_of(first)[finite], err_msg=isa)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, weight, bias = sample(5, 517, 300, STORAGE["bfloat16"])
    for rows in (1, 7, MAX_ROWS):
        np.testing.assert_array_equal(
            bits_of(make("bfloat16", weight, bias, threads=threads)(x[:rows])),
            bits_of(make("bfloat16", weight, bias)(x[:rows])),
        )


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize("place", [at_page_end, with_nan_around])
def test_nothing_around_a_matrix_is_read(name: str, isa: str, place) -> None:
    for num_in, num_out in SHAPES:
        x, weight, bias = sample(6, num_in, num_out, STORAGE[name])
        packed = Packed(name, weight.shape, place(weight))
        placed = _native.Linear([(packed, bias)], isa, 1)
        plain = make(name, weight, bias, isa)
        for rows in (1, 2, 5, MAX_ROWS):
            np.testing.assert_array_equal(bits_of(placed(x[:rows])), bits_of(plain(x[:rows])))


def test_groups_put_outputs_side_by_side() -> None:
    x, weight, bias = sample(7, 70, 50, STORAGE["bfloat16"])
    cuts = [(0, 30), (30, 33), (33, 50)]
    parts = [Packed("bfloat16", (b - a, 70), weight[a:b]) for a, b in cuts]
    biases = [bias[:30], None, bias[33:]]
    group = _native.Linear(list(zip(parts, biases, strict=True)), "", 2)
    alone = bias.copy()
    alone[30:33] = 0
    for rows in (1, 6, 20):
        np.testing.assert_array_equal(group(x[:rows]), make("bfloat16", weight, alone)(x[:rows]))


def test_bad_arguments_are_refused() -> None:
    _, weight, bias = sample(8, 16, 4, STORAGE["bfloat16"])
    with pytest.raises(NativeError, match="no kernel for the format 'int5/32/float16'"):
        make("int5/32/float16", weight, None)
    with pytest.raises(NativeError, match="has 126 bytes: expected 128"):
        _native.Linear([(Packed("bfloat16", (4, 16), bytes_of(weight)[:-2]), None)])
    with pytest.raises(NativeError, match="another length"):
        make("bfloat16", weight, bias[:3])
    with pytest.raises(NativeError, match="17 columns: expected 16"):
        make("bfloat16", weight, None)(np.zeros((1, 17), np.float32))
    with pytest.raises(ValueError, match="instruction set 'sse9' is unknown: use one of generic"):
        make("bfloat16", weight, None, "sse9")
