"""Named ways to damage a split of GGUF files; registered with those of single files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_gguf import case, edit_model, floats
from gguf_files import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT16,
    RawGguf,
    array,
    good_raw,
    key,
    pack,
    string,
)

__all__ = ["given_path"]


def part_of(path: Path, number: int, count: int = 3) -> Path:
    return path.with_name(f"model-{number:05d}-of-{count:05d}.gguf")


def part(index: int, count: int = 3) -> RawGguf:
    """A part with one tensor."""
    return RawGguf(
        keys=[
            key("split.no", UINT16, pack("H", index)),
            key("split.count", UINT16, pack("H", count)),
            key("split.tensors.count", INT32, pack("i", count)),
        ],
        tensors=[floats(f"t{index}".encode())],
    )


def split(name: str, expected: str, edit: Callable[[list[RawGguf]], Any]) -> None:
    """A split of three with `edit` applied."""

    @case(f"split: {name}", expected)
    def damage(path: Path) -> None:
        files = [part(index) for index in range(3)]
        edit(files)
        for number, raw in enumerate(files, 1):
            part_of(path, number).write_bytes(raw.bytes())


def set_key(raw: RawGguf, index: int, value: bytes) -> None:
    raw.keys[index] = value


split("a part missing", "part model-00003-of-00003.gguf is missing (1 of 3)", lambda p: p.pop())
split("a part twice", "'split.no' is 0: expected 1", lambda p: p.__setitem__(1, p[0]))
split(
    "a part of another split",
    "'split.count' is 7: expected 3",
    lambda p: set_key(p[2], 1, key("split.count", UINT16, pack("H", 7))),
)
split(
    "the first says another count",
    "is part of a split into 4: expected a name that",
    lambda p: set_key(p[0], 1, key("split.count", UINT16, pack("H", 4))),
)
split(
    "the first says 1",
    "is named as one of 3 parts",
    lambda p: set_key(p[0], 1, key("split.count", UINT16, pack("H", 1))),
)
split("the first says nothing", "is named as one of 3 parts", lambda p: p[0].keys.clear())
split("the second says nothing", "'split.no' is missing", lambda p: p[1].keys.clear())
split(
    "a negative count",
    "'split.count' is -3: expected a whole number",
    lambda p: set_key(p[0], 1, key("split.count", INT32, pack("i", -3))),
)
split(
    "a count that is a string",
    "'split.count' is '3': expected a whole number",
    lambda p: set_key(p[0], 1, key("split.count", STRING, string("3"))),
)
split(
    "a count that is true",
    "'split.count' is True",
    lambda p: set_key(p[0], 1, key("split.count", BOOL, b"\1")),
)
split(
    "a count that is an array",
    "'split.count' is array",
    lambda p: set_key(p[0], 1, array("split.count", UINT16, pack("H", 3), 1)),
)
split(
    "a number that is a fraction",
    "'split.no' is 1.0",
    lambda p: set_key(p[1], 0, key("split.no", FLOAT32, pack("f", 1))),
)
split(
    "another number of tensors",
    "the parts have 3 tensors but 'split.tensors.count' is 4",
    lambda p: set_key(p[0], 2, key("split.tensors.count", INT32, pack("i", 4))),
)
split("no number of tensors", "'split.tensors.count' is missing", lambda p: p[0].keys.pop())
split(
    "a tensor in two parts",
    "tensor 't0' is also in model-00001-of-00003.gguf",
    lambda p: setattr(p[2], "tensors", p[0].tensors),
)
split(
    "a part that is no GGUF file",
    "model-00002-of-00003.gguf: starts with b'FUGG'",
    lambda p: setattr(p[1], "magic", b"FUGG"),
)
split("a part of another version", "GGUF version 1", lambda p: setattr(p[2], "version", 1))
split("a part with a bad offset", "model-00003", lambda p: setattr(p[2].tensors[0], "offset", 64))


@case("split: the first part missing", "part model-00001-of-00003.gguf is missing (1 of 3)")
def _first_missing(path: Path) -> None:
    for index in (1, 2):
        part_of(path, index + 1).write_bytes(part(index).bytes())


@case("split: renamed", "is part of a split into 3: expected a name that ends in")
def _renamed(path: Path) -> None:
    path.write_bytes(part(0).bytes())


@case("split: 65535 parts", "is split into 65535 files: expected at most 512")
def _many_parts(path: Path) -> None:
    part_of(path, 1, 65535).write_bytes(part(0, 65535).bytes())


@case("split: another tool's", "is named as one of 2 parts but is not a part of a split")
def _other_tool(path: Path) -> None:
    part_of(path, 1, 2).write_bytes(good_raw().bytes())


@case("split: a model's last part missing", "is missing (1 of 4)")
def _model_part(path: Path) -> None:
    edit_model(lambda metadata, tensors: None, split_max_tensors=5)(path)
    (last,) = path.parent.glob("*-00004-of-00004.gguf")
    last.unlink()


def given_path(path: Path) -> Path:
    """What a user would open: the file, or the first part there is."""
    found = sorted(path.parent.glob("*-of-*.gguf"))
    return path if path.exists() or path.is_symlink() or not found else found[0]
