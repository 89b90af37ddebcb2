"""Quantized blocks: the gguf package's bits on every instruction set, in every type, and packed."""

from __future__ import annotations

import tracemalloc
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import assert_same_bits, dequantized, random_blocks
from native_cases import executor, llama, run, sequence_of

from vivace import _native
from vivace.blocks import MlpBlock
from vivace.errors import BadFile, InvalidOption, NativeError, UnsupportedModel
from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.formats.ggml_types import TYPES
from vivace.registry import Seam

BLOCKS = [item.name for item in TYPES.values() if item.dtype is None]
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FORMATS = Seam("vivace.techniques.weight_formats")
# Bytes of a block that hold its scales: (first, float16 or one byte).
SCALES: dict[str, list[int]] = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
}
ZEROS, DENORMALS = [0x0000, 0x8000], [0x0001, 0x8001, 0x0200, 0x03FF, 0x83FF]
NORMALS, LARGEST = [0x0400, 0x8400, 0x3C00, 0x1234], [0x7BFF, 0xFBFF]
INFINITE, NANS = [0x7C00, 0xFC00], [0x7E00, 0xFE00, 0x7C01]


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", BLOCKS)
def test_random_blocks_decode_to_the_reference_bits(name, isa):
    raw = random_blocks(name, 33, 1024, seed=1)
    wanted = dequantized(raw, name)
    for dtype in (np.dtype(np.float32), *HALVES):
        out = np.empty(wanted.shape, dtype)
        bits = out.view(np.uint16) if dtype == HALVES[1] else out
        bits.view(np.uint8)[...] = 0xFF  # NaN
        _native.decode_blocks(name, raw, bits, 2, isa)
        with np.errstate(all="ignore"):
            assert_same_bits(out, wanted.astype(dtype))


@pytest.mark.parametrize("isa", _native.isa_names())
@pytest.mark.parametrize("name", SCALES)
def test_special_scales_decode_to_the_reference_bits(name, isa):
    raw = random_blocks(name, 16, 256, seed=2)
    _, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    specials = [*ZEROS, *DENORMALS, *NORMALS, *LARGEST, *INFINITE, *NANS]
    for bits in specials:
        for other in (None, 0x8001, 0x3C00):
            blocks = raw.copy().reshape(-1, block_bytes)
            for place, value in zip(SCALES[name], (bits, other), strict=False):
                if value is not None:
                    blocks[:, place : place + 2] = np.array([value], "<u2").view(np.uint8)
            wanted = dequantized(blocks.reshape(raw.shape), name)
            for dtype in (np.dtype(np.float32), *HALVES):
                out = np.zeros(wanted.shape, dtype)
                as_bits = out.view(np.uint16) if dtype == HALVES[1] else out
                _native.decode_blocks(name, blocks.reshape(raw.shape), as_bits, 1, isa)
                with np.errstate(all="ignore"):
                    assert_same_bits(out, wanted.astype(dtype))


@pytest.mark.parametrize("isa", _native.isa_names())
def test_every_exponent_of_mxfp4(isa):
    """Among them those whose weights are denormal or infinite."""
    raw = np.random.default_rng(3).integers(0, 256, (256, 17), dtype=np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1:17] = np.arange(0, 256, 17)[:16]  # every level in both halves
    wanted = dequantized(raw, "MXFP4")
    assert (np.abs(wanted[wanted != 0]) < np.finfo(np.float32).tiny).any()
    for dtype in (np.dtype(np.float32), *HALVES):
        out = np.zeros(wanted.shape, dtype)
        bits = out.view(np.uint16) if dtype == HALVES[1] else out
        _native.decode_blocks("MXFP4", raw, bits, 1, isa)
        with np.errstate(all="ignore"):
            assert_same_bits(out, wanted.astype(dtype))


def test_decoding_is_the_same_on_any_number_of_threads():
    raw = random_blocks("Q5_K", 300, 512)
    tensor = BlockTensor(TYPES[13], raw)
    one = tensor.decode(threads=1)
    assert_same_bits(tensor.decode(threads=3), one)
    assert_same_bits(tensor.decode(), one)


def test_other_types_are_cast_from_float32():
    tensor = BlockTensor(TYPES[8], random_blocks("Q8_0", 4, 64))
    np.testing.assert_array_equal(
        np.asarray(tensor, np.float64), tensor.decode().astype(np.float64)
    )


def test_what_a_block_tensor_cannot_do():
    tensor = BlockTensor(TYPES[2], random_blocks("Q4_0", 4, 64))
    for index in (1, (0, 1), slice(None, None, 2), slice(None, None, -1), [0, 1]):
        with pytest.raises(TypeError, match="ranges of rows"):
            tensor[index]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="decoded"):
        np.array(tensor, copy=False)
    with pytest.raises(UnsupportedModel, match="Q4_0 cannot be used transposed"):
        _ = tensor.T


def test_native_arguments_are_checked():
    raw, out = random_blocks("Q4_0", 2, 64), np.zeros((2, 64), np.float32)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("Q4_9", raw, out), "there is no block format 'Q4_9': expected one of Q4_0, "),
        (("Q4_0", raw[:, :35].copy(), out), "a row has 35 bytes: expected a multiple of the 18"),
        (("Q4_0", raw, out[:1]), r"out has the shape \[1, 64\]: expected \[2, 64\]"),
        (("Q4_0", raw, np.zeros((2, 32), np.float32)), r"expected \[2, 64\]"),
        (("Q4_0", raw, out.astype(np.float64)), "expected float32, float16 or uint16"),
        (("Q4_0", raw, out.astype(np.int16)), "expected float32, float16 or uint16"),
        (("Q4_0", raw, out, 0), "threads is 0"),
        (("Q4_0", raw, out, 1, "sse9"), "'sse9'"),
    ]
    for arguments, message in cases:
        with pytest.raises(NativeError, match=message):
            _native.decode_blocks(*arguments)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        _native.decode_blocks("Q4_0", raw, out)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "MXFP4"])
def test_formats_pack_blocks(name, storage):
    values = np.random.default_rng(4).normal(size=(40, 256)).astype(np.float32)
    if name == "Q6_K":  # the gguf package cannot write it
        raw = random_blocks(name, 40, 256)
        raw[:, 208:210] = np.array([0.01], "<f2").view(np.uint8)
    else:
        raw = gguf.quants.quantize(values, GGMLQuantizationType[name])
    tensor = BlockTensor(next(t for t in TYPES.values() if t.name == name), raw)
    packed = FORMATS.create(storage).pack(tensor).data
    wanted = dequantized(raw, name).astype(getattr(ml_dtypes, storage, storage))
    assert_same_bits(packed, wanted)


def test_packing_makes_no_second_copy():
    """A large matrix is converted a few rows at a time, from blocks and from floats alike."""
    blocks = BlockTensor(TYPES[8], np.zeros((8192, 34 * 64), np.uint8))  # 16 M weights
    floats = np.zeros(blocks.shape, np.float32)
    bfloat16 = FORMATS.create("bfloat16")
    for matrix in (blocks, floats):
        tracemalloc.start()
        packed = bfloat16.pack(matrix).data
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert packed.nbytes == 2 * 8192 * 2048
        assert peak < packed.nbytes * 1.5


def test_packing_says_what_overflows_and_leaves_what_was_not_finite():
    float16, bfloat16 = FORMATS.create("float16"), FORMATS.create("bfloat16")
    raw = random_blocks("MXFP4", 3, 64)
    raw[:, ::17] = 120
    raw[2, 17] = 200  # a scale of 2^73
    tensor = BlockTensor(TYPES[39], raw)
    assert np.isfinite(bfloat16.pack(tensor).data.astype(np.float32)).all()
    with pytest.raises(InvalidOption, match="not finite as float16"):
        float16.pack(tensor)
    with pytest.raises(InvalidOption, match="not finite as float16"):
        float16.pack(np.full((2, 2), -1e6, np.float32))
    for value in (np.nan, np.inf, -np.inf):
        weight = np.array([[1, value]], np.float32)
        np.testing.assert_array_equal(float16.pack(weight).data.astype(np.float32), weight)


def test_the_native_executor_names_a_tensor_with_a_bad_scale():
    graph, weights = llama(hidden=64)
    embedding = graph.embedding.weight
    raw = gguf.quants.quantize(weights[embedding.name], GGMLQuantizationType.Q8_0)
    good = dict(weights) | {embedding.name: BlockTensor(TYPES[8], raw)}
    executor(graph, good)
    raw = raw.copy()
    raw[3, 0:2] = (0x00, 0x7C)
    bad = dict(weights) | {embedding.name: BlockTensor(TYPES[8], raw)}
    with pytest.raises(BadFile, match=f"tensor '{embedding.name}' holds NaN or infinity"):
        executor(graph, bad)


@pytest.mark.parametrize("is_gate_of_blocks", [False, True])
def test_gates_may_be_stored_otherwise_than_what_they_open(is_gate_of_blocks: bool) -> None:
    """Both are computed together, in one thread's scratch, which has to suffice for either."""
    graph, weights = llama(hidden=1024, inner=1024, layers=1)
    mlp = graph.blocks[1]
    assert isinstance(mlp, MlpBlock)
    blocks, plain = mlp.gate_up.parts if is_gate_of_blocks else mlp.gate_up.parts[::-1]
    raw = random_blocks("Q6_K", *blocks.shape)
    raw.reshape(-1, 210)[:, 208:] = np.float16(1e-4).reshape(1).view(np.uint8)
    mixed: dict[str, Any] = dict(weights)
    mixed[plain.name] = weights[plain.name].astype(np.float16)
    mixed[blocks.name] = BlockTensor(TYPES[14], raw)
    sequence = sequence_of(300, blocks=40)

    def logits(threads: int, chunk: int) -> bytes:
        made = executor(graph, mixed, weight_format="stored", blocks=40, threads=threads)
        return run(made, sequence, chunk).tobytes()

    alone = logits(1, 1)
    for threads in (1, 2, 3):
        for chunk in (15, 300):
            assert logits(threads, chunk) == alone
