"""Named ways to damage a good GGUF file; each writes one and names a fragment of the error.

A damage takes the path of a file. Those of bytes edit `good_raw()`, those of what a model says edit
`good_metadata()` and `good_tensors()`. Those of splits are in bad_gguf_splits.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType
from gguf_files import (
    ARRAY,
    BOOL,
    CODES,
    FLOAT32,
    INT32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Metadata,
    RawGguf,
    RawTensor,
    Tensors,
    array,
    good_metadata,
    good_raw,
    good_tensors,
    key,
    pack,
    string,
    write_model,
)

Damage = Callable[[Path], Any]
CASES: dict[str, tuple[str, Damage]] = {}
TOO_LONG = 2**64 - 1

# Every file that llama.cpp's own tests/test-gguf.cpp expects to be refused, and ours like it.
LLAMA_CPP_CASES = {
    "HEADER_BAD_MAGIC": "magic FUGG",
    "HEADER_BAD_VERSION_0": "version 0",
    "HEADER_BAD_VERSION_1": "version 1",
    "HEADER_BAD_VERSION_FUTURE": "version 4",
    "HEADER_BAD_N_TENSORS": "2^64-1 tensors",
    "HEADER_BAD_N_KV": "2^64-1 keys",
    "KV_BAD_KEY_SIZE": "key length 2^64-1",
    "KV_EMPTY_KEY": "key empty",
    "KV_BAD_TYPE": "value type 13",
    "KV_BAD_VALUE_SIZE": "string length 2^64-1",
    "KV_DUPLICATE_KEY": "key twice",
    "KV_BAD_ALIGN": "alignment 13",
    "KV_WRONG_TYPE_ALIGN": "alignment as int32",
    "TENSORS_BAD_NAME_SIZE": "tensor name of 64 bytes",
    "TENSORS_BAD_N_DIMS": "5 dimensions",
    "TENSORS_BAD_SHAPE": "dimension -1",
    "TENSORS_NE_TOO_BIG": "number of elements 2^66",
    "TENSORS_NBYTES_TOO_BIG": "number of bytes above 2^64",
    "TENSORS_NBYTES_PAD_WRAP": "number of bytes that wraps when padded",
    "TENSORS_BAD_TYPE": "tensor type 43",
    "TENSORS_BAD_OFFSET": "offset 2^64-1",
    "TENSORS_DUPLICATE_NAME": "tensor twice",
    "TENSORS_BAD_ALIGN": "alignment 13 with tensors",
    "TENSORS_INCONSISTENT_ALIGN": "descriptions laid out by 1 where alignment is 32",
    "DATA_NOT_ENOUGH_DATA": "data one byte short",
    "DATA_BAD_ALIGN": "alignment 13 with data",
    "DATA_INCONSISTENT_ALIGN": "data laid out by 1 where alignment is 32",
    "DATA_MEM_SIZE_OVERFLOW": "two tensors of 2^63-64 bytes",
}


def case(name: str, expected: str) -> Callable[[Damage], Damage]:
    """Register a damage; its error must hold `expected`."""

    def register(damage: Damage) -> Damage:
        assert name not in CASES
        CASES[name] = (expected, damage)
        return damage

    return register


def edit_raw(edit: Callable[[RawGguf], Any]) -> Damage:
    def damage(path: Path) -> None:
        raw = good_raw()
        edit(raw)
        path.write_bytes(raw.bytes())

    return damage


def edit_model(edit: Callable[[Metadata, Tensors], Any], **options: Any) -> Damage:
    def damage(path: Path) -> None:
        metadata, tensors = good_metadata(), good_tensors()
        edit(metadata, tensors)
        write_model(path, metadata, tensors, **options)

    return damage


def content(name: str, expected: str, data: bytes) -> None:
    case(name, expected)(lambda path: path.write_bytes(data))


def only_key(name: str, expected: str, data: bytes, num_keys: int = 1) -> None:
    """A file of these metadata and nothing else."""
    content(name, expected, RawGguf(keys=[data], num_keys=num_keys).bytes())


def tensor(name: str, expected: str, *tensors: RawTensor, keys: tuple[bytes, ...] = ()) -> None:
    """A file with these tensors only."""
    content(name, expected, RawGguf(keys=list(keys), tensors=list(tensors)).bytes())


def floats(name: bytes = b"t", count: int = 8, **changes: Any) -> RawTensor:
    fields: dict[str, Any] = {"name": name, "dims": (count,), "type": 0, "data": bytes(4 * count)}
    return RawTensor(**fields | changes)


# ---------------------------------------------------------------- what is no GGUF file


content("empty", "too few for GGUF", b"")
content("3 bytes", "too few for GGUF", b"GGU")
content("23 bytes", "too few for GGUF", b"GGUF" + bytes(19))
content("all zeros", "starts with b'\\x00", bytes(4096))
content("a text", "starts with b'<htm'", b"<html>Too many requests</html>" * 10)
content("a Git LFS pointer", "Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\n" * 2)
content("a zip file", "perhaps a pickle", b"PK\x03\x04" + bytes(100))
content("a safetensors file", "starts with", pack("Q", 40) + b'{"a": {"dtype": "F32"}}' + bytes(40))
for magic, kind in (
    (b"FUGG", "not with GGUF"),
    (b"gguf", "not with GGUF"),
    (b"lmgg", "ggml file of before GGUF"),
    (b"fmgg", "GGMF file of before GGUF"),
    (b"tjgg", "GGJT file of before GGUF"),
    (b"algg", "GGLA adapter"),
):
    case(f"magic {magic.decode()}", kind)(
        edit_raw(lambda raw, magic=magic: setattr(raw, "magic", magic))
    )


@case("missing", "is missing or not a file")
def _missing(path: Path) -> None:
    path.unlink(missing_ok=True)


@case("a directory", "is missing or not a file")
def _directory(path: Path) -> None:
    path.mkdir()


@case("a pipe", "is missing or not a file")
def _pipe(path: Path) -> None:
    os.mkfifo(path)


@case("a link to nothing", "is missing or not a file")
def _link(path: Path) -> None:
    path.symlink_to("nothing.gguf")


# ---------------------------------------------------------------- version and counts


def version(number: int, expected: str) -> None:
    label = number if number < 2**16 else f"{number:#x}"
    case(f"version {label}", expected)(edit_raw(lambda raw: setattr(raw, "version", number)))


version(0, "version 0 does not exist")
version(1, "version 1 is not supported: expected 2 or 3")
version(4, "version 4 is not supported")
version(1 << 24, "big-endian")
version(2 << 24, "big-endian")
version(3 << 24, "big-endian")
version(2**32 - 1, "version 4294967295 is not supported")


@case("big-endian by the gguf package", "big-endian")
def _big_endian(path: Path) -> None:
    write_model(path, good_metadata(), {}, endianess=gguf.GGUFEndian.BIG)


def counts(kind: str, number: int, label: str, expected: str) -> None:
    case(f"{label} {kind}", expected)(edit_raw(lambda raw: setattr(raw, f"num_{kind}", number)))


NUM_KEYS, NUM_TENSORS = len(good_raw().keys), len(good_raw().tensors)
for number, label in ((TOO_LONG, "2^64-1"), (2**63, "2^63"), (2**31, "2^31"), (2**17 + 1, "131k")):
    counts("tensors", number, label, f"says that it has {number} tensors: expected at most")
    counts("keys", number, label, f"says that it has {number} metadata keys: expected at most")
counts("tensors", NUM_TENSORS + 1, "one more than there are", "has an empty name")
counts("tensors", NUM_TENSORS - 1, "one less than there are", "data was appended")
counts("tensors", 0, "no", "data was appended")
counts("keys", NUM_KEYS + 1, "one more than there are", "the name of tensor 0 has")
counts("keys", NUM_KEYS - 1, "one less than there are", "has 9 dimensions")
counts("keys", 0, "no", "dimensions: expected at most 4")

# ---------------------------------------------------------------- keys

only_key("key length 2^64-1", "has 18446744073709551615 bytes", string("a", TOO_LONG))
only_key("key length 2^63", "has 9223372036854775808 bytes", string("a", 2**63))
only_key("key length 2^16", "has 65536 bytes: expected at most 65535", string("k" * 2**16))
only_key("key past the end", "would end at byte", string("a", 1000))
only_key("key empty", "is empty", key("", UINT8, b"\1"))
only_key("key not UTF-8", "is not UTF-8", key(b"\xff\xfe", UINT8, b"\1"))
only_key("key of overlong UTF-8", "is not UTF-8", key(b"\xc0\x80", UINT8, b"\1"))
only_key("key a surrogate", "is not UTF-8", key(b"\xed\xa0\x80", UINT8, b"\1"))
only_key("key twice", "'a' appears twice", key("a", UINT8, b"\1") * 2, 2)
only_key(
    "key twice among others",
    "'a' appears twice",
    key("a", UINT8, b"\1") + key("b", STRING, string("x")) + key("a", STRING, string("y")),
    3,
)
only_key("a key of line breaks", "'a\\nb' is of the unknown", key("a\nb", 99, b"\1"))
for number in (13, 255, 2**31, 2**32 - 1):
    only_key(f"value type {number}", f"unknown value type {number}", key("a", number, bytes(16)))

# ---------------------------------------------------------------- values

only_key("boolean 2", "holds a boolean of 2: expected 0 or 1", key("a", BOOL, b"\2"))
only_key("boolean 255", "holds a boolean of 255", key("a", BOOL, b"\xff"))
only_key("string length 2^64-1", "bytes: expected at most", key("a", STRING, string("x", TOO_LONG)))
only_key("string length 2^63", "bytes: expected at most", key("a", STRING, string("x", 2**63)))
only_key("string past the end", "metadata key 'a' would end", key("a", STRING, string("x", 10**6)))
only_key("string not UTF-8", "is not UTF-8", key("a", STRING, string(b"abc\x80")))
only_key("string cut in a character", "is not UTF-8", key("a", STRING, string("ö".encode()[:1])))
for type, code in CODES.items():
    data = key("a", type, pack(code, 0))

    @case(f"file cut in a value {code!r}", "would end at byte")
    def _cut_value(path: Path, data: bytes = data) -> None:
        header = RawGguf(keys=[data]).header()
        path.write_bytes(header[:-1])


for type, code in CODES.items():
    size = struct.calcsize(code)
    only_key(
        f"array of 2^64-1 {code!r}",
        "elements: expected at most",
        array("a", type, bytes(size), TOO_LONG),
    )
    only_key(
        f"array of {code!r} past the end",
        "would end at byte",
        array("a", type, bytes(size), 10_000),
    )
only_key(
    "array of 2^61 numbers that wraps",
    "2305843009213693952 elements",
    array("a", UINT64, bytes(8), 2**61),
)
only_key("array of 5 million", "says that it has 5000000", array("a", UINT8, bytes(99), 5_000_000))
only_key("array of 2^64-1 strings", "elements: expected", array("a", STRING, b"", TOO_LONG))
only_key("array of strings past the end", "would end", array("a", STRING, string("x"), 1000))
only_key(
    "array with a string of 2^64-1",
    "would end at byte",
    array("a", STRING, string("x") + string("y", TOO_LONG), 2),
)
only_key("array with a string past the end", "would end", array("a", STRING, string("x", 999), 1))
only_key(
    "array with a string not UTF-8",
    "metadata key 'a'[1] is not UTF-8",
    array("a", STRING, string("x") + string(b"\xc3"), 2),
)
only_key("array with a boolean 3", "a boolean of 3", array("a", BOOL, b"\0\1\3", 3))
only_key("array of arrays", "is an array of arrays", array("a", ARRAY, pack("IQI", 4, 1, 0), 1))
only_key("array of no arrays", "is an array of arrays", array("a", ARRAY, b"", 0))
only_key(
    "arrays in arrays, 10k deep",
    "is an array of arrays",
    array("a", ARRAY, pack("IQ", ARRAY, 1) * 10_000, 1),
)
only_key("array of type 13", "unknown value type 13", array("a", 13, bytes(8), 1))
only_key("array of type 2^32-1", "unknown value type 42949", array("a", 2**32 - 1, bytes(8), 1))

# ---------------------------------------------------------------- alignment

for number in (0, 3, 13, 24, 2**32 - 1):
    value = key("general.alignment", UINT32, pack("I", number))
    expected = f"'general.alignment' is {number}: expected a power of two"
    only_key(f"alignment {number}", expected, value)
thirteen = key("general.alignment", UINT32, pack("I", 13))
tensor("alignment 13 with tensors", "a power of two", floats(count=0), keys=(thirteen,))
tensor("alignment 13 with data", "a power of two", floats(), floats(b"u"), keys=(thirteen,))
large = key("general.alignment", UINT32, pack("I", 2**31))
tensor("alignment 2^31", "would end at byte 2147483680", floats(), keys=(large,))
for label, type, data in (
    ("int32", INT32, pack("i", 32)),
    ("uint64", UINT64, pack("Q", 32)),
    ("uint8", UINT8, b"\x20"),
    ("float32", FLOAT32, pack("f", 32)),
    ("a string", STRING, string("32")),
    ("true", BOOL, b"\1"),
    ("an array", ARRAY, pack("IQI", UINT32, 1, 32)),
):
    expected = f"is of value type {type}: expected 4 (uint32)"
    only_key(f"alignment as {label}", expected, key("general.alignment", type, data))

# ---------------------------------------------------------------- tensors' descriptions

for label, name, expected in (
    ("of 64 bytes", b"n" * 64, "has 64 bytes: expected at most 63"),
    ("of a million bytes", b"n" * 10**6, "has 1000000 bytes"),
    ("empty", b"", "tensor 0 has an empty name"),
    ("not UTF-8", b"\xff", "is not UTF-8"),
):
    tensor(f"tensor name {label}", expected, floats(name))
tensor("tensor twice", "tensor 't' appears twice", floats(), floats())
tensor("tensor twice among others", "'t' appears twice", floats(), floats(b"u"), floats())


@case("tensor name of 2^64-1 bytes", "the name of tensor 0 has 18446744073709551615 bytes")
def _long_name(path: Path) -> None:
    path.write_bytes(RawGguf(num_tensors=1).header() + string("t", TOO_LONG))


@case("a model's tensor name of 64 bytes", "has 64 bytes: expected at most 63")
@edit_model
def _long_model_name(metadata: Metadata, tensors: Tensors) -> None:
    tensors["blk.0." + "n" * 58] = tensors["output_norm.weight"]


for number in (5, 8, 255, 2**31, 2**32 - 1):
    tensor(f"{number} dimensions", f"has {number} dimensions", floats(num_dims=number))
for label, dims, expected in (
    ("dimension -1", (-1,), "has shape [-1]"),
    ("dimension -2^63", (-(2**63),), "has shape [-9223372036854775808]"),
    ("two negative dimensions", (-2, -4), "has shape [-4, -2]"),
    ("dimension 2^64-1", (2**64 - 1,), "has shape [-1]"),
    ("number of elements 2^63", (2**32, 2**31), "sizes of 0 or more that fit"),
    ("number of elements 2^66", (2**33, 2**33), "sizes of 0 or more that fit"),
    ("number of elements that wraps to 8", (2**32, 2**31, 2, 8), "sizes of 0 or more that fit"),
    ("four dimensions of 2^62", (2**62,) * 4, "sizes of 0 or more that fit"),
    ("number of bytes above 2^64", (2**31, 2**31 - 1), "would end at byte"),
    ("dimension 9 where there are 8", (9,), "would end at byte"),
    ("dimension 2^40", (2**40,), "would end at byte"),
    ("number of bytes that wraps when padded", (4, 2**30 - 1, 2**30 + 1), "would end at byte"),
):
    type = 28 if "above 2^64" in label else 0
    tensor(label, expected, floats(dims=dims, type=type))
DECODED = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL MXFP4"
for label in DECODED.split():
    type = GGMLQuantizationType[label]
    block, _ = gguf.GGML_QUANT_SIZES[type]
    tensor(
        f"a row of {label} not in whole blocks",
        f"rows of {block + 1} weights: expected a multiple of the {block} of a block of {label}",
        floats(dims=(block + 1, 3), type=type, data=bytes(4096)),
    )
tensor("blocks without dimensions", "rows of 1 weights", floats(dims=(), type=12))
tensor("whole blocks across rows only", "rows of 8 weights", floats(dims=(8, 4), type=8))
for number in (43, 99, 2**31, 2**32 - 1):
    tensor(f"tensor type {number}", f"of the unknown type {number}", floats(type=number))
NOT_DECODED = (
    "Q8_1 Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ3_S IQ2_S IQ4_XS IQ1_M TQ1_0 TQ2_0 NVFP4 Q1_0"
)
WITHDRAWN = {"Q4_2": 4, "Q4_3": 5, "Q4_0_4_4": 31, "Q4_0_8_8": 33, "IQ4_NL_4_4": 36}
for label, number in {
    **{name: GGMLQuantizationType[name] for name in NOT_DECODED.split()},
    **WITHDRAWN,
    "Q2_0": 42,  # newer than the gguf package
}.items():
    tensor(f"tensor of {label}", f"stored as {label}, which is not supported", floats(type=number))

# ---------------------------------------------------------------- offsets and data

for label, offset, expected in (
    ("1", 1, "expected a multiple of the alignment 32"),
    ("16", 16, "expected a multiple of the alignment 32"),
    ("2^64-1", TOO_LONG, "expected a multiple of the alignment 32"),
    ("2^64-32", 2**64 - 32, "leaves a gap after the header: expected 0"),
    ("2^63", 2**63, "leaves a gap after the header: expected 0"),
    ("of the first not 0", 32, "leaves a gap after the header: expected 0"),
):
    tensor(f"offset {label}", expected, floats(offset=offset))
tensor("offsets equal", "overlaps tensor 't': expected 32", floats(), floats(b"u", offset=0))
tensor(
    "offsets overlap", "overlaps tensor 't': expected 64", floats(count=16), floats(b"u", offset=32)
)
tensor("offsets leave a gap", "leaves a gap after tensor 't'", floats(), floats(b"u", offset=64))
tensor("offsets in another order", "leaves a gap", floats(offset=32), floats(b"u", offset=0))
tensor(
    "two tensors of 2^63-64 bytes",
    "would end at byte",
    RawTensor(b"t", (2**63 - 64,), 24, b"", 0),
    RawTensor(b"u", (2**63 - 64,), 24, b"", 2**63 - 64),
)


def laid_out_by_one(path: Path, has_data: bool) -> None:
    raw = good_raw()
    header = RawGguf(keys=raw.keys, tensors=raw.tensors, alignment=1).header()
    header += bytes(-len(header) % 32)
    path.write_bytes(header + b"".join(t.data for t in raw.tensors) * has_data)


expected = "tensor 'floats' at byte 0 of the data would end"
case("descriptions laid out by 1 where alignment is 32", expected)(
    lambda path: laid_out_by_one(path, False)
)
expected = "'blocks' at byte 24 of the data: expected a multiple of the alignment"
case("data laid out by 1 where alignment is 32", expected)(lambda path: laid_out_by_one(path, True))


def cut(name: str, expected: str, place: Callable[[bytes, RawGguf], int]) -> None:
    """The good file cut where `place(data, file)` says."""

    @case(f"file cut {name}", expected)
    def damage(path: Path) -> None:
        raw = good_raw()
        path.write_bytes(raw.bytes()[: place(raw.bytes(), raw)])


cut("in the magic", "too few", lambda data, raw: 3)
cut("in the version", "too few", lambda data, raw: 6)
cut("in the number of tensors", "too few", lambda data, raw: 15)
cut("in the number of keys", "too few", lambda data, raw: 23)
cut("before the first key", "the name of metadata key 0", lambda data, raw: 24)
cut("in a key's length", "the name of metadata key 0", lambda data, raw: 30)
cut("in a key", "the name of metadata key 0", lambda data, raw: data.index(b"architecture"))
cut("before a type", "the type of metadata key", lambda data, raw: data.index(b"a.B") + 3)
cut("before a value", "metadata key 'a.B' would", lambda data, raw: data.index(b"a.B") + 7)
cut("in a string", "'general.architecture' would", lambda data, raw: data.index(b"llama") + 2)
cut("before an element type", "the element type", lambda data, raw: data.index(b"a.words") + 11)
cut(
    "before an array's length",
    "the length of metadata key 'a.words'",
    lambda data, raw: data.index(b"a.words") + 15,
)
cut("in an array's numbers", "'a.numbers' would", lambda data, raw: data.index(b"a.numbers") + 30)
cut("in an array's strings", "'a.words' would end", lambda data, raw: data.index(b"one") + 1)
cut("in an array's string length", "'a.words' would", lambda data, raw: data.index(b"one") + 7)
cut("in a tensor's name", "the name of tensor 0", lambda data, raw: data.index(b"floats") + 1)
cut("before the dimensions", "tensor 'floats' would", lambda data, raw: data.index(b"floats") + 6)
cut("in the dimensions", "tensor 'floats' would", lambda data, raw: data.index(b"floats") + 14)
cut("before a tensor's type", "'floats' would", lambda data, raw: data.index(b"floats") + 26)
cut("before an offset", "tensor 'floats' would", lambda data, raw: data.index(b"floats") + 30)
cut("after the first tensor", "the name of tensor 1", lambda d, raw: d.index(b"floats") + 38)
cut("before the data", "would end at byte", lambda data, raw: len(raw.header()))
cut("in the first data", "tensor 'floats' at byte 0", lambda data, raw: len(data) - 128 - 24)
cut("in the last data", "tensor 'halves' at byte 128", lambda data, raw: len(data) - 30)


@case("data one byte short", "tensor 'halves' at byte 128 of the data would end")
def _one_byte(path: Path) -> None:
    raw = good_raw()
    path.write_bytes(raw.bytes()[: -32 + len(raw.tensors[-1].data) - 1])


for label, extra in (("a byte", b"\0"), ("an alignment", bytes(32)), ("a megabyte", bytes(2**20))):

    @case(f"{label} appended", "data was appended")
    def _appended(path: Path, extra: bytes = extra) -> None:
        path.write_bytes(good_raw().bytes() + extra)


@case("the file twice", "data was appended")
def _twice(path: Path) -> None:
    path.write_bytes(good_raw().bytes() * 2)


@case("a header that is too long", "ends beyond byte 134217728")
def _huge_header(path: Path) -> None:
    """Its length is true: the file is sparse."""
    with path.open("wb") as file:
        file.write(RawGguf(num_keys=1).header() + string("a") + pack("IQ", STRING, 2**27))
        file.truncate(2**28)


@case("a header of strings that is too long", "ends beyond byte 134217728")
def _huge_strings(path: Path) -> None:
    with path.open("wb") as file:
        file.write(RawGguf(num_keys=1).header() + string("a") + pack("IIQ", ARRAY, STRING, 2**21))
        file.write((string(b"x" * 92)) * 2**20)
        file.write(string("y", 2**27))
        file.truncate(2**28)
