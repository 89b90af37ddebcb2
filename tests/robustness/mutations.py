"""Good files with something changed: a field set to an interesting value, bytes, lengths, order.

Everything follows from the dice that are given, so a case can be made again from its seed.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bad_files import make_good, weights
from gguf_files import (
    ARRAY,
    CODES,
    INT32,
    STRING,
    UINT16,
    RawGguf,
    RawTensor,
    good_raw,
    key,
    make_good_gguf,
    pack,
)

from vivace.models.formats.ggml_types import TYPES
from vivace.models.formats.gguf import GgufFile
from vivace.models.formats.safetensors import SafetensorsFile
from vivace.models.loading import load_model

__all__ = ["LOADERS", "gguf_case", "safetensors_case"]

WHOLE = [
    *(0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 255, 256, 257, 65535, 65536),
    *(2**n + d for n in (20, 22, 31, 32, 40, 56, 61, 62, 63, 64) for d in (-32, -1, 0, 1)),
]
ANY = [*WHOLE, -1, 1.5, 1e308, "", "F32", "F16", "BF16", "F8_E4M3", None, True, [], {}, [[]], [1]]


# ---------------------------------------------------------------- bytes


def change_bytes(dice: random.Random, data: bytearray) -> None:
    """Bits, bytes, and ranges cut out, doubled or moved; mostly in the first kilobytes."""
    end = len(data) if dice.random() < 0.2 else min(len(data), dice.choice((64, 512, 4096)))
    at = dice.randrange(max(end, 1))
    length = min(dice.choice((1, 2, 4, 8, 32, 100)), len(data) - at)
    match dice.randrange(6):
        case 0:
            data[at : at + 1] = bytes([dice.randrange(256)])
        case 1:
            data[at : at + length] = dice.randbytes(length)
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = data[at : at + length]
        case 4:
            del data[at:]
        case 5:
            data += bytes(dice.choice((1, 8, 32, 64)))


# ---------------------------------------------------------------- GGUF


def gguf_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of every number in the head of a good file."""
    at = 8

    def number(code: str) -> Iterator[tuple[int, int]]:
        nonlocal at, last
        (last,) = struct.unpack_from("<" + code, data, at)
        yield at, struct.calcsize(code)
        at += struct.calcsize(code)

    def text() -> Iterator[tuple[int, int]]:
        nonlocal at
        yield from number("Q")
        at += last

    last: Any = 0
    yield 4, 4
    yield from number("Q")
    num_tensors = last
    yield from number("Q")
    for _ in range(last):
        yield from text()
        yield from number("I")
        type, count = last, 1
        if type == ARRAY:
            yield from number("I")
            type = last
            yield from number("Q")
            count = last
        for _ in range(count):
            yield from text() if type == STRING else number(CODES[type])
    for _ in range(num_tensors):
        yield from text()
        yield from number("I")
        for _ in range(last):
            yield from number("Q")
        yield from number("I")
        yield from number("Q")


@cache
def good_gguf() -> list[tuple[dict[str, bytes], dict[str, list[tuple[int, int]]]]]:
    """Sets of files, each with where its numbers are: small, every type, a model, a split."""
    every = [
        RawTensor(item.name.encode(), (256, 2), number, bytes(512 // item.block_size * size))
        for number, item in TYPES.items()
        for size in (item.block_bytes,)
    ]
    parts = {}
    for index in range(2):
        keys = [
            key("split.no", UINT16, pack("H", index)),
            key("split.count", UINT16, pack("H", 2)),
            key("split.tensors.count", INT32, pack("i", 2)),
        ]
        tensors = [RawTensor(b"t%d" % index, (32, 3), 2, bytes(54))]
        parts[f"model-0000{index + 1}-of-00002.gguf"] = RawGguf(keys=keys, tensors=tensors).bytes()
    with TemporaryDirectory() as folder:
        make_good_gguf(Path(folder) / "model.gguf")
        model = (Path(folder) / "model.gguf").read_bytes()
    sets = [
        {"model.gguf": good_raw().bytes()},
        {"model.gguf": RawGguf(tensors=every).bytes()},
        {"model.gguf": model},
        parts,
    ]
    return [
        (files, {name: list(gguf_fields(data)) for name, data in files.items()}) for files in sets
    ]


def gguf_case(dice: random.Random, folder: Path) -> Path:
    """Write a set of files of which one is damaged; returns what to open."""
    files, fields = dice.choice(good_gguf())
    damaged = dice.choice(list(files))
    data = bytearray(files[damaged])
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if dice.random() < 0.3:
            change_bytes(dice, data)
            continue
        places = fields[damaged]
        near = places[:60] + places[-60:]  # else most would be in the vocabulary
        at, size = dice.choice(near if dice.random() < 0.7 else places)
        value = dice.choice((*WHOLE, len(data), len(data) - at, at, dice.getrandbits(64)))
        if dice.random() < 0.3:
            value = int.from_bytes(data[at : at + size], "little") + dice.choice((-32, -1, 1, 32))
        data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    for name, content in files.items():
        (folder / name).write_bytes(data if name == damaged else content)
    return folder / next(iter(files))


def read_gguf(path: Path) -> None:
    """Open, decode and check what was read, then load it as a model with all that it brings."""
    file = GgufFile(path)
    for name, info in file.tensors.items():
        assert np.asarray(file.array(name)).size == np.prod(info.shape, dtype=object)
    model = load_model(path)
    if model.has_tokenizer:
        model.tokenizer.encode("the 12 <|end|>")
        assert all(0 <= item < model.graph.vocab_size for item in model.eos_token_ids)
        if model.tokenizer.has_template:
            model.tokenizer.render_chat([{"role": "user", "content": "x"}])


# ---------------------------------------------------------------- safetensors


@cache
def good_safetensors() -> tuple[dict[str, bytes], dict[str, Any], bytes]:
    """Files of a checkpoint, its header, and its data."""
    with TemporaryDirectory() as folder:
        make_good(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    data = files[weights(Path()).name]
    end = 8 + int.from_bytes(data[:8], "little")
    return files, json.loads(data[8:end]), data[end:]


def change_header(dice: random.Random, header: dict[str, Any]) -> None:
    name = dice.choice(list(header))
    entry = header[name]
    if not isinstance(entry, dict) or not entry or dice.random() < 0.1:
        header[name] = dice.choice(ANY)
        return
    field = dice.choice(list(entry))
    match dice.randrange(5):
        case 0:
            entry[field] = dice.choice(ANY)
        case 1:
            del entry[field]
        case 2:
            header[dice.choice(("", "x" * 2000, "__metadata__", name + "2"))] = header.pop(name)
        case 3 | 4:
            if isinstance(entry[field], list) and entry[field]:
                entry[field][dice.randrange(len(entry[field]))] = dice.choice(ANY)
            else:
                header[name] = header[dice.choice(list(header))]


def safetensors_case(dice: random.Random, folder: Path) -> Path:
    """Write a checkpoint of which the weights are damaged; returns its directory."""
    files, header, tensors = good_safetensors()
    header = json.loads(json.dumps(header))
    for _ in range(dice.choice((0, 1, 1, 2, 4))):
        change_header(dice, header)
    text = json.dumps(header).encode()
    length = len(text) if dice.random() < 0.9 else dice.choice(WHOLE) % 2**64
    data = bytearray(length.to_bytes(8, "little") + text + tensors)
    if dice.random() < 0.3 or header == good_safetensors()[1]:
        change_bytes(dice, data)
    for name, content in files.items():
        (folder / name).write_bytes(data if name == weights(Path()).name else content)
    return folder


def read_safetensors(path: Path) -> None:
    file = SafetensorsFile(weights(path))
    for name, info in file.tensors.items():
        assert file.array(name).shape == info.shape
    load_model(path)


# ---------------------------------------------------------------- both

Case = Callable[[random.Random, Path], Path]
LOADERS: dict[str, tuple[Case, Callable[[Path], None]]] = {
    "gguf": (gguf_case, read_gguf),
    "safetensors": (safetensors_case, read_safetensors),
}
