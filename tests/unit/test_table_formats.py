"""Packing into tables, codebooks and block floats: the rules of each, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from vivace import _native
from vivace.errors import BadFile, InvalidOption
from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.formats.ggml_types import TYPES
from vivace.registry import Seam
from vivace.techniques.weight_formats._tables import Codebook, TableKernel
from vivace.techniques.weight_formats.base import Packed

FORMATS = Seam("vivace.techniques.weight_formats")
# Relative rms error of normal weights, and bits per weight of rows of 4096.
QUALITY = {
    "nf4": (0.093, 4.25),
    "fp4": (0.102, 4.5),
    "fp6": (0.054, 6 + 16 / 4096),
    "fp8": (0.028, 8 + 32 / 4096),
    "mxfp4": (0.118, 4.25),
    "mxfp8": (0.033, 8.25),
    "nvfp4": (0.097, 4.5 + 32 / 4096),
    "llm_fp4": (0.125, 4 + 32 / 4096),
    "afpq4": (0.096, 5),
    "afpq3": (0.2, 4),
    "iq4_nl": (0.085, 4.5),
}


def table(preset: str, **options):
    return FORMATS.create("table", preset=preset, **options)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def is_finite(packed: Packed) -> bool:
    return _native.Program(64, 64, "float32", 1, None).is_finite(packed)


@pytest.mark.parametrize("preset", QUALITY)
def test_presets_are_as_good_and_as_small_as_they_should_be(preset: str) -> None:
    weight, weight_format = normal(16, 4096), table(preset)
    error = weight_format.dequant(weight_format.pack(weight)) - weight
    most, bits = QUALITY[preset]
    relative = np.sqrt(np.square(error).mean() / np.square(weight).mean())
    assert 0.8 * most < relative < most
    assert weight_format.grid.bits_per_weight(4096) == bits


def test_values_of_a_table_are_kept() -> None:
    """A matrix of values times a power of two comes back, whatever the format's scales."""
    for preset in ("nf4", "bnb_fp4", "fp4", "fp6", "fp6_e2m3", "fp8", "fp8_e5m2", "mxfp4", "mxfp8"):
        weight_format = table(preset)
        values = weight_format.kernel.table
        values = values[np.isfinite(values)]
        weight = np.resize(values, (3, 256)) * np.float32(0.25)
        weight[:, ::32] = np.abs(values).max() / 4  # so that every group's scale is 0.25
        wanted = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(weight_format.dequant(weight_format.pack(weight)), wanted)


def test_scales_of_mx_are_the_largest_power_of_two_below() -> None:
    """OCP MX: floor(log2 amax) less the largest exponent of the type; above 6 values saturate."""
    weight = np.zeros((4, 32), np.float32)
    weight[:, 0] = (6, 7.9, 8, 1e-30)
    packed = table("mxfp4").pack(weight)
    assert packed.data[:, 0].tolist() == [127, 127, 128, 127 - 2 - 100]
    assert table("mxfp4").dequant(packed)[:3, 0].tolist() == [6, 6, 8]
    assert table("mxfp4").pack(np.zeros((1, 32), np.float32)).data[0, 0] == 0


def test_scales_of_nvfp4_share_a_factor_of_the_matrix() -> None:
    weight = normal(5, 64)
    weight[3, 7] = -60.0
    packed = table("nvfp4").pack(weight)
    factors = np.ascontiguousarray(packed.data[:, :4]).view(np.float32)[:, 0]
    np.testing.assert_array_equal(factors, np.float32(60) / np.float32(6 * 448))
    scales = packed.data[:, [4, 5, 22, 23]].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert scales.max() == scales[3, 0] == 448
    assert table("nvfp4").dequant(packed)[3, 7] == -60


def test_a_matrix_of_denormals_is_zero() -> None:
    weight = normal(8, 64) * np.float32(1e-36)
    for preset in ("nf4", "nvfp4", "fp8"):
        packed = table(preset, scale_type="e4m3" if preset == "nvfp4" else "float32").pack(weight)
        decoded = table(preset).dequant(packed)
        linear = _native.Linear([(packed, None)], "", 1)
        rows = np.concatenate([linear.row(index) for index in range(8)])
        np.testing.assert_array_equal(rows, decoded)
    assert not table("nvfp4").dequant(table("nvfp4").pack(weight)).any()


def test_afpq_scales_each_sign_by_its_own_extreme() -> None:
    weight = np.linspace(-3, 12, 32, dtype=np.float32)[None]
    packed = table("afpq4").pack(weight)
    scales = np.ascontiguousarray(packed.data[0, :4]).view(np.float16)
    assert scales.tolist() == [2, 0.5]
    decoded = table("afpq4").dequant(packed)[0]
    assert (decoded[0], decoded[-1]) == (-3, 12)


def test_ties() -> None:
    """To the even code of a float type, to the lower value of another table."""
    weight = np.zeros((1, 32), np.float32)
    weight[0, :6] = (6, 2.5, 3.5, 5, -2.5, 0.25)
    fp4 = table("fp4")
    assert fp4.dequant(fp4.pack(weight))[0, :6].tolist() == [6, 2, 4, 4, -2, 0]
    own = table("fp4", values=(-4.0, -2.0, 0.0, 1.0, 2.0, 3.0, 5.0, 6.0))
    weight[0, :6] = (6, 2.5, 4, 0.5, -1, -3)
    assert own.dequant(own.pack(weight))[0, :6].tolist() == [6, 2, 3, 0, -2, -4]


@pytest.mark.parametrize("preset", ["nf4", "fp4", "fp6", "fp8", "mxfp4", "nvfp4", "afpq4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(preset: str, value: float) -> None:
    weight = normal(3, 64)
    assert is_finite(table(preset).pack(weight))
    weight[1, 5] = value
    assert not is_finite(table(preset).pack(weight))


def test_scales_that_overflow_are_refused() -> None:
    weight = normal(2, 64) * np.float32(1e7)
    with pytest.raises(
        InvalidOption, match="a scale is not finite as float16: use scale_type 'bfloat16'"
    ):
        table("nf4").pack(weight)
    assert is_finite(table("nf4", scale_type="bfloat16").pack(weight))


@pytest.mark.parametrize("values", ["e4m3", "e5m2"])
def test_codes_of_nan_are_refused(values: str) -> None:
    kernel = TableKernel(values, 32, "float16")
    scales = np.ones((2, 2), np.float16)
    codes = np.full((2, 64), 0x38, np.uint8)
    assert is_finite(Packed(kernel.kernel, (2, 64), kernel.pack(codes, scales, np.float32(1))))
    for code in (0x7F, 0xFF):
        codes[1, 63] = code
        assert not is_finite(
            Packed(kernel.kernel, (2, 64), kernel.pack(codes, scales, np.float32(1)))
        )


def test_refused_options() -> None:
    for values in (
        (1.0, 2.0),
        (0.0, *range(1, 16)),
        (*[-1.0] * 8,),
        (np.nan, *[-1.0, 1.0] * 4),
        (1e39, *[-1.0, 1.0, 0.5] * 5),
    ):
        with pytest.raises(InvalidOption, match="8, 16 or 64 finite ones"):
            table("nf4", values=tuple(float(value) for value in values))
    for preset in ("fp6", "fp8", "afpq4"):
        with pytest.raises(InvalidOption, match="expected 32, 64, 128 or 'row'"):
            table(preset, group_size=16)
    for kind, columns, size in ((table("nf4"), 96, 64), (table("nvfp4"), 48, 16)):
        with pytest.raises(
            InvalidOption, match=f"groups of {size} do not divide rows of {columns}"
        ):
            kind.pack(normal(2, columns))
        with pytest.raises(
            InvalidOption, match=f"groups of {size} do not divide rows of {columns}"
        ):
            kind.num_bytes(normal(2, columns))
    for options in ({"outlier_share": 0.2}, {"outlier_share": -0.1}, {"max_iterations": 0}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            FORMATS.create("codebook", **options)


def test_packing_again_keeps_what_is_packed() -> None:
    for weight_format in (table("nf4"), table("nvfp4"), FORMATS.create("codebook")):
        packed = weight_format.pack(normal(4, 256))
        assert weight_format.pack(packed) is packed
        other = table("fp8").pack(packed)
        np.testing.assert_allclose(
            table("fp8").dequant(other), weight_format.dequant(packed), rtol=0.07, atol=0.02
        )


# ---------------------------------------------------------------- codebooks


def test_outliers_are_kept_as_they_are() -> None:
    weight, codebook = normal(6, 1024), FORMATS.create("codebook", bits=3)
    packed = codebook.pack(weight)
    assert packed.kernel == "codebook/3/4"
    decoded = codebook.dequant(packed)
    largest = np.argsort(-np.abs(weight), axis=1)[:, :4]
    np.testing.assert_array_equal(
        np.take_along_axis(decoded, largest, 1),
        np.take_along_axis(weight, largest, 1).astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def test_rows_of_few_values_are_exact() -> None:
    values = np.array([-3, -1, 0, 0.5, 1, 2, 4, 7], np.float32)
    choices = np.random.default_rng(2).integers(0, 8, (5, 512))
    weight = np.take_along_axis(np.stack([values * (row + 1) for row in range(5)]), choices, 1)
    codebook = FORMATS.create("codebook", bits=4)
    error = np.abs(codebook.dequant(codebook.pack(weight)) - weight)
    assert (error <= np.abs(weight) / 256).all()


def test_clusters_are_better_than_even_steps_and_do_not_depend_on_pieces() -> None:
    weight, codebook = normal(9, 512), FORMATS.create("codebook", outlier_share=0.0)
    packed = codebook.pack(weight)
    error = np.square(codebook.dequant(packed) - weight).mean() / np.square(weight).mean()
    assert np.sqrt(error) < 0.097  # the best 16 levels of a normal distribution: 0.0975
    alone = np.concatenate([codebook.pack(weight[row : row + 1]).data for row in range(9)])
    np.testing.assert_array_equal(packed.data, alone)


def test_codebooks_show_what_is_not_finite_and_refuse_long_rows() -> None:
    codebook = FORMATS.create("codebook")
    for share, value in ((0.0045, np.nan), (0.0045, np.inf), (0.0, np.nan), (0.0, -np.inf)):
        weight = normal(3, 256)
        weight[2, 9] = value
        packed = FORMATS.create("codebook", outlier_share=share).pack(weight)
        assert not is_finite(packed)
    with pytest.raises(InvalidOption, match="rows of 65568 weights are too long for outliers"):
        codebook.pack(normal(1, 65568))
    assert Codebook.parse("codebook/4/7") == Codebook(4, 7)


@pytest.mark.parametrize("kernel", ["table/e1m2/32/float16", "codebook/4/4"])
def test_what_no_format_writes_is_refused_when_it_is_decoded(kernel: str) -> None:
    """Kernels know more floats than formats, and read over columns beyond the row."""
    num_bytes = _native.matrix_bytes(kernel, 2, 64)
    packed = Packed(kernel, (2, 64), np.full(num_bytes, 0x3C, np.uint8))
    with pytest.raises(BadFile, match=r"is no table of values|of column 15420 of 64"):
        FORMATS.create("float32").pack(packed)


# ---------------------------------------------------------------- block floats


@pytest.mark.parametrize("bits", [4, 8])
def test_block_floats_share_the_exponent_of_the_largest(bits: int) -> None:
    weight = normal(16, 256)
    block_float = FORMATS.create("block_float", mantissa_bits=bits, group_size=64)
    decoded = block_float.dequant(block_float.pack(weight))
    blocks, groups = decoded.reshape(16, 4, 64), weight.reshape(16, 4, 64)
    most = np.abs(groups).max(-1, keepdims=True)
    # The largest mantissa is 2^(bits - 1) - 1, and reaches the largest weight within half a step.
    step = np.exp2(np.ceil(np.log2(most / (2 ** (bits - 1) - 0.5))))
    np.testing.assert_array_equal(blocks / step, np.round(blocks / step))
    assert (np.abs(blocks - groups) <= step / 2).all()
    assert block_float.grid.bits_per_weight(256) == bits + 8 / 64


# ---------------------------------------------------------------- blocks of GGUF


@pytest.mark.parametrize(
    "name", ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "MXFP4"]
)
def test_blocks_are_multiplied_where_they_lie(name: str) -> None:
    kind = next(item for item in TYPES.values() if item.name == name)
    num_in, num_out = 1280, 19
    size = num_in // kind.block_size * kind.block_bytes
    raw = np.random.default_rng(3).integers(0, 256, (num_out, size), dtype=np.uint8)
    blocks = raw.reshape(num_out, -1, kind.block_bytes)
    for first in {"Q2_K": [80, 82], "Q3_K": [108], "MXFP4": []}.get(name, [0, 2]):
        if first == 0 or name in ("Q4_1", "Q5_1", "Q5_K", "Q2_K", "Q3_K"):
            blocks[..., first : first + 2] = np.array([0.03], np.float16).view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = 120
    tensor, stored = BlockTensor(kind, raw), FORMATS.create("stored", decoded_blocks="mapped")
    packed = stored.pack(tensor)
    assert np.shares_memory(packed.raw, raw)
    assert stored.num_bytes(tensor) == raw.nbytes
    decoded = tensor.decode(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored.dequant(packed), decoded.astype(np.float32))
    x = normal(23, num_in)
    for isa in _native.isa_names():
        linear = _native.Linear([(packed, None)], isa, 1)
        plain = _native.Linear([(Packed("bfloat16", packed.shape, decoded), None)], isa, 1)
        np.testing.assert_array_equal(linear.row(7)[0], decoded[7].astype(np.float32))
        for count in (1, 4, 7, 23):
            np.testing.assert_array_equal(linear(x[:count]), plain(x[:count]))
    assert is_finite(packed)
