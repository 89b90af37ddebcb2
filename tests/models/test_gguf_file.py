"""GGUF files that the gguf package writes: metadata, tensors, splits, and what blocks decode to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import RawGguf, RawTensor, assert_same_bits, dequantized, pack, random_blocks

from vivace.models.formats.block_tensor import BlockTensor
from vivace.models.formats.ggml_types import TYPES
from vivace.models.formats.gguf import GgufFile

BLOCKS = [item.name for item in TYPES.values() if item.dtype is None]


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]] | None = None,
    fill: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    **options: Any,
) -> Path:
    """A file with tensors: name -> (elements, or bytes of blocks [..., bytes of a row], type)."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    fill(writer)
    for name, (array, type) in (tensors or {}).items():
        writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------- metadata


def test_values_of_every_type(tmp_path):
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("a.uint8", 255)
        writer.add_int8("a.int8", -128)
        writer.add_uint16("a.uint16", 65535)
        writer.add_int16("a.int16", -(2**15))
        writer.add_uint32("a.uint32", 2**32 - 1)
        writer.add_int32("a.int32", -(2**31))
        writer.add_uint64("a.uint64", 2**64 - 1)
        writer.add_int64("a.int64", -(2**63))
        writer.add_float32("a.float32", 0.5)
        writer.add_float64("a.float64", 0.1)
        writer.add_bool("a.true", True)
        writer.add_bool("a.false", False)
        writer.add_string("a.string", "größer\0\n🎼")

    metadata = GgufFile(write(tmp_path / "a.gguf", fill=fill)).metadata
    wanted = {
        "general.architecture": "llama",
        "a.uint8": 255,
        "a.int8": -128,
        "a.uint16": 65535,
        "a.int16": -(2**15),
        "a.uint32": 2**32 - 1,
        "a.int32": -(2**31),
        "a.uint64": 2**64 - 1,
        "a.int64": -(2**63),
        "a.float32": 0.5,
        "a.float64": 0.1,
        "a.true": True,
        "a.false": False,
        "a.string": "größer\0\n🎼",
    }
    assert metadata == wanted
    assert {key: type(value) for key, value in metadata.items()} == {
        key: type(value) for key, value in wanted.items()
    }


NUMERIC = {
    GGUFValueType.UINT8: ([0, 255], np.uint8),
    GGUFValueType.INT8: ([-128, 127], np.int8),
    GGUFValueType.UINT16: ([1, 65535], np.uint16),
    GGUFValueType.INT16: ([-(2**15), 1], np.int16),
    GGUFValueType.UINT32: ([2**32 - 1], np.uint32),
    GGUFValueType.INT32: ([3, -(2**31), 2], np.int32),
    GGUFValueType.FLOAT32: ([0.5, -1.25], np.float32),
    GGUFValueType.BOOL: ([True, False, True], np.bool_),
    GGUFValueType.UINT64: ([2**64 - 1], np.uint64),
    GGUFValueType.INT64: ([-(2**63)], np.int64),
    GGUFValueType.FLOAT64: ([0.1, 1e300], np.float64),
}


@pytest.mark.parametrize("kind", NUMERIC)
def test_arrays_of_numbers(kind, tmp_path):
    values, dtype = NUMERIC[kind]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_key_value("a.first", "x", GGUFValueType.STRING)  # moves what follows off words
        writer.add_key_value("a.array", values, GGUFValueType.ARRAY, sub_type=kind)

    array = GgufFile(write(tmp_path / "a.gguf", fill=fill)).metadata["a.array"]
    assert array.dtype == dtype
    assert array.flags.aligned
    assert not array.flags.writeable
    assert array.tolist() == values


def test_arrays_of_strings(tmp_path):
    words = ["", "a", "Ġthe", "😀", "x" * 5000]
    path = write(tmp_path / "a.gguf", fill=lambda writer: writer.add_array("a.words", words))
    assert GgufFile(path).metadata["a.words"] == words


@pytest.mark.parametrize("element", [gguf_files.STRING, gguf_files.UINT32, gguf_files.BOOL])
def test_an_empty_array(element, tmp_path):
    raw = RawGguf(keys=[gguf_files.array("a", element, b"", 0)])
    (tmp_path / "a.gguf").write_bytes(raw.bytes())
    assert list(GgufFile(tmp_path / "a.gguf").metadata["a"]) == []


@pytest.mark.parametrize("version", [2, 3])
def test_versions(version, tmp_path):
    raw = gguf_files.good_raw()
    raw.version = version
    (tmp_path / "a.gguf").write_bytes(raw.bytes())
    file = GgufFile(tmp_path / "a.gguf")
    assert file.metadata["a.words"] == ["one", "zwölf"]
    np.testing.assert_array_equal(np.asarray(file.array("halves")), np.arange(5))


def test_a_file_without_tensors_may_end_with_or_without_padding(tmp_path):
    path = write(tmp_path / "a.gguf")
    data = path.read_bytes()
    assert len(data) % 32 == 0
    assert GgufFile(path).tensors == {}
    path.write_bytes(data.rstrip(b"\0"))
    assert GgufFile(path).metadata == {"general.architecture": "llama"}


# ---------------------------------------------------------------- tensors

PLAIN: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_are_views(name, tmp_path):
    values = np.random.default_rng(0).integers(-100, 100, (5, 7)).astype(PLAIN[name])
    file = GgufFile(write(tmp_path / "a.gguf", {"a": (values, name), "b": (values[0], name)}))
    assert [info.type.name for info in file.tensors.values()] == [name, name]
    assert file.tensors["a"].shape == (5, 7)
    assert file.tensors["a"].num_bytes == values.nbytes
    for array, wanted in ((file.array("a"), values), (file.array("b"), values[0])):
        assert isinstance(array, np.ndarray)
        assert array.dtype == wanted.dtype
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, wanted)
    assert np.shares_memory(file.array("a"), file.array("a"))  # the map, not a copy


def test_bfloat16_tensors(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(ml_dtypes.bfloat16)
    raw = values.view(np.uint8).reshape(4, 12)
    array = GgufFile(write(tmp_path / "a.gguf", {"a": (raw, "BF16")})).array("a")
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(array).view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(3, 512), (2, 3, 256), (2, 2, 2, 256)], ids=str)
def test_block_tensors_are_matrices(name, shape, tmp_path):
    raw = random_blocks(name, *shape)
    file = GgufFile(write(tmp_path / "a.gguf", {"a": (raw, name)}))
    assert file.tensors["a"].shape == shape
    tensor = file.array("a")
    assert isinstance(tensor, BlockTensor)
    assert tensor.shape == (np.prod(shape[:-1]), shape[-1])
    assert len(tensor) == tensor.shape[0]
    assert tensor.ndim == 2
    assert tensor.dtype == np.float32
    assert tensor.num_bytes == raw.nbytes == file.tensors["a"].num_bytes
    wanted = dequantized(raw, name).reshape(tensor.shape)
    assert_same_bits(np.asarray(tensor), wanted)
    for rows in (slice(1, 3), slice(0, 0), slice(2, None), slice(-1, None), slice(1, 99)):
        assert_same_bits(np.asarray(tensor[rows]), wanted[rows])
        assert_same_bits(tensor[rows][:1].decode(), wanted[rows][:1])


def test_plain_tensors_of_three_axes_become_matrices(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    file = GgufFile(write(tmp_path / "a.gguf", {"a": (values, "F32")}))
    assert file.tensors["a"].shape == (2, 3, 4)
    np.testing.assert_array_equal(np.asarray(file.array("a")), values.reshape(6, 4))


def test_a_quantized_vector_is_decoded(tmp_path):
    raw = random_blocks("Q4_0", 64)
    array = GgufFile(write(tmp_path / "a.gguf", {"a": (raw, "Q4_0")})).array("a")
    assert isinstance(array, np.ndarray)
    assert_same_bits(array, dequantized(raw, "Q4_0"))


@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 128, 256])
def test_any_alignment(alignment, tmp_path):
    tensors = {
        "a": (np.arange(3, dtype=np.float32), "F32"),
        "b": (random_blocks("Q6_K", 3, 256), "Q6_K"),
        "c": (np.arange(5, dtype=np.int8), "I8"),
        "d": (np.arange(6, dtype=np.float64).reshape(2, 3), "F64"),
    }
    path = tmp_path / "a.gguf"
    file = GgufFile(write(path, tensors, lambda w: w.add_custom_alignment(alignment)))
    assert all(info.offset % alignment == 0 for info in file.tensors.values())
    for name, (values, type) in tensors.items():
        wanted = dequantized(values, type) if type == "Q6_K" else values
        assert_same_bits(np.asarray(file.array(name)), wanted)
    # llama.cpp reads files that end with their last tensor, without its padding.
    info = file.tensors["d"]
    path.write_bytes(path.read_bytes()[: info.offset + info.num_bytes])
    np.testing.assert_array_equal(np.asarray(GgufFile(path).array("d")), tensors["d"][0])


def test_alignment_of_one_byte(tmp_path):
    """Elements that lie on no boundary of their size are copied to one."""
    values, raw = np.arange(3, dtype=np.float32), random_blocks("Q4_K", 2, 256)
    for filler in range(4):
        file = RawGguf(
            keys=[gguf_files.key("general.alignment", gguf_files.UINT32, pack("I", 1))],
            tensors=[
                RawTensor(b"filler", (filler,), 24, bytes(filler)),
                RawTensor(b"floats", (3,), 0, values.tobytes()),
                RawTensor(b"blocks", (256, 2), 12, raw.tobytes()),
            ],
            alignment=1,
        )
        (tmp_path / "a.gguf").write_bytes(file.bytes())
        read = GgufFile(tmp_path / "a.gguf")
        floats = np.asarray(read.array("floats"))
        assert floats.flags.aligned
        assert not floats.flags.writeable
        np.testing.assert_array_equal(floats, values)
        assert_same_bits(np.asarray(read.array("blocks")), dequantized(raw, "Q4_K"))


def test_tensors_without_elements_and_without_dimensions(tmp_path):
    tensors = {
        "scalar": (np.array(2.5, np.float32), "F32"),
        "none": (np.zeros((0, 4), np.float32), "F32"),
        "no blocks": (np.zeros((0, 144), np.uint8), "Q4_K"),
        "after": (np.arange(2, dtype=np.float32), "F32"),
    }
    file = GgufFile(write(tmp_path / "a.gguf", tensors))
    assert file.array("scalar").shape == ()
    assert np.asarray(file.array("scalar")) == 2.5
    assert np.asarray(file.array("none")).shape == (0, 4)
    assert np.asarray(file.array("no blocks")).shape == (0, 256)
    np.testing.assert_array_equal(np.asarray(file.array("after")), [0, 1])


# ---------------------------------------------------------------- splits


def split(folder: Path, num_tensors: int = 5) -> dict[str, np.ndarray]:
    """A model of `num_tensors` tensors in files of two."""
    arrays = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(num_tensors)}
    tensors = {name: (array, "F32") for name, array in arrays.items()}
    write(
        folder / "model.gguf",
        tensors,
        lambda writer: writer.add_string("general.name", "whole"),
        split_max_tensors=2,
    )
    return arrays


@pytest.mark.parametrize("given", [1, 2, 3])
def test_a_split_is_opened_from_any_part(given, tmp_path):
    arrays = split(tmp_path)
    file = GgufFile(tmp_path / f"model-{given:05d}-of-00003.gguf")
    assert [path.name for path in file.paths] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert file.metadata["general.name"] == "whole"
    assert {name: info.part for name, info in file.tensors.items()} == {
        name: i // 2 for i, name in enumerate(arrays)
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(file.array(name)), array)


def test_a_split_of_links_into_another_folder(tmp_path):
    """As the hub's cache has it: blobs of other names elsewhere, links beside each other."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    arrays = split(blobs)
    for path in sorted(blobs.iterdir()):
        blob = path.rename(blobs / f"{hash(path.name):x}")
        (snapshot / path.name).symlink_to(blob)
    file = GgufFile(snapshot / "model-00001-of-00003.gguf")
    assert set(file.tensors) == set(arrays)
